"""Trains Emoji World's model from nothing, with fixed seeds.

    python -m respodiff_jax.emoji.making.train --workdir DIR [--stage clip|vae|evaluator|unet]
        [--model DIR] [--steps N] [--batch-size N] [--parts MODEL [--tune]]

Without `--stage`, all stages run in order: tokenizer and CLIP, autoencoder, evaluator, UNet. An
interrupted stage continues from its checkpoint in `--workdir`, with the options that it began with;
a finished stage does not train again. Each checkpoint of the UNet also writes the diffusers folder
(`--model`, by default `<workdir>/model`).

`--parts` takes tokenizer, CLIP and autoencoder from a finished model and trains a UNet for them, or
with `--stage evaluator` another evaluator; the latter writes only `clip/` of `--model`. With
`--tune`, the UNet starts from that of `--parts`.

On a CPU, data-parallel training is faster than several threads per operation. For two cores:
`XLA_FLAGS="--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false"`.
"""

import argparse
import dataclasses
import json
import pathlib

import jax
import numpy as np
from transformers import CLIPTokenizer

from respodiff_jax.backbone import load_backbone, load_clip, local_folder
from respodiff_jax.emoji.making import autoencoder, clip, denoiser, export, loop
from respodiff_jax.emoji.making import tokenizer as tokenizer_lib
from respodiff_jax.errors import UserError
from respodiff_jax.storage import write_whole

# stage -> (steps, batch size)
STAGES = {"clip": (4000, 64), "vae": (4000, 8), "evaluator": (3000, 64), "unet": (14000, 256)}
POOL_SIZE = 60_000
TUNING_RATE = 5e-4  # learning rate with --tune


@dataclasses.dataclass(frozen=True)
class ModelBuild:
    """What all stages of a model share.

    Attributes:
      workdir: folder of checkpoints and intermediate data.
      model_folder: the diffusers folder to write.
      seed: seed of all stages.
      pool_size: number of pictures that the UNet is trained on.
      parts: model whose tokenizer, CLIP and autoencoder are used; None uses those of `workdir`.
      tune: start the UNet from that of `parts`.
    """

    workdir: pathlib.Path
    model_folder: pathlib.Path
    seed: int = 0
    pool_size: int = POOL_SIZE
    parts: str | None = None
    tune: bool = False

    def load_tokenizer(self) -> CLIPTokenizer:
        """Loads the tokenizer; one in `workdir` is written first if it does not exist."""
        if self.parts is not None:
            return CLIPTokenizer.from_pretrained(local_folder(self.parts) / "tokenizer")
        folder = self.workdir / "tokenizer"
        if not (folder / "vocab.json").exists():
            tokenizer_lib.write_tokenizer(folder, self.seed)
        return CLIPTokenizer.from_pretrained(folder)

    def load_clip(self):
        """Loads the CLIP that an evaluator is trained from."""
        if self.parts is not None:
            return load_clip(local_folder(self.parts) / "clip").params
        return loop.load_params(self.workdir, "clip")

    def load_clip_and_autoencoder(self):
        """Loads the CLIP with its evaluator, and the autoencoder.

        Those of `workdir` are rounded to float16, in which they are exported. The UNet is therefore
        the same whether they come from `workdir` or from the exported model as `parts`.
        """
        if self.parts is not None:
            return self.load_clip(), load_backbone(self.parts).params["vae"]
        evaluator, vae = (loop.load_params(self.workdir, stage) for stage in ("evaluator", "vae"))
        trained = clip.with_evaluator(self.load_clip(), evaluator), vae
        return jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), trained)


