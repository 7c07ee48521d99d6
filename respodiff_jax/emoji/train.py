"""Makes Emoji World's model from nothing, with fixed seeds: tokenizer, CLIP, autoencoder, UNet,
diffusers folder.

    python -m respodiff_jax.emoji.train --workdir DIR [--stage clip|vae|unet] [--model DIR]
    [--steps N] [--batch-size N] [--parts MODEL]

Without `--stage` all stages run in order; `--parts` takes tokenizer, CLIP and autoencoder from a
finished model and trains another UNet for them. Each stage continues from its checkpoint in
`--workdir` and does nothing once done. The diffusers folder (`--model`, default `<workdir>/model`)
is rewritten at each of the UNet's checkpoints. On a CPU,
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
    "unet": (10000, 32),
}
POOL_SIZE = 50_000


def run(workdir, model_folder, stages, options, seed=0, pool_size=POOL_SIZE, parts=None):
    """Runs the named stages in order; those before them must be done.

    Args:
      workdir: folder of checkpoints and intermediate data.
      model_folder: the diffusers folder to write.
      stages: of `STAGES`.
      options: stage -> (steps, batch size), for every stage.
      seed: of everything.
      pool_size: pictures that the UNet sees.
      parts: a model to take tokenizer, CLIP and autoencoder from; None takes those of `workdir`.
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
        else:
            train_unet(workdir, model_folder, words, steps, batch_size, seed, pool_size, parts)


def train_unet(workdir, model_folder, words, steps, batch_size, seed, pool_size, parts=None):
    """Encodes the pool with autoencoder and text tower, trains the UNet, exports the folder.

    The two are rounded as they ship, so that `parts`, a model to take them from, makes no
    difference to the UNet.
    """
    if parts is None:
        trained = loop.load_params(workdir, "clip"), loop.load_params(workdir, "vae")
        clip_params, vae_params = jax.tree.map(
            lambda x: x.astype(np.float16).astype(np.float32), trained
        )
    else:
        clip_params = load_clip(local_folder(parts) / "clip").params
        vae_params = load_backbone(parts).params["vae"]
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
    )
    write(average, steps)


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
    args = parser.parse_args()
    if args.parts is not None:
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
    )


if __name__ == "__main__":
    main()
