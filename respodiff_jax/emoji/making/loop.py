"""The stages' training loop: data-parallel, checkpointed, resumable, seeded."""

import concurrent.futures
import pathlib
import time

import flax.serialization
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from respodiff_jax.errors import UserError
from respodiff_jax.storage import write_whole


def save_tree(path, tree):
    """Writes a pytree of arrays as msgpack; the file appears whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, flax.serialization.to_bytes(jax.device_get(tree)))


def load_tree(path, like):
    """Reads what `save_tree` wrote into the structure of `like`; ValueError if they differ."""
    return flax.serialization.from_bytes(like, pathlib.Path(path).read_bytes())


def load_params(workdir, name):
    """The parameters in a stage's last checkpoint; ValueError if that stage has not run."""
    path = pathlib.Path(workdir) / f"{name}.msgpack"
    if not path.exists():
        raise UserError(f"{path} does not exist; run the stage {name!r} first")
    return flax.serialization.msgpack_restore(path.read_bytes())["state"]["params"]


def train_stage(
    name, state, step_fn, batch_fn, steps, workdir, *, save_every=200, log_every=50, on_save=None
):
    """Runs `state, metrics = step_fn(state, batch, step)` for `steps` steps, from the last
    checkpoint if there is one.

    Args:
      name: names the checkpoint `<workdir>/<name>.msgpack` and the progress lines.
      state: initial pytree, replicated over the local devices.
      step_fn: pure; batch leaves are split over the local devices along their first axis.
      batch_fn: step -> pytree of numpy arrays; a function of the step alone, called in a second
        thread.
      steps: total number of steps.
      workdir: folder.
      save_every, log_every: steps between checkpoints and progress lines.
      on_save: called with (state, step) after each checkpoint, e.g. to export.

    Returns:
      the final state.
    """
    path = pathlib.Path(workdir) / f"{name}.msgpack"
    start = 0
    if path.exists():
        saved = load_tree(path, {"state": state, "step": 0})
        state, start = saved["state"], int(saved["step"])
        print(f"{name}: resumed at step {start}", flush=True)
    mesh = Mesh(np.asarray(jax.local_devices()), ("data",))
    split, everywhere = (
        NamedSharding(mesh, PartitionSpec("data")),
        NamedSharding(mesh, PartitionSpec()),
    )
    state = jax.device_put(state, everywhere)
    step_fn = jax.jit(step_fn, donate_argnums=0, out_shardings=everywhere)
    began, logged = time.monotonic(), start
    with concurrent.futures.ThreadPoolExecutor(1) as loader:
        upcoming = loader.submit(batch_fn, start)
        for step in range(start, steps):
            batch = jax.device_put(upcoming.result(), split)
            if step + 1 < steps:
                upcoming = loader.submit(batch_fn, step + 1)
            state, metrics = step_fn(state, batch, np.int32(step))
            done = step + 1
            logging = done % log_every == 0 or done == steps
            saving = done % save_every == 0 or done == steps
            if logging or saving:
                values = {key: float(value) for key, value in metrics.items()}
                if not all(np.isfinite(value) for value in values.values()):
                    raise FloatingPointError(f"{name}: non-finite metrics at step {step}: {values}")
            if logging:
                speed = (done - logged) / (time.monotonic() - began)
                began, logged = time.monotonic(), done
                shown = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
                print(f"{name}: step {done}/{steps}  {speed:.2f} steps/s  {shown}", flush=True)
            if saving:
                save_tree(path, {"state": state, "step": done})
                if on_save is not None:
                    on_save(state, done)
    return jax.device_get(state)
