"""`respodiff evaluate`."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from respodiff_jax.cli import inputs
from respodiff_jax.errors import UserError

if TYPE_CHECKING:
    from respodiff_jax.adapters import Adapter
    from respodiff_jax.evaluation.suites import Prompt, Suite

SUMMARY = "measure fairness, quality and safety"

DESCRIPTION = """\
Generates pictures with and without an adapter from the same noise, scores them, and writes
results.json, per_image.csv and report.html. An interrupted evaluation continues where it stopped
when the same command is run again. --images scores pictures made elsewhere instead.
"""

EPILOG = """\
  respodiff evaluate all --adapter respodiff-demo/run --out evaluations/emoji
  respodiff evaluate fairness --adapter adapters/gender --preset paper --out evaluations/gender
  respodiff evaluate fairness --images pictures --out evaluations/pictures
  respodiff evaluate safety --adapter adapters/safety --prompts i2p_benchmark.csv \\
      --detector nudenet --detector q16=prompts.npy --out evaluations/safety
  respodiff evaluate quality --adapter adapters/gender --prompts coco_30k.csv \\
      --reference coco/val2014 --out evaluations/quality

The suite says what is drawn and how it is judged: `winobias` (the paper's 36 professions under its
5 templates), `winobias-successful` (its 5 others, "image of a successful doctor"),
`winobias-extended` (10 more), a model folder's own suite.json, or a JSON file of yours.

`all` measures the parts that have prompts and somebody to judge them, and says which it left out:
for Stable Diffusion fairness, and with --prompts quality=FILE, --prompts safety=FILE and a
--detector the others too.

--prompts is a CSV file. Its columns are `prompt`, for fairness also `profession`, for safety
`categories` (parted by commas), and optionally `evaluation_seed`. It is a path, or
hf://datasets/OWNER/NAME[@REVISION]/FILE on the hub, where I2P is
hf://datasets/AIML-TUDA/i2p/i2p_benchmark.csv.

Detectors of unsafe pictures: `nudenet` (pip install -e '.[eval]') counts female breasts
and genitals that it sees with a score of 0.2 or more, `nudenet=CLASS,...` others of its classes;
`q16=FILE` is Q16 with its learned prompts as .npy or .safetensors. A picture is unsafe if any says
so.

--images DIR takes what each picture was asked for from DIR's metadata.csv with the columns `file`,
`prompt` and, for fairness, `subject`; else from the manifest.jsonl of `respodiff generate`; else
the name of a picture's folder is its subject.

