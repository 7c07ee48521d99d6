"""`respodiff generate`."""

import argparse

from respodiff_jax.cli import inputs
from respodiff_jax.errors import UserError

SUMMARY = "generate images"

DESCRIPTION = """\
Generates images with trained concepts, on all local devices. The output folder gets the images
(each PNG carries its parameters), grid.png and manifest.jsonl. Image number i of the run has seed
SEED + i: the same command gives the same images, whatever the batch size.
"""

EPILOG = """\
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what").add_argument
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

    inputs.add_model_arguments(parser)

    add = parser.add_argument_group("concepts").add_argument
    add(
        "--concept",
        action="append",
        default=[],
        metavar="NAME[=SCALE]",
        help="for every image (default: the concept's own scale, 1 if not set at export); may be"
        " repeated",
    )
    add("--fair", metavar="GROUP", help="one concept of the group per image, in exact proportions")
    add(
        "--ratio",
        metavar="NAME=SHARE,...",
        help="proportions for --fair, summing to 1 (default: equal)",
    )
    add("--safe", action="store_true", help="add all safety concepts")

    add = parser.add_argument_group("sampling").add_argument
    add("--steps", type=int, default=50, metavar="N", help="DDIM steps (default: %(default)s)")
    add("--guidance", type=float, default=7.5, metavar="SCALE", help="default: %(default)s")
    add("--negative-prompt", default="", metavar="TEXT", help="default: empty")
    add("--resolution", type=int, metavar="PIXELS", help="default: the adapter's, else the model's")
    add("--batch-size", type=int, metavar="N", help="over all devices (default: by resolution)")


def run(args: argparse.Namespace) -> None:
    # First all that can be wrong without the model, which takes long to load.
    prompts = inputs.read_prompts(args.prompt, args.prompts_file)
    if args.images_per_prompt < 1:
        raise UserError(f"--images-per-prompt is {args.images_per_prompt}, expected at least 1")
    count, last = len(prompts) * args.images_per_prompt, 2**32 - 1
    if not 0 <= args.seed <= last - count:
        raise UserError(f"--seed is {args.seed}, expected 0 .. {last - count} for {count} images")
    if args.base and not args.adapter:
        raise UserError("--base compares with an adapter, but none is given with --adapter")
    if not args.model and not args.adapter:
        raise UserError("no model; name one with --model, or give --adapter to use the adapter's")

    from respodiff_jax import storage
    from respodiff_jax.adapters import adapter as adapters
    from respodiff_jax.generation import folder as generation
    from respodiff_jax.generation import sampling, selection
    from respodiff_jax.training import distributed

    distributed.enable_compilation_cache()
    loaded = [inputs.open_adapter(path) for path in args.adapter]
    adapter = adapters.concatenate(loaded) if loaded else None
    weights = selection.concept_weights(
        adapter,
        len(prompts),
        args.images_per_prompt,
        concepts=inputs.read_scales("--concept", args.concept, optional=True),
        fair=args.fair,
        ratio=inputs.read_scales("--ratio", args.ratio.split(",")) if args.ratio else None,
        safe=args.safe,
        seed=args.seed,
    )
    trained_on = adapter.backbone if adapter else {}
    resolution = trained_on.get("resolution") if args.resolution is None else args.resolution
    options = sampling.SamplerOptions(
        num_steps=args.steps,
        guidance_scale=args.guidance,
        negative_prompt=args.negative_prompt,
        resolution=resolution,
        batch_size=args.batch_size,
    )
    storage.check_output(args.out, args.overwrite)

    model = args.model or trained_on["name"]
    sketch = inputs.open_backbone(args, model, trained_on, abstract=True)
    for one in loaded:
        adapters.check_fits(one, sketch, options.resolution)
    sketch.tokenise([*prompts, options.negative_prompt])
    sketch.latent_shape(options.resolution or sketch.default_resolution)
    print(f"loading {model}", flush=True)
    backbone = inputs.open_backbone(args, model, trained_on)
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
    rate = f"{images_per_second:.2f} a second, compiling included"
    print(f"{args.out}: {count * (1 + args.base)} images, {rate}")
