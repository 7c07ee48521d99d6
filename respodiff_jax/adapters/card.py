"""An adapter directory to share: the adapter, a model card, a picture, and code for PyTorch.

`export_adapter` adds three files to the two of `save_adapter`: `README.md`, the card, whose
metadata block the Hugging Face hub reads; `grid.png`, if the run drew sample pictures; and
`torch_adapter.py`, so that a PyTorch user needs only the directory. The same adapter and picture
always give the same bytes.
"""

import dataclasses
import json
import pathlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from huggingface_hub import EvalResult, ModelCardData

from respodiff_jax.adapters.adapter import CONFIG_FILE, Adapter, save_adapter
from respodiff_jax.adapters.combined import CombinedAdapter, as_adapters
from respodiff_jax.adapters.node_pack import check_node_pack, write_node_pack
from respodiff_jax.backbone import local_folder
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import Concept
from respodiff_jax.storage import PathLike, open_path

CARD_FILE = "README.md"
GRID_FILE = "grid.png"
TORCH_FILE = "torch_adapter.py"

_INTENDED_USE = """\
Pictures of people in fair proportions, and fewer violent or sexual pictures, from the model named
above. The adapter is for research on responsible generation. It is one safeguard among others.
"""

_LIMITS = """\
* The adapter is trained for one model at one resolution. Its effect elsewhere is unknown.
* The prompts define the concepts, as the model understands them. Gender and race have more values
  than these concepts, and a face shows neither.
* The proportions hold for the requested concepts, not for what a viewer or a classifier sees.
* Safety concepts make unsafe pictures rarer, not impossible: filter the pictures as well. With
  negative scales they can do harm.
"""


def export_adapter(adapter: Adapter, directory: PathLike, grid: bytes | None = None) -> None:
    """Writes an adapter directory with its card.

    Args:
      adapter: the adapter to export.
      directory: made if it does not exist; an older adapter in it is replaced.
      grid: a PNG of sample pictures, or None.

    Raises:
      UserError: if parameters are beyond the range of the dtype; nothing is written then.
    """
    readme = card(adapter, with_grid=grid is not None).encode()
    save_adapter(adapter, directory)
    directory = epath.Path(directory)
    (directory / CARD_FILE).write_bytes(readme)
    (directory / TORCH_FILE).write_bytes(torch_module())
    if grid is None:
        (directory / GRID_FILE).unlink(missing_ok=True)
    else:
        (directory / GRID_FILE).write_bytes(grid)


def export(
    adapter: Adapter,
    out: PathLike,
    *,
    dtype: str | None = None,
    scales: Mapping[str, float] | None = None,
    metrics: Sequence[Mapping[str, Any]] | None = None,
    grid: bytes | None = None,
    overwrite: bool = False,
    comfyui: PathLike | None = None,
) -> Adapter:
    """Writes an adapter directory with its card, for JAX and PyTorch users.

    Metrics describe one adapter: with another dtype or other scales the adapter's own are dropped.

    Args:
      adapter: the adapter to export.
      out: made if it does not exist; an older adapter in it is replaced.
      dtype: "float32" or "float16"; None keeps the adapter's.
      scales: default scales of concepts by name; the others keep theirs.
      metrics: from an evaluation of exactly this adapter, `evaluation.results.overall_metrics`.
      grid: a PNG of sample pictures, or None.
      overwrite: allow a folder that has files but no adapter, and replace files of the same names.
      comfyui: a folder of ComfyUI's custom_nodes that gets the nodes and the adapter, or None.

    Returns:
      The adapter as written.

    Raises:
      UserError: for adapters of several architectures, an unknown concept or dtype, a scale that is
        not finite, metrics together with another dtype or scales, parameters beyond the range of
        the dtype, or a folder that has other files or cannot be written.
    """
    [adapter] = as_adapters([adapter])
    if isinstance(adapter, CombinedAdapter):
        raise UserError("adapters of several architectures have no common file; export each alone")
    scales = {name: float(scale) for name, scale in (scales or {}).items()}
    if unknown := sorted(set(scales) - set(adapter.names)):
        raise UserError(f"`scales` names {unknown}, the adapter has {', '.join(adapter.names)}")
    changed = dataclasses.replace(
        adapter,
        dtype=dtype or adapter.dtype,
        concepts=tuple(
            dataclasses.replace(c, default_scale=scales.get(c.name, c.default_scale))
            for c in adapter.concepts
        ),
    )
    same = (changed.dtype, changed.default_scales) == (adapter.dtype, adapter.default_scales)
    if metrics is not None and not same:
        raise UserError(
            "`metrics` measured another adapter than `dtype` or `scales` make here: export without"
            " `metrics`, evaluate the result, then export the result with its metrics"
        )
    kept = adapter.metrics if metrics is None else metrics
    changed = dataclasses.replace(changed, metrics=kept if same else None)
    folder = open_path(out)
    is_used = folder.is_dir() and any(folder.iterdir())
    if is_used and not overwrite and not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"`out` {out} has other files and no adapter; choose a new folder, or set `overwrite`"
            " to write into it"
        )
    if comfyui is not None:
        check_node_pack(comfyui)
    try:
        export_adapter(changed, out, grid)
        if comfyui is not None:
            write_node_pack(comfyui, out)
    except OSError as error:
        raise UserError(f"`out` {out} cannot be written: {error}") from error
    return changed


