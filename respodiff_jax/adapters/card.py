"""An adapter directory as others get it: the adapter, a model card, a picture, the PyTorch side.

Beside the two files of `adapters` there are `README.md`, with the metadata block that model hubs
read; `grid.png`, where the run drew grids; and `torch_adapter.py`, so that a PyTorch user needs
nothing but the directory. The same adapter and picture always give the same bytes.
"""

import json
import os
import pathlib
import re
import shlex
from collections.abc import Mapping
from typing import Any

from etils import epath

from respodiff_jax.adapters.adapter import Adapter, save_adapter
from respodiff_jax.backbone import local_folder
from respodiff_jax.method.concepts import Concept

CARD_FILE = "README.md"
GRID_FILE = "grid.png"
TORCH_FILE = "torch_adapter.py"

_INTENDED_USE = """\
Pictures of people in fair proportions, and fewer violent or sexual ones, from the model named
above: for research on responsible generation, and as one layer of care among others.
"""

_LIMITS = """\
* It steers one model, at the resolution that it was trained at; on others its effect is unknown.
* The concepts are as the prompts describe them and as that model understands them. Gender and race
  have more values than any such list, and none can be read off a face.
* Proportions are met in what is asked for, not in what a viewer or a classifier sees.
* Safety concepts make unsafe pictures rarer, not impossible: filter outputs all the same. Turned
  around (negative scales) they may do harm.
"""


def export_adapter(
    adapter: Adapter, directory: str | os.PathLike, grid: bytes | None = None
) -> None:
    """Writes an adapter directory with its card.

    Args:
      adapter: what to export.
      directory: where to, made if it does not exist; an older adapter in it is replaced.
      grid: a PNG of sample pictures, if there is one.

    Raises:
      UserError: for parameters beyond the range of the dtype, and texts that are no Unicode;
        nothing is written then.
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


def torch_module() -> bytes:
    """The content of torch_adapter.py."""
    return pathlib.Path(__file__).parents[1].joinpath(TORCH_FILE).read_bytes()


def describe(adapter: Adapter) -> str:
    """What an adapter is, in lines for a terminal, which see no control characters of its texts."""
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
    for metric, images, value, interval, count in _measurements(adapter):
        facts[f"{metric}, {images}"] = f"{value} {interval}, {count} pictures"
    width = max(map(len, facts))
    lines = [f"{key:<{width}}  {value}" for key, value in facts.items()]
    for concept, scale in zip(adapter.concepts, adapter.default_scales, strict=True):
        neutral = " | ".join(concept.neutral_prompts)
        lines += ["", f"{concept.name}  ({concept.group}, scale {scale:g})"]
        lines.append(f"  from {neutral!r} {_direction(concept)}")
    return "\n".join(map(_printable, lines))


def card(adapter: Adapter, with_grid: bool) -> str:
    """The text of README.md, for an adapter directory with or without a picture."""
    backbone = adapter.backbone
    names = ", ".join(_inline(name) for name in adapter.names)
    sections = [
        _metadata(adapter),
        f"# RespoDiff adapter: {names}\n",
        "Small modules at the mid-block of a frozen text-to-image model, trained with"
        f" [RespoDiff](https://arxiv.org/abs/2509.15257) on {_inline(backbone['name'])}, whose"
        " weights they leave as they are.\n",
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
                (c.name, c.group, " | ".join(c.neutral_prompts), _direction(c), f"{scale:g}")
                for c, scale in zip(adapter.concepts, adapter.default_scales, strict=True)
            ],
        ),
        "What they add goes to the conditional half of the guidance batch only, at every step.\n",
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
    """Metric, set of pictures, value, interval, number of pictures, as texts."""
    return [
        (
            f"{m['metric']} of {m['attribute']}" if m["attribute"] else m["metric"],
            m["images"],
            f"{m['value']:.3g}",
            "[{:.3g}, {:.3g}]".format(*m["interval"]) if m["interval"] else "",
            str(m["n"]),
        )
        for m in adapter.metrics or ()
    ]


def _metadata(adapter: Adapter) -> str:
    """The YAML block that hubs read."""
    name = adapter.backbone["name"]
    groups = dict.fromkeys(concept.group for concept in adapter.concepts)
    lines = ["---", "library_name: respodiff-jax", "pipeline_tag: text-to-image"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("random/"):
        lines += [f"base_model: {_literal(name)}", "base_model_relation: adapter"]
    tags = ("respodiff", "diffusers", "stable-diffusion", "responsible-ai", *groups)
    lines += ["tags:", *(f"- {_literal(tag)}" for tag in tags), "---", ""]
    return "\n".join(lines)


def _choice(adapter: Adapter) -> tuple[str, str, Concept]:
    """How to choose what it is for, in Python and on the command line, and one of its concepts."""
    first = adapter.concepts[0]
    if first.is_safety:
        return "adapter.safe()", "--safe", first
    if sum(concept.group == first.group for concept in adapter.concepts) > 1:
        python = f"adapter.fair({_literal(first.group)}, num_images_per_prompt=4)"
        return python, f"--fair {_argument(first.group)}", first
    python = f"adapter.set_concepts({{{_literal(first.name)}: 1.0}})"
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
adapter.detach()  # the pipeline is as before
"""


def _command(adapter: Adapter) -> str:
    _, choice, concept = _choice(adapter)
    prompt = _argument(concept.neutral_prompts[0])
    return (
        f"respodiff generate --adapter . {choice} --prompt {prompt} --images-per-prompt 4 \\\n"
        "    --out pictures\n"
    )


def _literal(text: str) -> str:
    """A string in Python or YAML, on one line."""
    return json.dumps(text, ensure_ascii=False)


def _argument(text: str) -> str:
    """A string in the shell, on one line."""
    return shlex.quote(" ".join(text.split()))


def _direction(concept: Concept) -> str:
    if concept.is_safety:
        return f"away from {concept.unsafe_prompt!r}"
    return f"towards {concept.target_prompt!r}"


def _facts(facts: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, sort_keys=True)

    return _table(("", ""), [(key, text(facts[key])) for key in sorted(facts)])


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join(f"| {' | '.join(map(_inline, line))} |\n" for line in lines)


def _printable(text: str) -> str:
    """Text with escapes in place of what a terminal may obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _inline(text: str) -> str:
    """Text that means nothing to Markdown or HTML, on one line."""
    text = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)
