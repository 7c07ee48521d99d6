"""The command `respodiff VERB`: reads the command line, calls the library, reports mistakes.

JAX and the models are imported by the verbs, so that `--help` answers at once.
"""

import argparse
import csv
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from respodiff_jax.adapters import Adapter

_DESCRIPTION = """\
Responsible text-to-image generation in JAX (RespoDiff): train small modules that steer a frozen
Stable Diffusion towards fair and safe pictures, and generate with them.
"""

_EPILOG = """\
A first round, from a config to pictures:

  respodiff train --config configs/sd14_gender.py --workdir runs/gender
  respodiff generate --adapter runs/gender --fair gender --prompt "a photo of a doctor" \\
      --images-per-prompt 8 --base --out pictures
  respodiff export runs/gender --out adapters/gender

`respodiff VERB --help` tells more.
"""

_TRAIN_DESCRIPTION = """\
Trains RAM and SAM of the concepts that a config lists. The working directory gets checkpoints, logs
and sample grids, and at the end the adapter. Run the same command again to continue after an
interruption. All local devices are used.
"""

_TRAIN_EPILOG = """\
Any option of the config can be changed, as --config.SECTION.OPTION=VALUE:

  respodiff train --config configs/smoke.py --workdir runs/smoke
  respodiff train --config configs/sd14_gender.py --workdir runs/gender \\
      --config.train.steps=2000 --config.model.name=/models/stable-diffusion-v1-4

Several hosts run the same command each, on TPU pods and under Slurm:

  respodiff train --config configs/sdxl_gender.py --workdir /shared/run --distributed auto \\
      --config.train.batch_size=8

or anywhere, with process 0 on host0:

  respodiff train --config configs/sdxl_gender.py --workdir /shared/run \\
      --config.train.batch_size=8 --coordinator host0:1234 --num-processes 2 --process-id 0
"""

_GENERATE_DESCRIPTION = """\
Generates images with trained concepts, on all local devices. The output folder gets the images
(each PNG carries its parameters), grid.png and manifest.jsonl. Image number i of the run has seed
SEED + i: the same command gives the same images, whatever the batch size.
"""

_GENERATE_EPILOG = """\
Choose what steers the images:

  a weighted sum of concepts, the same for every image
    respodiff generate --adapter adapters/people --prompt "a photo of a teacher" --out pictures \\
        --concept "a woman=0.6" --concept "a black-race person=0.4"

  one concept of a group per image, in exact proportions over the run and within each prompt
    respodiff generate --adapter adapters/people --prompts-file professions.txt --out pictures \\
        --images-per-prompt 10 --fair gender --ratio "a woman=0.5,a man=0.5"

  all safety concepts, alone or with either of the above
    respodiff generate --adapter adapters/safety --prompts-file prompts.csv --safe --out pictures

  nothing: the base model's images
    respodiff generate --model CompVis/stable-diffusion-v1-4 --prompt "a photo of a doctor" \\
        --out pictures
"""

_EXPORT_DESCRIPTION = """\
Writes the concepts that a run has trained as an adapter directory: adapter_model.safetensors and
adapter_config.json, without optimiser state and base weights. The same run gives the same bytes.
"""

_EXPORT_EPILOG = """\
  respodiff export runs/gender --out adapters/gender
  respodiff export runs/gender --out adapters/gender-1000 --step 1000
"""

