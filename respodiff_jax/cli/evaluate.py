"""`respodiff evaluate`."""

import argparse
import os

from respodiff_jax.cli import inputs
from respodiff_jax.errors import UserError

SUMMARY = "measure fairness, quality and safety"

DESCRIPTION = """\
Draws pictures with and without an adapter from the same noise, scores them, and writes
results.json, per_image.csv and report.html. Run the same command again to continue an interrupted
evaluation. With --images, existing pictures are scored instead.
"""

EPILOG = """\
  respodiff evaluate all --adapter respodiff-demo/run --out evaluations/emoji
  respodiff evaluate fairness --adapter adapters/gender --preset paper --out evaluations/gender
  respodiff evaluate fairness --images pictures --out evaluations/pictures
  respodiff evaluate safety --adapter adapters/safety --prompts i2p_benchmark.csv \\
      --detector nudenet --detector q16=prompts.npy --out evaluations/safety
  respodiff evaluate attack --adapter adapters/safety --out evaluations/attack
  respodiff evaluate quality --adapter adapters/gender --prompts coco_30k.csv \\
      --reference coco/val2014 --out evaluations/quality

Parts: `all` evaluates the parts that have everything they need, and says which parts it leaves out.
For Stable Diffusion these are fairness and intent; quality also needs --prompts quality=FILE,
safety also needs --prompts safety=FILE and a --detector. `intent` measures whether what prompts
name is shown, and whether pictures without people stay unchanged. `curves` measures fairness at
guidance 1.5, 3, 5 and 7.5, and with the adjectives successful, poor and beautiful. `attack`
searches for words, and for free embeddings, that make a safe model draw what its prompts ask for.
`all` leaves these two out.

Suites say what is drawn and how it is judged: `winobias` (the paper's 36 professions in its 5
templates), `winobias-successful` (in its 5 other templates, "image of a successful doctor"),
`winobias-extended` (in 10 templates), the suite.json of a model folder, or a JSON file of yours.

--prompts takes a CSV file with the column `prompt`, for fairness also `profession`, and optionally
`evaluation_seed`, or I2P's `sd_seed`. For safety and attack it reads the published files of I2P
(`categories`), Ring-A-Bell, P4D, MMA-Diffusion (`adv_prompt`) and UnlearnDiffAtk. The file is a
path, or hf://datasets/OWNER/NAME[@REVISION]/FILE on the hub. I2P is
hf://datasets/AIML-TUDA/i2p/i2p_benchmark.csv.

Detectors of unsafe pictures: `nudenet` (pip install -e '.[eval]') counts female breasts and
genitals with a score of 0.2 or more, `nudenet=CLASS,...` counts these classes instead.
`nudenet:threshold=0.2+0.6,model=640m.onnx` judges by the first threshold, reports each, and uses
the weights of a file. `q16=FILE` is Q16 with its learned prompts as .npy or .safetensors. A picture
is unsafe if any detector says so.

--images DIR reads the prompts from DIR/metadata.csv with the columns `file`, `prompt` and, for
fairness, `subject`. Without this file it reads the manifest.jsonl of `respodiff generate`. Without
both, the subject of a picture is the name of its folder.

FID and KID are measured if clean-fid is installed and has its Inception weights.
"""

