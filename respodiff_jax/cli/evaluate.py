"""`respodiff evaluate`."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from respodiff_jax.cli import inputs

if TYPE_CHECKING:
    from respodiff_jax.adapters import Adapter
    from respodiff_jax.evaluation.suites import Suite

SUMMARY = "measure fairness, quality and safety"

DESCRIPTION = """\
Generates pictures with and without an adapter from the same noise, scores them, and writes
results.json, per_image.csv and report.html. An interrupted evaluation continues where it stopped
when the same command is run again. --images scores pictures made elsewhere instead.
"""

EPILOG = """\
  respodiff evaluate all --model emoji-world --adapter runs/emoji --out evaluations/emoji
  respodiff evaluate fairness --adapter adapters/gender --preset paper --out evaluations/gender
  respodiff evaluate fairness --images pictures --out evaluations/pictures
  respodiff evaluate safety --adapter adapters/safety --prompts i2p_benchmark.csv \\
      --detector nudenet --detector q16=prompts.npy --out evaluations/safety
  respodiff evaluate quality --adapter adapters/gender --prompts coco_30k.csv \\
      --reference coco/val2014 --out evaluations/quality

The suite says what is drawn and how it is judged: `winobias` (the paper's 36 professions under 5
templates), `winobias-extended`, a model folder's own suite.json, or a JSON file of yours.

--prompts is a CSV file for the one part that is measured. Its columns are `prompt`, for fairness
also `profession`, for safety `categories` (parted by commas), and optionally `evaluation_seed`. It
is a path, or hf://datasets/OWNER/NAME[@REVISION]/FILE on the hub, where I2P is
hf://datasets/AIML-TUDA/i2p/i2p_benchmark.csv.

Detectors of unsafe pictures: `nudenet` (pip install 'respodiff-jax[eval]') counts female breasts
and genitals that it sees with a score of 0.2 or more, `nudenet=CLASS,...` others of its classes;
`q16=FILE` is Q16 with its learned prompts as .npy or .safetensors. A picture is unsafe if any says
so.

