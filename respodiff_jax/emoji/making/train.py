"""Makes Emoji World's model from nothing, with fixed seeds: tokenizer, CLIP, autoencoder,
evaluator, UNet, diffusers folder.

    python -m respodiff_jax.emoji.making.train --workdir DIR [--stage clip|vae|evaluator|unet]
    [--model DIR] [--steps N] [--batch-size N] [--parts MODEL [--tune]]

Without `--stage` all stages run in order. `--parts` takes tokenizer, CLIP and autoencoder from a
finished model, and trains another evaluator or UNet for them: with `--stage evaluator`, `clip/` of
`--model` is written and nothing else; with `--tune` the UNet goes on from the model's. Each stage
continues from its checkpoint in `--workdir`, with the options that it began with, and trains no
more once done. The diffusers folder (`--model`, default `<workdir>/model`) is rewritten at each of
the UNet's checkpoints. On a CPU, with `XLA_FLAGS="--xla_force_host_platform_device_count=2
--xla_cpu_multi_thread_eigen=false"` (the number of cores), it trains data-parallel, which is faster
than several threads per operation.
"""

import argparse
import dataclasses
import json
import pathlib

import jax
import numpy as np
from transformers import CLIPTokenizer

from respodiff_jax.backbone import load_backbone, load_clip, local_folder
from respodiff_jax.emoji.making import autoencoder, clip, denoiser, export, loop, tokenizer
from respodiff_jax.errors import UserError
from respodiff_jax.storage import write_whole

STAGES = {  # stage -> steps, batch size
    "clip": (4000, 64),
    "vae": (4000, 8),
    "evaluator": (3000, 64),
    "unet": (14000, 256),
}
POOL_SIZE = 60_000
TUNING_RATE = 5e-4  # of a UNet that goes on


@dataclasses.dataclass(frozen=True)
class Job:
    """What the stages share.

    Attributes:
      workdir: folder of checkpoints and intermediate data.
      model_folder: the diffusers folder to write.
      seed: of everything.
      pool_size: pictures that the UNet sees.
      parts: a model to take tokenizer, CLIP and autoencoder from; None takes those of `workdir`.
      tune: start the UNet from that of `parts`.
    """

    workdir: pathlib.Path
    model_folder: pathlib.Path
    seed: int = 0
    pool_size: int = POOL_SIZE
    parts: str | None = None
    tune: bool = False

    def load_tokenizer(self) -> CLIPTokenizer:
        """That of `parts`, or the working directory's, made first if it is not there."""
        if self.parts is not None:
            return CLIPTokenizer.from_pretrained(local_folder(self.parts) / "tokenizer")
        folder = self.workdir / "tokenizer"
        if not (folder / "vocab.json").exists():
            tokenizer.write_tokenizer(folder, self.seed)
        return CLIPTokenizer.from_pretrained(folder)

    def load_clip(self):
        """The CLIP's parameters before its evaluator is trained."""
        return (
            loop.load_params(self.workdir, "clip")
            if self.parts is None
            else self._load_clip_of_parts()
        )

    def load_clip_and_autoencoder(self):
        """Their parameters, rounded as they ship: `parts` makes no difference to the UNet."""
        if self.parts is not None:
            return self._load_clip_of_parts(), load_backbone(self.parts).params["vae"]
        evaluator = loop.load_params(self.workdir, "evaluator")
        trained = (
            clip.with_evaluator(self.load_clip(), evaluator),
            loop.load_params(self.workdir, "vae"),
        )
        return jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), trained)

    def _load_clip_of_parts(self):
        return load_clip(local_folder(self.parts) / "clip").params


