"""The two steps of launch/newest_torch.sh: `store` runs with JAX, `check` without."""

import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile

NUM_STEPS, GUIDANCE_SCALE, TOLERANCE = 50, 7.5, 1e-3
ROOT = pathlib.Path(__file__).resolve().parents[1]
_UNET = "unet/*.safetensors"


def rows(names):
    """Weights of the concepts for four images: the first, the last, both, none."""
    first, last = names[0], names[-1]
    return [{first: 1.0}, {last: 1.0}, {first: 0.6, last: 0.4}, {}]


def check_belongs(model: str, stored: pathlib.Path) -> None:
    """Exits if a stored adapter was trained on another UNet than that of the model."""
    config = stored / "adapter" / "adapter_config.json"
    if config.is_file():
        trained_on = json.loads(config.read_text(encoding="utf-8"))["backbone"]
        unet = b"".join(f.read_bytes() for f in sorted(pathlib.Path(model).glob(_UNET)))
        if trained_on["unet_sha256"] != hashlib.sha256(unet).hexdigest():
            raise SystemExit(f"{stored} was stored for another model, {trained_on['name']}")


def store(model: str, stored: pathlib.Path) -> None:
    """Makes an adapter for the model, and latents that it steers, unless they exist."""
    check_belongs(model, stored)
    import jax
    import numpy as np
    from safetensors.numpy import save_file

    from respodiff_jax.adapters import Adapter, load_adapter, steerings
    from respodiff_jax.adapters.card import export_adapter
    from respodiff_jax.backbone import load_backbone
    from respodiff_jax.generation import sampling
    from respodiff_jax.method.concepts import Concept
    from respodiff_jax.method.diffusion import Schedule
    from respodiff_jax.method.modules import MidBlockModule

    if (stored / "adapter").is_dir() and (stored / "latents.safetensors").is_file():
        return
    backbone = load_backbone(model)
    resolution = backbone.default_resolution
    schedule = Schedule.from_config(backbone.scheduler_config, NUM_STEPS)
    if not (stored / "adapter").is_dir():
        module = MidBlockModule("conv", backbone.mid_block_shape(resolution), None, "uniform")
        keys = jax.random.split(jax.random.key(0), (2, 2))
        ram, sam = (jax.vmap(module.init_params)(role_keys) for role_keys in keys)
        concepts = tuple(
            Concept(name, "gender", ("a person",), target_prompt=name)
            for name in ("a woman", "a man")
        )
        identity = dict(backbone.identity) | {
            "resolution": resolution,
            "prediction_type": schedule.prediction_type,
        }
        export_adapter(Adapter(concepts, module, ram, sam, identity), stored / "adapter")
    adapter = load_adapter(stored / "adapter")
    weights = [[row.get(name, 0.0) for name in adapter.names] for row in rows(adapter.names)]
    prompt = adapter.concepts[0].neutral_prompts[0]
    noise = sampling.initial_noise(range(4), backbone.latent_shape(resolution))
    cond = backbone.encode_prompts([prompt] * 4, resolution)
    uncond = backbone.encode_prompts([""], resolution)
    denoise = jax.jit(functools.partial(sampling.denoise, backbone, (adapter.module,), schedule))
    chosen = steerings(adapter, weights)
    latents = denoise(backbone.params, noise, cond, uncond, chosen, GUIDANCE_SCALE)
    arrays = {"noise": noise, "latents": latents}
    arrays = {k: np.ascontiguousarray(np.moveaxis(v, -1, 1)) for k, v in arrays.items()}  # NCHW
    save_file(arrays, stored / "latents.safetensors", {"prompt": prompt})


def check_no_jax() -> None:
    for name in ("jax", "flax"):
        assert importlib.util.find_spec(name) is None, f"{name} is installed here"
    assert "respodiff_jax" not in sys.modules, "the example has imported respodiff_jax"


def check(model: str, stored: pathlib.Path) -> None:
    """Runs the example of the model card unchanged, and compares latents.

    The example finds the packaged model in its folder, without importing the package.
    """
    check_belongs(model, stored)
    import diffusers
    import torch
    import transformers
    from safetensors import safe_open

    versions = (torch.__version__, diffusers.__version__, transformers.__version__)
    print("torch {}, diffusers {}, transformers {}, no JAX".format(*versions))

    # The stored adapter has no copy of torch_adapter.py, because it would become outdated.
    folder = tempfile.mkdtemp()
    shutil.copytree(stored / "adapter", folder, dirs_exist_ok=True)
    shutil.copy(ROOT / "respodiff_jax" / "torch_adapter.py", folder)
    os.chdir(folder)
    sys.path[:0] = [folder, str(ROOT)]
    card = pathlib.Path("README.md").read_text(encoding="utf-8")
    example = re.search(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)[1]
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    check_no_jax()
    pipe, adapter = names["pipe"].to("cpu"), names["adapter"]
    pipe.set_progress_bar_config(disable=True)
    print(f"the card's example: {len(names['images'])} images of {names['images'][0].size}")

    with safe_open(stored / "latents.safetensors", framework="pt") as file:
        noise, stored_latents = file.get_tensor("noise"), file.get_tensor("latents")
        prompt = file.metadata()["prompt"]
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)

    def sample():
        return pipe(
            prompt,
            latents=noise,
            num_images_per_prompt=len(noise),
            num_inference_steps=NUM_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            output_type="latent",
        ).images

    base = sample()
    adapter.attach(pipe).set_concepts(rows(adapter.names))
    latents = sample()
    adapter.detach()
    assert torch.equal(sample(), base), "detach() did not restore the pipeline"
    error, effect = (float((x - latents).norm() / latents.norm()) for x in (stored_latents, base))
    print(f"{NUM_STEPS} steps: {error:.1e} from JAX's latents, {effect:.1e} from the base model's")
    if not error <= TOLERANCE < effect:
        raise SystemExit(
            f"expected at most {TOLERANCE} from JAX's latents, and more from the base model's"
        )


if __name__ == "__main__":
    {"store": store, "check": check}[sys.argv[1]](sys.argv[2], pathlib.Path(sys.argv[3]))
