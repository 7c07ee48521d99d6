"""The training loop of all stages: data-parallel, checkpointed, resumable, seeded."""

import concurrent.futures
import pathlib
import time

import flax.serialization
import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from respodiff_jax.errors import UserError
from respodiff_jax.storage import write_whole


def load_params(workdir, name):
    """The parameters in a stage's last checkpoint; raises `UserError` if the stage has not run."""
    path = pathlib.Path(workdir) / f"{name}.msgpack"
    if not path.exists():
        raise UserError(f"{path} does not exist; run the stage {name!r} first")
    return flax.serialization.msgpack_restore(path.read_bytes())["state"]["params"]


def gradient_step(loss_fn, optimizer):
    """Makes a `step_fn` of `train_stage`, which updates `params` and `opt_state` once.

    `loss_fn` is (params, batch, step) -> (loss, metrics).
    """

    def step_fn(state, batch, step):
        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), gradient = gradient_fn(state["params"], batch, step)
        updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state}, {"loss": loss, **metrics}

    return step_fn


def train_stage(
    name, state, step_fn, batch_fn, steps, workdir, *, save_every=200, log_every=50, on_save=None
):
    """Trains a stage for `steps` steps in total, from its last checkpoint if it has one.

    Args:
      name: of the stage; its checkpoint is `<workdir>/<name>.msgpack`.
      state: initial pytree, replicated over the local devices.
      step_fn: pure, (state, batch, step) -> (state, metrics). The leaves of a batch are split over
        the local devices along their first axis.
      batch_fn: step -> pytree of numpy arrays. A function of the step alone; runs in a second
        thread.
      steps: number of steps, those before the checkpoint included.
      workdir: folder.
      save_every, log_every: steps between checkpoints and between progress lines.
      on_save: called with the state after each checkpoint.

    Returns:
      The final state.

    Raises:
      FloatingPointError: if a metric is not finite. The last checkpoint stays.
    """
    path = pathlib.Path(workdir) / f"{name}.msgpack"
    path.parent.mkdir(parents=True, exist_ok=True)
    start = 0
    if path.exists():
        saved = flax.serialization.from_bytes({"state": state, "step": 0}, path.read_bytes())
        state, start = saved["state"], int(saved["step"])
        print(f"{name}: resumed at step {start}", flush=True)
    mesh = Mesh(np.asarray(jax.local_devices()), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    replicated = NamedSharding(mesh, PartitionSpec())
    state = jax.device_put(state, replicated)
    step_fn = jax.jit(step_fn, donate_argnums=0, out_shardings=replicated)
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
                saved = {"state": jax.device_get(state), "step": done}
                write_whole(path, flax.serialization.to_bytes(saved))
                if on_save is not None:
                    on_save(state)
    return jax.device_get(state)