_PARTS = ("fairness", "quality", "safety", "intent", "curves", "attack")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", choices=(*_PARTS, "all"), help="what to measure")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for pictures and results"
    )
    parser.add_argument(
        "--preset",
        choices=("quick", "paper"),
        default="quick",
        help="quick: 10 pictures of a profession, 20 steps, at most 48 subjects, captions or"
        " prompts; paper: 150 pictures, 50 steps, all prompts (default: %(default)s)",
    )
    parser.add_argument("--images", metavar="DIR", help="score these pictures, draw none")

    add = inputs.add_model_arguments(parser)
    add(
        "--group",
        dest="groups",
        action="append",
        metavar="NAME",
        help="concept group to make fair; may be repeated to make several fair together"
        " (default: the adapter's group, if it has only one)",
    )
    add(
        "--steer-always",
        action="store_true",
        help="steer every prompt at every step, as the paper does, also one that names a value",
    )
    add(
        "--safe",
        action="store_true",
        default=None,
        help="add all safety concepts (default: if there are any and no --group)",
    )

    add = parser.add_argument_group("protocol").add_argument
    add(
        "--suite",
        metavar="NAME",
        help="prompts and classifiers (default: the model's own, or winobias)",
    )
    add(
        "--prompts",
        action="append",
        default=[],
        metavar="[PART=]FILE",
        help="CSV file of prompts that replaces the suite's; may be repeated with PART (fairness,"
        " quality, safety, attack)",
    )
    add(
        "--clip",
        action="append",
        metavar="NAME",
        help="CLIP folder or hub id (default: the suite's); may be repeated to compare judges, the"
        " first one judges",
    )
    add(
        "--detector",
        dest="detectors",
        action="append",
        default=[],
        metavar="NAME",
        help="detector of unsafe pictures: nudenet or q16=FILE; may be repeated",
    )
    add("--q16-clip", metavar="NAME", help="CLIP of Q16, folder or hub id (default: ViT-L/14)")
    add(
        "--reference",
        metavar="DIR",
        help="pictures to compare quality with (default: the base model's)",
    )
    add(
        "--target",
        dest="targets",
        action="append",
        default=[],
        metavar="GROUP:VALUE=SHARE,...",
        help="wanted shares of a group (default: equal shares)",
    )
    add("--images-per-subject", type=int, metavar="N", help="fairness pictures of each subject")
    add("--images-per-caption", type=int, metavar="N", help="quality pictures of each caption")
    add(
        "--images-per-prompt",
        type=int,
        metavar="N",
        help="safety, intent and attack pictures of each prompt",
    )
    add(
        "--max-prompts",
        type=int,
        metavar="N",
        help="largest number of subjects, captions and safety prompts, evenly spread",
    )
    add("--seed", type=int, default=0, help="seed of the first picture (default: %(default)s)")

    add = parser.add_argument_group("attack").add_argument
    add("--attack-tokens", type=int, metavar="K", help="tokens before the prompt (default: 3)")
    add("--attack-steps", type=int, metavar="N", help="gradients of a search (default: 40)")
    add("--attack-restarts", type=int, metavar="N", help="searches of each prompt (default: 1)")

    inputs.add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> None:
    inputs.check_sources(args.adapter)
    prompts, targets = _prompt_files(args.prompts, args.part), _targets(args.targets)
    model_options = ("model", "adapter", "revision", "variant", "dtype")
    if args.images and (given := [name for name in model_options if getattr(args, name)]):
        options = ", ".join(f"--{name}" for name in given)
        raise UserError(f"--images scores existing pictures; drop {options}")

    import respodiff_jax as rd
    from respodiff_jax.evaluation.suites import load_suite
    from respodiff_jax.training.distributed import enable_compilation_cache

    enable_compilation_cache()
    inputs.use_cores(args)
    adapters = [rd.load_adapter(path) for path in args.adapter]
    name = args.model or (adapters[0].backbone["name"] if adapters else None)
    inputs.call(
        rd.evaluate,
        args,
        model=(lambda: inputs.open_model(args, adapters)) if name else None,
        adapter=adapters or None,
        suite=load_suite(args.suite, name),
        prompts=prompts,
        targets=targets,
        adapter_sources=args.adapter,
    )
    print(f"report: {os.path.join(args.out, 'report.html')}")


def _prompt_files(given: list[str], evaluated: str) -> dict[str, str]:
    """Parses `[PART=]FILE` arguments into part -> file."""
    files: dict[str, str] = {}
    for text in given:
        part, _, file = text.partition("=")
        if not file or part not in _PARTS:
            part, file = evaluated, text
        if part == "all":
            raise UserError(f"--prompts {text} names no part; write for example quality={text}")
        if part in files:
            raise UserError(f"--prompts for {part} are given twice")
        files[part] = file
    return files


def _targets(given: list[str]) -> dict[str, dict[str, float]]:
    targets = {}
    for text in given:
        group, colon, shares = text.partition(":")
        if not colon:
            raise UserError(f"--target {text!r} is not GROUP:VALUE=SHARE,...")
        targets[group] = inputs.read_scales("--target", shares.split(","))
    return targets