def torch_module() -> bytes:
    """The content of `torch_adapter.py`."""
    return pathlib.Path(__file__).parents[1].joinpath(TORCH_FILE).read_bytes()


def describe(adapter: Adapter) -> str:
    """A description of an adapter for a terminal, with control characters escaped."""
    height, width, channels = adapter.module.mid_block_shape
    backbone, training = adapter.backbone, adapter.training or {}
    facts = {
        "kind": f"{adapter.module.kind}, saved in {adapter.dtype}",
        "trained on": backbone["name"],
        "revision": backbone["revision"] or "none recorded",
        "variant": backbone["variant"] or "none",
        "UNet sha256": backbone["unet_sha256"],
        "predicts": backbone["prediction_type"],
        "resolution": f"{backbone['resolution']} pixels",
        "mid-block": f"{channels} channels, {height} x {width}",
        "trained for": f"{training['steps']} steps" if "steps" in training else "not recorded",
    }
    facts["reads prompts"] = _reading(adapter)
    for metric, images, value, interval, count in _measurements(adapter):
        facts[f"{metric}, {images}"] = f"{value} {interval}, {count} pictures"
    width = max(map(len, facts))
    lines = [f"{key:<{width}}  {value}" for key, value in facts.items()]
    for concept, scale in zip(adapter.concepts, adapter.default_scales, strict=True):
        neutral = _listed(concept.neutral_prompts)
        lines += ["", f"{concept.name}  ({concept.group}, scale {scale:g}{_up_to(concept)})"]
        lines.append(f"  from {neutral!r} {_direction(concept)}")
    return "\n".join(map(_printable, lines))


def _reading(adapter: Adapter) -> str:
    """Whether the adapter reads prompts, and the held-out AUROC of each group's heads."""
    if adapter.reading is None:
        return "no, it steers every prompt"
    groups = (
        f"{group}: " + ", ".join(f"{head} {value:.3f}" for head, value in heads.items())
        for group, heads in adapter.reading_accuracy.items()
    )
    return f"yes; held-out AUROC {'; '.join(groups) or 'not recorded'}"


def _up_to(concept: Concept) -> str:
    last = concept.max_timestep
    return "" if last is None else f", at timesteps up to {last}"


def card(adapter: Adapter, with_grid: bool) -> str:
    """The text of `README.md`.

    Args:
      adapter: the adapter to describe.
      with_grid: whether the directory has a `grid.png` to show.
    """
    backbone = adapter.backbone
    names = ", ".join(_inline(name) for name in adapter.names)
    sections = [
        f"---\n{_metadata(adapter).to_yaml()}\n---\n",
        f"# RespoDiff adapter: {names}\n",
        f"Small modules for the mid-block of {_inline(backbone['name'])}, trained with"
        " [RespoDiff](https://arxiv.org/abs/2509.15257). The model's own weights stay unchanged.\n",
    ]
    if with_grid:
        sections.append(f"![Samples: the base model and the adapter]({GRID_FILE})\n")
    sections += [
        "## Use\n",
        f"PyTorch, with `diffusers`; [`{TORCH_FILE}`]({TORCH_FILE}) needs torch and safetensors:\n",
        f"```python\n{_snippet(adapter)}```\n",
        "JAX, with `respodiff-jax`:\n",
        f"```bash\n{_command(adapter)}```\n",
        "## Concepts\n",
        _table(
            ("name", "group", "from", "steered", "default scale"),
            [
                (
                    c.name,
                    c.group,
                    _listed(c.neutral_prompts),
                    _direction(c),
                    f"{scale:g}{_up_to(c)}",
                )
                for c, scale in zip(adapter.concepts, adapter.default_scales, strict=True)
            ],
        ),
        "The modules act on the conditional half of the guidance batch only, at every sampling step"
        " unless a largest timestep is given.\n",
        f"## Intended use\n\n{_INTENDED_USE}",
        f"## Limits\n\n{_LIMITS}",
        "## Training\n",
        _facts(
            {
                "model": {k: v for k, v in backbone.items() if v is not None},
                "module": f"{adapter.module.kind}, {adapter.dtype}",
            }
            | dict(adapter.training or {"run": "not recorded"})
        ),
        "## Evaluation\n",
        _evaluation(adapter),
    ]
    return "\n".join(sections)


def _evaluation(adapter: Adapter) -> str:
    if not adapter.metrics:
        return "Not evaluated.\n"
    header = ("metric", "images", "value", "95 % interval", "pictures")
    return _table(header, _measurements(adapter))


def _measurements(adapter: Adapter) -> list[tuple[str, ...]]:
    """Rows of texts: metric, set of pictures, value, interval, number of pictures."""
    return [
        (
            _metric_name(m),
            m["images"],
            f"{m['value']:.3g}",
            "[{:.3g}, {:.3g}]".format(*m["interval"]) if m["interval"] else "",
            str(m["n"]),
        )
        for m in adapter.metrics or ()
    ]


