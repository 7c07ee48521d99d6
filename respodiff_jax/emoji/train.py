"""Makes Emoji World's model from nothing, with fixed seeds: tokenizer, CLIP, autoencoder,
evaluator, UNet, diffusers folder.

    python -m respodiff_jax.emoji.train --workdir DIR [--stage clip|vae|evaluator|unet]
    [--model DIR] [--steps N] [--batch-size N] [--parts MODEL [--tune]]

Without `--stage` all stages run in order. `--parts` takes tokenizer, CLIP and autoencoder from a
finished model, and trains another evaluator or UNet for them: with `--stage evaluator`, `clip/` of
`--model` is written and nothing else; with `--tune` the UNet goes on from the model's. Each stage
continues from its checkpoint in `--workdir` and does nothing once done. The diffusers folder
(`--model`, default `<workdir>/model`) is rewritten at each of the UNet's checkpoints. On a CPU,
`XLA_FLAGS="--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false"` (the
number of cores) trains data-parallel, which is faster than several threads per operation.
"""

import argparse
import pathlib

import jax
import numpy as np
from transformers import CLIPTokenizer

from respodiff_jax.backbone import load_backbone, load_clip, local_folder
from respodiff_jax.emoji import autoencoder, clip, denoiser, export, loop, tokenizer

STAGES = {  # stage -> steps, batch size
    "clip": (4000, 64),
    "vae": (4000, 8),
    "evaluator": (3000, 64),
    "unet": (14000, 256),
}
POOL_SIZE = 60_000
TUNING_RATE = 5e-4  # of a UNet that goes on


def run(
    workdir, model_folder, stages, options, seed=0, pool_size=POOL_SIZE, parts=None, tune=False
):
    """Runs the named stages in order; those before them must be done.

    Args:
      workdir: folder of checkpoints and intermediate data.
      model_folder: the diffusers folder to write.
      stages: of `STAGES`.
      options: stage -> (steps, batch size), for every stage.
      seed: of everything.
      pool_size: pictures that the UNet sees.
      parts: a model to take tokenizer, CLIP and autoencoder from; None takes those of `workdir`.
      tune: start the UNet from that of `parts`.
    """
    words = workdir / "tokenizer" if parts is None else local_folder(parts) / "tokenizer"
    if parts is None and not (words / "vocab.json").exists():
        tokenizer.write_tokenizer(words, seed)
    words = CLIPTokenizer.from_pretrained(words)
    for stage in stages:
        steps, batch_size = options[stage]
        if stage == "clip":
            clip.train(workdir, words, steps=steps, batch_size=batch_size, seed=seed)
        elif stage == "vae":
            autoencoder.train(workdir, steps=steps, batch_size=batch_size, seed=seed)
        elif stage == "evaluator":
            train_evaluator(workdir, model_folder, words, steps, batch_size, seed, parts)
        else:
            train_unet(
                workdir, model_folder, words, steps, batch_size, seed, pool_size, parts, tune
            )


def train_evaluator(workdir, model_folder, words, steps, batch_size, seed, parts=None):
    """Trains the CLIP's image tower to judge without bias, and writes the model's `clip/`."""
    params = loop.load_params(workdir, "clip") if parts is None else _finished(parts)[0]
    params = clip.train_evaluator(
        workdir, words, params, steps=steps, batch_size=batch_size, seed=seed + 7
    )
    export.export_clip(model_folder, words, params)


def train_unet(
    workdir, model_folder, words, steps, batch_size, seed, pool_size, parts=None, tune=False
):
    """Encodes the pool with autoencoder and text tower, trains the UNet, exports the folder.

    The two are rounded as they ship, so that `parts`, a model to take them from, makes no
    difference to the UNet.
    """
    if parts is None:
        trained = _trained_clip(workdir), loop.load_params(workdir, "vae")
        clip_params, vae_params = jax.tree.map(
            lambda x: x.astype(np.float16).astype(np.float32), trained
        )
    else:
        clip_params, vae_params = _finished(parts)
    start = {}
    if tune:
        start = {"params": load_backbone(parts).params["unet"], "learning_rate": TUNING_RATE}
    latents, texts = denoiser.encode_pool(workdir, vae_params, size=pool_size, seed=seed + 1)
    contexts, rows = denoiser.encode_captions(clip_params, words, texts)
    scaling_factor = float(1 / np.std(latents[:5000].astype(np.float32)))
    print(
        f"unet: {len(contexts)} distinct captions, scaling factor {scaling_factor:.4f}", flush=True
    )

    def write(average, step):
        export.export(model_folder, words, clip_params, vae_params, average, scaling_factor)

    scaled = (latents * scaling_factor).astype(np.float16)
    average = denoiser.train(
        workdir,
        scaled,
        contexts,
        rows,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        on_save=write,
        **start,
    )
    write(average, steps)


def _trained_clip(workdir):
    """The CLIP of a working directory, its image tower the evaluator's."""
    return clip.with_evaluator(
        *(loop.load_params(workdir, stage) for stage in ("clip", "evaluator"))
    )


def _finished(model):
    """A finished model's CLIP and autoencoder."""
    return load_clip(local_folder(model) / "clip").params, load_backbone(model).params["vae"]


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
    if args.tune and args.parts is None:
        parser.error("--tune goes on from the UNet of --parts; name that model")
    if args.parts is not None and args.stage != "evaluator":
        args.stage = "unet"
    if args.stage is None and (args.steps or args.batch_size):
        parser.error("--steps and --batch-size belong to one stage; name it with --stage")
    options = dict(STAGES)
    if args.stage is not None:
        steps, batch_size = STAGES[args.stage]
        options[args.stage] = (args.steps or steps, args.batch_size or batch_size)
    stages = STAGES if args.stage is None else (args.stage,)
    run(
        args.workdir,
        args.model or args.workdir / "model",
        stages,
        options,
        args.seed,
        args.pool_size,
        args.parts,
        args.tune,
    )


if __name__ == "__main__":
    main()