def run(build, stages):
    """Runs stages, as in `STAGES`, in order. Earlier ones not among them must be finished.

    Raises:
      UserError: if an earlier stage has not run, or a stage began with other options.
    """
    for stage, (_, batch_size) in stages.items():
        check_continues(build, stage, batch_size)
    build.workdir.mkdir(parents=True, exist_ok=True)
    tokenizer = build.load_tokenizer()
    for stage, (steps, batch_size) in stages.items():
        began = json.dumps(_stage_options(build, stage, batch_size))
        write_whole(build.workdir / f"{stage}.json", began)
        options = {"steps": steps, "batch_size": batch_size, "seed": build.seed}
        if stage == "clip":
            clip.train(build.workdir, tokenizer, **options)
        elif stage == "vae":
            autoencoder.train(build.workdir, **options)
        elif stage == "evaluator":
            options["seed"] += 7
            params = clip.train_evaluator(build.workdir, tokenizer, build.load_clip(), **options)
            export.export_clip(build.model_folder, tokenizer, params)
        else:
            train_unet(build, tokenizer, **options)


def _stage_options(build, stage, batch_size):
    """The options of a stage, without the number of steps; the content of `<stage>.json`."""
    options = {"seed": build.seed, "batch_size": batch_size, "parts": build.parts}
    return options | ({"pool_size": build.pool_size, "tune": build.tune} if stage == "unet" else {})


def check_continues(build, stage, batch_size):
    """Raises `UserError` if a stage that has begun would continue with other options."""
    path, options = build.workdir / f"{stage}.json", _stage_options(build, stage, batch_size)
    began = json.loads(path.read_text()) if path.exists() else options
    for option, value in options.items():
        if began[option] != value:
            raise UserError(
                f"`{option}` is {value!r}, but stage {stage} in {build.workdir} began with"
                f" {began[option]!r}; use that value, or another `workdir`"
            )


def train_unet(build, tokenizer, **options):
    """Encodes the pool of pictures and captions, trains the UNet on it, exports the model."""
    clip_params, vae_params = build.load_clip_and_autoencoder()
    if build.tune:
        options["params"] = load_backbone(build.parts).params["unet"]
        options["learning_rate"] = TUNING_RATE
    pool = {"size": build.pool_size, "seed": build.seed + 1}
    latents, texts = denoiser.encode_pool(build.workdir, vae_params, **pool)
    contexts, rows = denoiser.encode_captions(clip_params, tokenizer, texts)
    scaling_factor = float(1 / np.std(latents[:5000].astype(np.float32)))
    found = f"{len(contexts)} distinct captions, scaling factor {scaling_factor:.4f}"
    print(f"unet: {found}", flush=True)

    def write(average):
        parts = clip_params, vae_params, average
        export.export(build.model_folder, tokenizer, *parts, scaling_factor)

    scaled = (latents * scaling_factor).astype(np.float16)
    average = denoiser.train(build.workdir, scaled, contexts, rows, on_save=write, **options)
    write(average)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path, help="default: <workdir>/model")
    parser.add_argument("--stage", choices=STAGES, help="default: all, in order")
    parser.add_argument("--steps", type=int, help="number of steps of --stage")
    parser.add_argument("--batch-size", type=int, help="batch size of --stage")
    parser.add_argument("--pool-size", type=int, default=POOL_SIZE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", metavar="MODEL", help="use its CLIP and autoencoder")
    parser.add_argument("--tune", action="store_true", help="start from the UNet of --parts")
    args = parser.parse_args()
    if args.parts is not None and args.stage is None:
        args.stage = "unet"
    if args.parts is not None and args.stage not in ("evaluator", "unet"):
        parser.error(f"--stage {args.stage} makes what --parts provides; drop one of them")
    if args.tune and (args.parts is None or args.stage != "unet"):
        parser.error("--tune starts from the UNet of --parts; give --parts, and no other --stage")
    if args.stage is None and (args.steps or args.batch_size):
        parser.error("--steps and --batch-size are those of one stage; give --stage")
    stages = dict(STAGES)
    if args.stage is not None:
        steps, batch_size = STAGES[args.stage]
        stages = {args.stage: (args.steps or steps, args.batch_size or batch_size)}
    folder = args.model or args.workdir / "model"
    options = args.seed, args.pool_size, args.parts, args.tune
    run(ModelBuild(args.workdir, folder, *options), stages)


if __name__ == "__main__":
    main()