def _metric_name(metric: Mapping[str, Any]) -> str:
    return (
        f"{metric['metric']} of {metric['attribute']}" if metric["attribute"] else metric["metric"]
    )


def _metadata(adapter: Adapter) -> ModelCardData:
    """The metadata that the hub reads, with our metrics as its `model-index`.

    Metrics of the base model's pictures are left out: the hub would credit the adapter with them.
    """
    name = adapter.backbone["name"]
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("random/")
    base = {"base_model": name, "base_model_relation": "adapter"} if on_hub else {}
    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type="respodiff-evaluate",
            dataset_name="pictures drawn by respodiff evaluate",
            metric_type=m["metric"],
            metric_name=_metric_name(m),
            metric_value=float(m["value"]),
            metric_config=m["attribute"],
            metric_args={"pictures": m["n"]}
            | (
                {"confidence_interval_95": list(map(float, m["interval"]))} if m["interval"] else {}
            ),
        )
        for m in adapter.metrics or ()
        if m["images"] == "adapted"
    ]
    groups = dict.fromkeys(concept.group for concept in adapter.concepts)
    return ModelCardData(
        **base,
        library_name="respodiff-jax",
        pipeline_tag="text-to-image",
        tags=[
            *("respodiff", "diffusers", "stable-diffusion", "responsible-ai"),
            *(_one_line(group) for group in groups),
        ],
        model_name=_one_line(f"RespoDiff adapter: {', '.join(adapter.names)}") if results else None,
        eval_results=results or None,
    )


def _choice(adapter: Adapter) -> tuple[str, str, Concept]:
    """How to switch the adapter on in Python and on the command line, and a concept to try."""
    first = adapter.concepts[0]
    if first.is_safety:
        return "adapter.safe()", "--safe", first
    if sum(concept.group == first.group for concept in adapter.concepts) > 1:
        python = f"adapter.fair({_literal(first.group)}, num_images_per_prompt=4)"
        return python, f"--fair {_argument(first.group)}", first
    python = f"adapter.set_concepts({{{_literal(first.name)}: {first.default_scale}}})"
    return python, f"--concept {_argument(first.name)}", first


def _snippet(adapter: Adapter) -> str:
    choice, _, concept = _choice(adapter)
    name, resolution = adapter.backbone["name"], adapter.backbone["resolution"]
    imports, find, model = "", "", _literal(name)
    package = pathlib.Path(__file__).parents[1]
    if re.fullmatch(r"[\w.-]+", name) and local_folder(name).is_relative_to(package):
        inside = local_folder(name).relative_to(package).as_posix()
        imports = "import importlib.util\n\n"
        find = (
            "# The model comes with respodiff-jax; in its checkout: pip install --no-deps -e .\n"
            'package = importlib.util.find_spec("respodiff_jax").submodule_search_locations[0]\n'
        )
        model = f'f"{{package}}/{inside}"'
    return f"""\
{imports}import torch
from diffusers import DiffusionPipeline
from torch_adapter import RespoDiffAdapter

{find}pipe = DiffusionPipeline.from_pretrained({model})
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
adapter = RespoDiffAdapter.from_pretrained(".")  # this directory, or its hub id
adapter.attach(pipe)
{choice}
images = pipe(
    {_literal(concept.neutral_prompts[0])},
    num_images_per_prompt=4,
    height={resolution},
    width={resolution},
).images
adapter.detach()  # restores the pipeline
"""


def _command(adapter: Adapter) -> str:
    _, choice, concept = _choice(adapter)
    prompt = _argument(concept.neutral_prompts[0])
    return (
        f"respodiff generate --adapter . {choice} --prompt {prompt} --images-per-prompt 4 \\\n"
        "    --out pictures\n"
    )


def _literal(text: str) -> str:
    """A string as Python source, on one line."""
    return json.dumps(text, ensure_ascii=False)


def _argument(text: str) -> str:
    """A string as a shell argument, on one line."""
    return shlex.quote(_one_line(text))


def _listed(prompts: Iterable[str], limit: int = 6) -> str:
    """The first prompts, and how many more there are; adapter_config.json has them all."""
    prompts = list(prompts)
    more = [f"... {len(prompts) - limit} more"] if len(prompts) > limit else []
    return " | ".join([*prompts[:limit], *more])


def _direction(concept: Concept) -> str:
    own = _listed(dict.fromkeys(concept.own_prompts))
    away = concept.is_safety and not concept.has_counterparts
    return f"{'away from' if away else 'towards'} {own!r}"


def _facts(facts: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, sort_keys=True)

    return _table(("", ""), [(key, text(facts[key])) for key in sorted(facts)])


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join(f"| {' | '.join(map(_inline, line))} |\n" for line in lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _printable(text: str) -> str:
    """Text with escapes instead of characters that could control a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _inline(text: str) -> str:
    """Text on one line, with Markdown and HTML escaped."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", _one_line(text))