_OVERRIDE = "--config."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line, by default this process's.

    Returns:
      The exit status: 0, 1 after a loss that is no longer finite, 2 after a user's mistake, 130
      after Ctrl-C. Bad options and `--help` exit by themselves, as argparse does.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    overrides = [arg for arg in rest if arg.startswith(_OVERRIDE)]
    if unknown := [arg for arg in rest if arg not in overrides or args.verb != "train"]:
        hint = "; write overrides as --config.SECTION.OPTION=VALUE" if overrides else ""
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    try:
        if args.verb == "train":
            _train(args, overrides)
        else:
            {"generate": _generate, "export": _export}[args.verb](args)
    except ValueError as error:
        print(f"respodiff: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"respodiff: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("respodiff: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("respodiff", description=_DESCRIPTION, epilog=_EPILOG, **style)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def add_verb(name, summary, description, epilog):
        verb = verbs.add_parser(name, help=summary, description=description, epilog=epilog, **style)
        verb.set_defaults(parser=verb)
        return verb

    train = add_verb("train", "train concepts", _TRAIN_DESCRIPTION, _TRAIN_EPILOG)
    train.add_argument(
        "--config", required=True, metavar="FILE", help="Python file with get_config()"
    )
    train.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="of the run; an earlier run in it is continued",
    )
    train.add_argument(
        "--profile", action="store_true", help="write a profiler trace of a few steps"
    )
    hosts = train.add_argument_group("several hosts")
    hosts.add_argument(
        "--distributed",
        choices=("auto",),
        help="find the other hosts by itself (TPU pods, Slurm, Open MPI)",
    )
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    hosts.add_argument("--num-processes", type=int, metavar="N", help="processes in all")
    hosts.add_argument("--process-id", type=int, metavar="I", help="this process, 0 .. N-1")

    generate = add_verb("generate", "generate images", _GENERATE_DESCRIPTION, _GENERATE_EPILOG)
    add = generate.add_argument_group("what").add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    add(
        "--prompts-file",
        metavar="FILE",
        help="text, one prompt a line; or CSV with a column named prompt",
    )
    add("--images-per-prompt", type=int, default=1, metavar="N", help="default: %(default)s")
    add("--seed", type=int, default=0, help="of the first image (default: %(default)s)")
    add("--out", required=True, metavar="DIR", help="output folder, new or empty")
    add("--overwrite", action="store_true", help="replace the images in the output folder")
    add("--base", action="store_true", help="also write each image without the adapter, in base/")

    add = generate.add_argument_group("model and adapter").add_argument
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR",
        help="adapter directory or training workdir; may be repeated to use concepts of several",
    )
    add("--model", metavar="NAME", help="diffusers folder or hub id (default: the adapter's)")
    add("--revision", help="of a hub id: branch, tag or commit (default: the adapter's)")
    add("--variant", help="of the weight files, for example fp16")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the model (default: bfloat16, on a CPU float32)",
    )

    add = generate.add_argument_group("concepts").add_argument
    add(
        "--concept",
        action="append",
        default=[],
        metavar="NAME[=SCALE]",
        help="for every image, scale 1 if not given; may be repeated",
    )
    add("--fair", metavar="GROUP", help="one concept of the group per image, in exact proportions")
    add(
        "--ratio",
        metavar="NAME=SHARE,...",
        help="proportions for --fair, summing to 1 (default: equal)",
    )
    add("--safe", action="store_true", help="add all safety concepts")

    add = generate.add_argument_group("sampling").add_argument
    add("--steps", type=int, default=50, metavar="N", help="DDIM steps (default: %(default)s)")
    add("--guidance", type=float, default=7.5, metavar="SCALE", help="default: %(default)s")
    add("--negative-prompt", default="", metavar="TEXT", help="default: empty")
    add("--resolution", type=int, metavar="PIXELS", help="default: the adapter's, else the model's")
    add("--batch-size", type=int, metavar="N", help="over all devices (default: by resolution)")

    export = add_verb("export", "write a run's adapter", _EXPORT_DESCRIPTION, _EXPORT_EPILOG)
    export.add_argument("run", metavar="RUN", help="training workdir")
    export.add_argument("--out", required=True, metavar="DIR", help="adapter directory to write")
    export.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    return parser


def _train(args: argparse.Namespace, overrides: list[str]) -> None:
    from respodiff_jax import parallel
    from respodiff_jax.config import load_config
    from respodiff_jax.training import train

    config = load_config(args.config, overrides)
    parallel.initialize_distributed(
        args.coordinator, args.num_processes, args.process_id, args.distributed == "auto"
    )
    parallel.enable_compilation_cache()
    train(config, args.workdir, profile=args.profile)


def _export(args: argparse.Namespace) -> None:
    from respodiff_jax.adapters import save_adapter
    from respodiff_jax.checkpoint import adapter_from_workdir

    adapter = adapter_from_workdir(args.run, args.step)
    try:
        save_adapter(adapter, args.out)
    except OSError as error:
        raise ValueError(f"--out {args.out} cannot be written: {error}") from error
    print(f"{args.out}: {adapter.module.kind} adapter of {', '.join(adapter.names)}")