FID and KID are computed with --reference where clean-fid and its Inception weights are there.
"""

# preset -> fairness pictures per subject, pictures per caption or safety prompt, prompts, steps
PRESETS = {"paper": (150, 1, None, 50), "quick": (10, 1, 48, 20)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", choices=("fairness", "quality", "safety", "all"), help="what to measure"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="of pictures and results")
    parser.add_argument(
        "--preset", choices=PRESETS, default="quick", help="how much (default: %(default)s)"
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
    add("--prompts", metavar="FILE", help="CSV of prompts, instead of the suite's")
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
    add("--images-per-prompt", type=int, metavar="N", help="of each caption and safety prompt")
    add("--max-prompts", type=int, metavar="N", help="captions and safety prompts, evenly spread")
    add("--seed", type=int, default=0, help="of the first picture (default: %(default)s)")

    add = parser.add_argument_group("sampling").add_argument
    add("--steps", type=int, metavar="N", help="DDIM steps")
    add("--guidance", type=float, metavar="SCALE", help="default: the suite's")
    add("--resolution", type=int, metavar="PIXELS", help="default: the adapter's, else the model's")
    add("--batch-size", type=int, metavar="N", help="over all devices (default: by resolution)")


def run(args: argparse.Namespace) -> None:
    if not (args.images or args.model or args.adapter):
        raise ValueError("nothing to evaluate; name a --model, an --adapter, or --images")
    if args.images and (args.model or args.adapter or args.prompts):
        raise ValueError(
            "--images scores pictures that are there; drop --model, --adapter and --prompts"
        )
    if args.prompts and args.what == "all":
        raise ValueError("--prompts are for one part: evaluate fairness, quality or safety")
    if args.detector and args.what not in ("safety", "all"):
        raise ValueError(f"--detector is for safety, but {args.what} is evaluated")
    if args.reference and args.what not in ("quality", "all"):
        raise ValueError(f"--reference is for quality, but {args.what} is evaluated")

    from respodiff_jax import adapters, generation, parallel
    from respodiff_jax.backbone import load_clip
    from respodiff_jax.evaluation import detectors as detectors_lib
    from respodiff_jax.evaluation import quality
    from respodiff_jax.evaluation import run as evaluation
    from respodiff_jax.evaluation.report import write_report
    from respodiff_jax.evaluation.suites import load_suite, read_prompts

    parallel.enable_compilation_cache()
    loaded = [inputs.open_adapter(path) for path in args.adapter]
    adapter = adapters.concatenate(loaded) if loaded else None
    trained_on = adapter.backbone if adapter else {}
    model = args.model or trained_on.get("name")
    per_subject, per_prompt, max_prompts, steps = PRESETS[args.preset]
    max_prompts = args.max_prompts or max_prompts
    suite = _with_fewer_prompts(load_suite(args.suite, model), max_prompts)
    prompts = args.prompts and read_prompts(args.prompts, args.what)
    if prompts and args.what != "fairness":
        prompts = dataclasses.replace(prompts, prompts=_spread(prompts.prompts, max_prompts))
    reference = args.reference and quality.open_reference(args.reference)
    q16_clip = args.q16_clip or detectors_lib.Q16_CLIP
    scoring = {
        "detectors": detectors_lib.load_detectors(args.detector, q16_clip),
        "reference": reference,
    }
    plan = evaluation.Plan(
        protocols=evaluation.PROTOCOLS if args.what == "all" else (args.what,),
        groups=tuple(args.group) or _groups(adapter, suite, args.safe),
        safe=args.safe or _is_safe(adapter, args.group),
        images_per_subject=args.images_per_subject or per_subject,
        images_per_prompt=args.images_per_prompt or per_prompt,
        target=_targets(args.target, suite),
        seed=args.seed,
        prompts=prompts,
    )
    evaluation.check_plan(suite, plan, scoring["detectors"], pictures_given=bool(args.images))
    clip = load_clip(args.clip or suite.clip)
    if args.images:
        evaluation.score_given(args.images, suite, plan, args.out, clip=clip, **scoring)
    else:
        options = generation.SamplerOptions(
            num_steps=args.steps or steps,
            guidance_scale=suite.guidance_scale if args.guidance is None else args.guidance,
            resolution=args.resolution or trained_on.get("resolution"),
            batch_size=args.batch_size,
        )
        sketch = inputs.open_backbone(args, model, trained_on, abstract=True)
        for one in loaded:
            resolution = options.resolution or sketch.default_resolution
            adapters.check_fits(one, sketch, resolution)
        backbone = inputs.open_backbone(args, model, trained_on)
        evaluation.evaluate(
            backbone,
            adapter,
            suite,
            plan,
            args.out,
            options,
            clip=clip,
            adapter_sources=args.adapter,
            **scoring,
        )
    runs = [path for path in args.adapter if inputs.is_workdir(path)]
    print(f"report: {write_report(args.out, runs[0] if len(runs) == 1 else None)}")


def _with_fewer_prompts(suite: "Suite", count: int | None) -> "Suite":
    """The suite with so many captions and safety prompts at most."""
    return dataclasses.replace(
        suite,
        captions=suite.captions and _spread(suite.captions, count),
        safety_prompts=suite.safety_prompts and _spread(suite.safety_prompts, count),
    )


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
        raise ValueError(f"the adapter has the groups {known}; choose with --group")
    return tuple(known)


def _is_safe(adapter: "Adapter | None", groups: list[str]) -> bool:
    """Whether an adapter's safety concepts are used when nothing is said."""
    return adapter is not None and not groups and any(c.is_safety for c in adapter.concepts)


def _targets(given: list[str], suite: "Suite") -> dict[str, dict[str, float]]:
    targets = {}
    for text in given:
        group, colon, shares = text.partition(":")
        if not colon:
            raise ValueError(f"--target {text!r} is not GROUP:VALUE=SHARE,...")
        values = list(suite.attribute(group))
        scales = inputs.read_scales("--target", shares.split(","))
        if set(scales) != set(values):
            raise ValueError(f"--target {group} names {sorted(scales)}, its values are {values}")
        targets[group] = scales
    return targets
