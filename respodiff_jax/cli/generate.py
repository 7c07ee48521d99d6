"""`respodiff generate`."""

import argparse
import warnings

from respodiff_jax.cli import inputs

SUMMARY = "generate images"

DESCRIPTION = """\
Generates images with trained concepts, on all local devices. Writes the images (each PNG contains
its parameters), grid.png and manifest.jsonl to the output folder. Image i of a run has seed
SEED + i: the same command gives the same images, whatever the batch size.
"""

EPILOG = """\
The images are steered by one of these:

  a weighted sum of concepts, the same for every image
    respodiff generate --adapter adapters/people --prompt "a photo of a teacher" --out pictures \\
        --concept "a woman=0.6" --concept "a black-race person=0.4"

  one concept of a group per image, in exact proportions over the run and within each prompt
    respodiff generate --adapter adapters/people --prompts-file professions.txt --out pictures \\
        --images-per-prompt 10 --fair gender --ratio "a woman=0.5,a man=0.5"

  all safety concepts, alone or with one of the above
    respodiff generate --adapter adapters/safety --prompts-file prompts.csv --safe --out pictures

  nothing, for the base model's images
    respodiff generate --model CompVis/stable-diffusion-v1-4 --prompt "a photo of a doctor" \\
        --out pictures
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what").add_argument
    add(
        "--prompt",
        dest="prompts",
        action="append",
        default=[],
        metavar="TEXT",
        help="prompt of images; may be repeated",
    )
    add(
        "--prompts-file",
        metavar="FILE",
        help="text file with one prompt per line, or CSV file with the column prompt",
    )
    add("--images-per-prompt", type=int, default=1, metavar="N", help="default: %(default)s")
    add("--seed", type=int, default=0, help="seed of the first image (default: %(default)s)")
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="output folder; an interrupted run in it is continued",
    )
    add("--overwrite", action="store_true", help="replace the images in the output folder")
    add("--base", action="store_true", help="also write each image without the adapter, in base/")

    inputs.add_model_arguments(parser)

    add = parser.add_argument_group("concepts").add_argument
    add(
        "--concept",
        dest="concepts",
        action="append",
        default=[],
        metavar="NAME[=SCALE]",
        help="steer every image by this concept (default scale: set at export, else 1); may be"
        " repeated",
    )
    add(
        "--fair",
        metavar="GROUP",
        help="give each image one concept of the group, in exact proportions",
    )
    add(
        "--ratio",
        metavar="NAME=SHARE,...",
        help="proportions for --fair; their sum is 1 (default: equal)",
    )
    add("--safe", action="store_true", help="add all safety concepts, at their default scales")
    add(
        "--steer-always",
        action="store_true",
        help="steer every prompt at every step, as the paper does; by default an adapter keeps what"
        " a prompt names, and leaves pictures without people as they are",
    )

    add = inputs.add_sampling_arguments(parser, steps=50, guidance=7.5)
    add("--negative-prompt", default="", metavar="TEXT", help="default: empty")


def run(args: argparse.Namespace) -> None:
    inputs.check_sources(args.adapter)
    prompts = inputs.read_prompts(args.prompts, args.prompts_file)
    concepts = inputs.read_scales("--concept", args.concepts, optional=True)
    ratio = inputs.read_scales("--ratio", args.ratio.split(",")) if args.ratio else None

    import respodiff_jax as rd
    from respodiff_jax.emoji.shipped import warning_of_unknown_words
    from respodiff_jax.training.distributed import enable_compilation_cache

    enable_compilation_cache()
    inputs.use_cores(args)
    adapters = [rd.load_adapter(path) for path in args.adapter]

    def open_model():
        model = inputs.open_model(args, adapters)
        if warning := warning_of_unknown_words(model, prompts):
            warnings.warn(warning, stacklevel=1)
        print(f"loading {model.identity['name']}", flush=True)
        return model

    images_per_second = inputs.call(
        rd.generate_folder,
        args,
        model=open_model if args.model or adapters else None,
        prompts=prompts,
        adapter=adapters or None,
        concepts=concepts,
        ratio=ratio,
        sampler=args.sampler or "ddim",
        adapter_sources=args.adapter,
    )
    count = len(prompts) * args.images_per_prompt * (1 + args.base)
    if images_per_second is None:
        print(f"{args.out}: all {count} images are there already: nothing left to draw")
    else:
        print(f"{args.out}: {count} images, {images_per_second:.2f} a second, compiling included")