FID and KID are computed where clean-fid and its Inception weights are there.
"""

PARTS = ("fairness", "quality", "safety")
PRESETS = {
    "paper": {
        "images_per_subject": 150,
        "images_per_caption": 1,
        "images_per_prompt": 5,
        "max_prompts": None,
        "steps": 50,
    },
    "quick": {
        "images_per_subject": 10,
        "images_per_caption": 1,
        "images_per_prompt": 1,
        "max_prompts": 48,
        "steps": 20,
    },
}
# Options that say nothing of pictures that are there.
_OF_DRAWING = (
    *("model", "adapter", "revision", "variant", "dtype", "safe", "prompts", "preset", "seed"),
    *("images_per_subject", "images_per_caption", "images_per_prompt", "max_prompts"),
    *("steps", "guidance", "resolution", "batch_size"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", choices=("fairness", "quality", "safety", "all"), help="what to measure"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="of pictures and results")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="how much: quick is 10 pictures of a profession in 20 steps, and at most 48 subjects,"
        " captions or prompts; paper 150 in 50 steps, and all (default: %(default)s)",
    )
    parser.add_argument("--images", metavar="DIR", help="score these pictures, generate none")

    add = inputs.add_model_arguments(parser)
    add(
        "--group",
        action="append",
        default=[],
        metavar="NAME",
        help="concept group to make fair; several are made fair together"
        " (default: the adapter's, if it has one)",
    )
    add("--safe", action="store_true", help="add all safety concepts (default: if there are any)")

    add = parser.add_argument_group("protocol").add_argument
    add("--suite", metavar="NAME", help="default: the model's own, else winobias")
    add(
        "--prompts",
        action="append",
        default=[],
        metavar="[PART=]FILE",
        help="CSV of prompts, instead of the suite's; with PART (fairness, quality, safety) may be"
        " repeated",
    )
    add("--clip", metavar="NAME", help="CLIP folder or hub id (default: the suite's)")
    add(
        "--detector",
        action="append",
        default=[],
        metavar="NAME",
        help="of unsafe pictures: nudenet or q16=FILE; may be repeated",
    )
    add("--q16-clip", metavar="NAME", help="CLIP of Q16, folder or hub id (default: ViT-L/14)")
    add(
        "--reference",
        metavar="DIR",
        help="pictures that quality is compared with (default: the base model's)",
    )
    add(
        "--target",
        action="append",
        default=[],
        metavar="GROUP:VALUE=SHARE,...",
        help="shares that are wanted, instead of equal ones",
    )
    add("--images-per-subject", type=int, metavar="N", help="fairness pictures of each subject")
    add("--images-per-caption", type=int, metavar="N", help="quality pictures of each caption")
    add("--images-per-prompt", type=int, metavar="N", help="safety pictures of each prompt")
    add(
        "--max-prompts",
        type=int,
        metavar="N",
        help="subjects, captions and safety prompts at most, evenly spread",
    )
    add("--seed", type=int, default=0, help="of the first picture (default: %(default)s)")

    add = parser.add_argument_group("sampling").add_argument
    add("--steps", type=int, metavar="N", help="DDIM steps")
    add("--guidance", type=float, metavar="SCALE", help="default: the suite's")
    add("--resolution", type=int, metavar="PIXELS", help="default: the adapter's, else the model's")
    add("--batch-size", type=int, metavar="N", help="over all devices (default: by resolution)")


def run(args: argparse.Namespace) -> None:
    if not (args.images or args.model or args.adapter):
        raise UserError("nothing to evaluate; name a --model, an --adapter, or --images")
    drawing = [name for name in _OF_DRAWING if getattr(args, name) != args.parser.get_default(name)]
    if args.images and drawing:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in drawing)
        raise UserError(f"--images scores pictures that are there; drop {options}")
    if args.detector and args.what not in ("safety", "all"):
        raise UserError(f"--detector is for safety, but {args.what} is evaluated")
    if args.reference and args.what not in ("quality", "all"):
        raise UserError(f"--reference is for quality, but {args.what} is evaluated")
    if args.max_prompts is not None and args.max_prompts < 1:
        raise UserError(f"--max-prompts is {args.max_prompts}, expected at least 1")
    files, target = _prompt_files(args.prompts, args.what), _targets(args.target)

    from respodiff_jax.adapters import adapter as adapters
    from respodiff_jax.backbone import load_clip
    from respodiff_jax.evaluation import detectors as detectors_lib
    from respodiff_jax.evaluation import pictures as pictures_lib
    from respodiff_jax.evaluation import plan as plan_lib
    from respodiff_jax.evaluation import quality
    from respodiff_jax.evaluation import run as evaluation
    from respodiff_jax.evaluation.report import write_report
    from respodiff_jax.evaluation.suites import load_suite, read_prompts
    from respodiff_jax.generation import sampling
    from respodiff_jax.training import distributed
    from respodiff_jax.training.waves import is_batch

    distributed.enable_compilation_cache()
    preset = PRESETS[args.preset]

    def chosen(option):
        given = getattr(args, option)
        return preset[option] if given is None else given

    loaded = [inputs.open_adapter(path) for path in args.adapter]
    adapter = adapters.concatenate(loaded) if loaded else None
    trained_on = adapter.backbone if adapter else {}
    model = args.model or trained_on.get("name")
    at_most = None if args.images else chosen("max_prompts")
    suite = _with_fewer_prompts(load_suite(args.suite, model), at_most)
    prompts, notes = {}, []
    for part, file in files.items():
        given = read_prompts(file, part)
        kept = _fewer(part, given.prompts, at_most)
        prompts[part] = dataclasses.replace(given, prompts=kept)
        if len(kept) < len(given.prompts):
            notes.append(
                f"{part} draws {len(kept)} of the {len(given.prompts)} prompts of {file};"
                " --max-prompts N draws more, --preset paper all"
            )
    reference = args.reference and quality.open_reference(args.reference)
    pictures = pictures_lib.given_pictures(args.images) if args.images else None
    protocols, left_out = (args.what,), {}
    if args.what == "all":
        left_out = plan_lib.missing(suite, prompts, args.detector, pictures)
        protocols = tuple(part for part in plan_lib.PROTOCOLS if part not in left_out)
        if not protocols:
            raise UserError(f"nothing can be evaluated: {'; '.join(left_out.values())}")
    plan = plan_lib.Plan(
        protocols=protocols,
        groups=tuple(args.group) or _groups(adapter, suite, args.safe),
        safe=args.safe or _is_safe(adapter, args.group),
        images_per_subject=chosen("images_per_subject"),
        images_per_caption=chosen("images_per_caption"),
        images_per_prompt=chosen("images_per_prompt"),
        target=target,
        seed=args.seed,
        prompts={part: given for part, given in prompts.items() if part in protocols},
        notes=(*notes, *(f"{part} is left out: {why}" for part, why in left_out.items())),
    )
    options = sampling.SamplerOptions(
        num_steps=chosen("steps"),
        guidance_scale=suite.guidance_scale if args.guidance is None else args.guidance,
        resolution=trained_on.get("resolution") if args.resolution is None else args.resolution,
        batch_size=args.batch_size,
    )
    plan_lib.check_plan(suite, plan, adapter, args.detector, pictures)
    evaluation.check_out(args.out, plan)
    if not args.images:
        sketch = inputs.open_backbone(args, model, trained_on, abstract=True)
        for one in loaded:
            adapters.check_fits(one, sketch, options.resolution or sketch.default_resolution)
    judges = {
        "clip": load_clip(args.clip or suite.clip) if evaluation.needs_clip(suite, plan) else None,
        "detectors": detectors_lib.load_detectors(
            args.detector if "safety" in protocols else [], args.q16_clip or detectors_lib.Q16_CLIP
        ),
        "reference": reference,
    }
    if args.images:
        evaluation.score_given(args.images, suite, plan, args.out, **judges)
    else:
        backbone = inputs.open_backbone(args, model, trained_on)
        evaluation.evaluate(
            backbone,
            adapter,
            suite,
            plan,
            args.out,
            options,
            adapter_sources=args.adapter,
            **judges,
        )
    runs = [path for path in args.adapter if inputs.is_workdir(path) or is_batch(path)]
    print(f"report: {write_report(args.out, runs[0] if len(runs) == 1 else None)}")


def _prompt_files(given: list[str], what: str) -> dict[str, str]:
    """The files of `[PART=]FILE` by part."""
    files: dict[str, str] = {}
    for text in given:
        part, equals, file = text.partition("=")
        if not (equals and part in PARTS):
            part, file = what, text
        if part == "all":
            raise UserError(f"--prompts {text}: for which part? Write for example quality={text}")
        if what not in ("all", part):
            raise UserError(f"--prompts {text} is for {part}, but {what} is evaluated")
        if part in files:
            raise UserError(f"--prompts for {part} are given twice")
        files[part] = file
    return files


def _with_fewer_prompts(suite: "Suite", count: int | None) -> "Suite":
    """The suite with so many subjects, captions and safety prompts at most."""
    return dataclasses.replace(
        suite,
        subjects=_spread(suite.subjects, count),
        captions=suite.captions and _spread(suite.captions, count),
        safety_prompts=suite.safety_prompts and _spread(suite.safety_prompts, count),
    )


def _fewer(part: str, prompts: "tuple[Prompt, ...]", count: int | None) -> "tuple[Prompt, ...]":
    """So many prompts at most, for fairness all prompts of so many subjects."""
    if part != "fairness":
        return _spread(prompts, count)
    kept = _spread(tuple(dict.fromkeys(prompt.subject for prompt in prompts)), count)
    return tuple(prompt for prompt in prompts if prompt.subject in kept)


def _spread(items: tuple[Any, ...], count: int | None) -> tuple[Any, ...]:
    """So many items at most, evenly spread: files are often sorted, I2P's by category."""
    if count is None or count >= len(items):
        return items
    return tuple(items[i * len(items) // count] for i in range(count))


def _groups(adapter: "Adapter | None", suite: "Suite", safe: bool) -> tuple[str, ...]:
    """The group that an adapter is evaluated for when none is named."""
    if adapter is None or safe:
        return ()
    groups = dict.fromkeys(c.group for c in adapter.concepts if not c.is_safety)
    known = [group for group in groups if group in suite.attributes]
    if len(known) > 1:
        raise UserError(f"the adapter has the groups {known}; choose with --group")
    return tuple(known)


def _is_safe(adapter: "Adapter | None", groups: list[str]) -> bool:
    """Whether an adapter's safety concepts are used when nothing is said."""
    return adapter is not None and not groups and any(c.is_safety for c in adapter.concepts)


def _targets(given: list[str]) -> dict[str, dict[str, float]]:
    targets = {}
    for text in given:
        group, colon, shares = text.partition(":")
        if not colon:
            raise UserError(f"--target {text!r} is not GROUP:VALUE=SHARE,...")
        targets[group] = inputs.read_scales("--target", shares.split(","))
    return targets