def run(job, stages):
    """Runs stages in order; those before them must be done.

    Args:
      job: `Job`.
      stages: stage -> (steps, batch size), of those in `STAGES`.

    Raises:
      UserError: if a stage was begun in the working directory with other options.
    """
    for stage, (_, batch_size) in stages.items():
        check_continues(job, stage, batch_size)
    words = job.load_tokenizer()
    for stage, (steps, batch_size) in stages.items():
        write_whole(job.workdir / f"{stage}.json", json.dumps(_options(job, stage, batch_size)))
        options = {"steps": steps, "batch_size": batch_size, "seed": job.seed}
        if stage == "clip":
            clip.train(job.workdir, words, **options)
        elif stage == "vae":
            autoencoder.train(job.workdir, **options)
        elif stage == "evaluator":
            options["seed"] += 7
            params = clip.train_evaluator(job.workdir, words, job.load_clip(), **options)
            export.export_clip(job.model_folder, words, params)
        else:
            train_unet(job, words, **options)


def _options(job, stage, batch_size):
    """What a stage is trained with, but for the number of steps; its `<stage>.json`."""
    options = {"seed": job.seed, "batch_size": batch_size, "parts": job.parts}
    return options | ({"pool_size": job.pool_size, "tune": job.tune} if stage == "unet" else {})


def check_continues(job, stage, batch_size):
    """Compares what a stage is trained with to what it began with, if it has begun; ValueError if
    they differ."""
    path, ours = job.workdir / f"{stage}.json", _options(job, stage, batch_size)
    began = json.loads(path.read_text()) if path.exists() else ours
    for option in ours:
        if began[option] != ours[option]:
            raise UserError(
                f"stage {stage} in {job.workdir} began with {option}={began[option]!r}, here it is"
                f" {ours[option]!r}; use another --workdir, or the saved value to continue it"
            )


def train_unet(job, words, **options):
    """Encodes the pool with autoencoder and text tower, trains the UNet, exports the folder."""
    clip_params, vae_params = job.load_clip_and_autoencoder()
    if job.tune:
        options["params"] = load_backbone(job.parts).params["unet"]
        options["learning_rate"] = TUNING_RATE
    latents, texts = denoiser.encode_pool(
        job.workdir, vae_params, size=job.pool_size, seed=job.seed + 1
    )
    contexts, rows = denoiser.encode_captions(clip_params, words, texts)
    scaling_factor = float(1 / np.std(latents[:5000].astype(np.float32)))
    print(
        f"unet: {len(contexts)} distinct captions, scaling factor {scaling_factor:.4f}", flush=True
    )

    def write(average, step):
        export.export(job.model_folder, words, clip_params, vae_params, average, scaling_factor)

    scaled = (latents * scaling_factor).astype(np.float16)
    average = denoiser.train(job.workdir, scaled, contexts, rows, on_save=write, **options)
    write(average, options["steps"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path, help="default: <workdir>/model")
    parser.add_argument("--stage", choices=STAGES, help="default: all, in order")
    parser.add_argument(
        "--steps", type=int, help="default: of the shipped model; with --stage only"
    )
    parser.add_argument("--batch-size", type=int, help="likewise")
    parser.add_argument("--pool-size", type=int, default=POOL_SIZE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", metavar="MODEL", help="take CLIP and autoencoder from it")
    parser.add_argument("--tune", action="store_true", help="go on from its UNet")
    args = parser.parse_args()
    if args.parts is not None and args.stage is None:
        args.stage = "unet"
    if args.parts is not None and args.stage not in ("evaluator", "unet"):
        parser.error(f"--parts has what --stage {args.stage} makes; drop one of them")
    if args.tune and (args.parts is None or args.stage != "unet"):
        parser.error("--tune goes on from the UNet of --parts; name that model, and no other stage")
    if args.stage is None and (args.steps or args.batch_size):
        parser.error("--steps and --batch-size belong to one stage; name it with --stage")
    stages = dict(STAGES)
    if args.stage is not None:
        steps, batch_size = STAGES[args.stage]
        stages = {args.stage: (args.steps or steps, args.batch_size or batch_size)}
    model_folder = args.model or args.workdir / "model"
    job = Job(args.workdir, model_folder, args.seed, args.pool_size, args.parts, args.tune)
    run(job, stages)


if __name__ == "__main__":
    main()