def _generate(args: argparse.Namespace) -> None:
    # First all that can be wrong without the model, which takes long to load.
    prompts = _read_prompts(args.prompt, args.prompts_file)
    if args.images_per_prompt < 1:
        raise ValueError(f"--images-per-prompt is {args.images_per_prompt}, expected at least 1")
    count, last = len(prompts) * args.images_per_prompt, 2**32 - 1
    if not 0 <= args.seed <= last - count:
        raise ValueError(f"--seed is {args.seed}, expected 0 .. {last - count} for {count} images")
    if args.base and not args.adapter:
        raise ValueError("--base compares with an adapter, but none is given with --adapter")
    if not args.model and not args.adapter:
        raise ValueError("no model; name one with --model, or give --adapter to use the adapter's")

    import jax

    from respodiff_jax import adapters, generation, parallel, selection
    from respodiff_jax.backbone import load_backbone

    parallel.enable_compilation_cache()
    loaded = [_load_adapter(path) for path in args.adapter]
    adapter = adapters.concatenate(loaded) if loaded else None
    weights = selection.concept_weights(
        adapter,
        len(prompts),
        args.images_per_prompt,
        concepts=_read_scales("--concept", args.concept, default=1.0),
        fair=args.fair,
        ratio=_read_scales("--ratio", args.ratio.split(",")) if args.ratio else None,
        safe=args.safe,
        seed=args.seed,
    )
    trained_on = adapter.backbone if adapter else {}
    options = generation.SamplerOptions(
        num_steps=args.steps,
        guidance_scale=args.guidance,
        negative_prompt=args.negative_prompt,
        resolution=args.resolution or trained_on.get("resolution"),
        batch_size=args.batch_size,
    )
    generation.check_output(args.out, args.overwrite)

    model = args.model or trained_on["name"]
    same_model = model == trained_on.get("name")
    open_model = functools.partial(
        load_backbone,
        model,
        revision=args.revision or (trained_on["revision"] if same_model else None),
        variant=args.variant or (trained_on["variant"] if same_model else None),
        dtype=args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
    )
    sketch = open_model(abstract=True)
    for one in loaded:
        adapters.check_fits(one, sketch, options.resolution)
    sketch.tokenise([*prompts, options.negative_prompt])
    sketch.latent_shape(options.resolution or sketch.default_resolution)
    print(f"loading {model}", flush=True)
    backbone = open_model()
    images_per_second = generation.generate(
        backbone,
        prompts,
        args.out,
        num_images_per_prompt=args.images_per_prompt,
        seed=args.seed,
        options=options,
        adapter=adapter,
        weights=weights,
        adapter_sources=args.adapter,
        base_twins=args.base,
        overwrite=args.overwrite,
    )
    print(f"{args.out}: {count * (1 + args.base)} images, {images_per_second:.2f} a second")


def _load_adapter(path: str) -> "Adapter":
    """Reads an adapter directory, or the newest state of a training workdir."""
    from respodiff_jax.adapters import CONFIG_FILE, load_adapter
    from respodiff_jax.checkpoint import adapter_from_workdir

    folder = pathlib.Path(path)
    if not (folder / CONFIG_FILE).exists() and (folder / "run.json").exists():
        return adapter_from_workdir(path)
    return load_adapter(path)


def _read_prompts(given: Sequence[str], file: str | None) -> list[str]:
    """The prompts of the command line, then those of the file."""
    prompts = list(given)
    if file is not None:
        try:
            with open(file, encoding="utf-8-sig", newline="") as lines:
                if pathlib.Path(file).suffix.lower() == ".csv":
                    table = csv.DictReader(lines)
                    if "prompt" not in (table.fieldnames or ()):
                        raise ValueError(
                            f"--prompts-file {file} has no column 'prompt', only {table.fieldnames}"
                        )
                    found = [row["prompt"] or "" for row in table]
                else:
                    found = [line.strip() for line in lines]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"--prompts-file {file} cannot be read: {error}") from error
        prompts += [prompt for prompt in found if prompt.strip()]
    if not prompts:
        raise ValueError("no prompts; give --prompt TEXT or a --prompts-file that is not empty")
    return prompts


def _read_scales(
    option: str, entries: Sequence[str], default: float | None = None
) -> dict[str, float]:
    """`NAME=NUMBER` entries as a mapping; a name may itself contain "="."""
    scales: dict[str, float] = {}
    for entry in entries:
        name, _, number = entry.rpartition("=")
        try:
            name, scale = name.strip(), float(number)
        except ValueError:
            name, scale = entry.strip(), default
        if not name or scale is None:
            raise ValueError(f"{option}: {entry!r} is not NAME=NUMBER")
        if name in scales:
            raise ValueError(f"{option} names {name!r} twice")
        scales[name] = scale
    return scales
