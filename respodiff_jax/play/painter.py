"""Draws pictures step by step, so that a drawing can be watched and stopped.

Prompts, seeds, weights, number of steps and guidance are arguments of one compiled step: no control
of the page compiles anything, except for the first use of the sampler "dpm++". The step is
`generation.sampling.sampling_step`, so the pictures are those of `respodiff generate`; a value of a
pixel may differ by 1 of 255.
"""

import dataclasses
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from respodiff_jax.adapters import Adapter, CombinedAdapter, steerings
from respodiff_jax.adapters.reading import read_contexts, reads_prompts
from respodiff_jax.backbone import Backbone
from respodiff_jax.errors import UserError
from respodiff_jax.generation.sampling import (
    SamplerOptions,
    default_batch_size,
    initial_noise,
    sampling_step,
)
from respodiff_jax.method.modules import Steering
from respodiff_jax.method.schedule import Schedule

# Larger batches would stop later and show fewer pictures early.
_MAX_PER_DEVICE = 8
_KEPT_PROMPTS, _KEPT_BYTES = 64, 64 * 2**20
_WAIT = 0.1  # seconds between checks of `should_stop` while waiting for a turn


class Job(NamedTuple):
    """A picture to draw.

    Attributes:
      prompt: the prompt.
      seed: of its noise, 0 .. 2^32-1.
      weights: the weight of each concept of the adapter; () or zeros for the base model.
      steer_always: whether the concepts steer at every timestep.
    """

    prompt: str
    seed: int
    weights: tuple[float, ...] = ()
    steer_always: bool = False


class Text(NamedTuple):
    """A prompt as the model reads it.

    Attributes:
      cond: its conditioning, leading axis 1, numpy.
      is_too_long: whether the text encoder does not read the whole prompt.
    """

    cond: Any
    is_too_long: bool


class Painter:
    """Draws pictures with one model and one adapter, for any number of threads.

    Threads take turns batch by batch. Recent pictures are kept, so a slider that comes back shows
    its picture at once.

    Args:
      model: with its parameters.
      adapter: the concepts, or None for the base model alone.
      resolution: of the square pictures, in pixels.

    Attributes:
      model, adapter, resolution: the same.
      batch_size: pictures at a time over all devices.
      compiled: number of programs compiled so far.
    """

    def __init__(self, model: Backbone, adapter: Adapter | CombinedAdapter | None, resolution: int):
        self.model, self.adapter, self.resolution = model, adapter, resolution
        devices = jax.local_device_count()
        per_device = default_batch_size(_MAX_PER_DEVICE * devices, devices, resolution) // devices
        self.batch_size = min(per_device, _MAX_PER_DEVICE) * devices
        self._mesh = Mesh(np.asarray(jax.local_devices()), ("data",))
        self._by_image = NamedSharding(self._mesh, PartitionSpec("data"))
        self._replicated = NamedSharding(self._mesh, PartitionSpec())
        self._params = jax.device_put(model.params, self._replicated)
        parts = adapter.parts if adapter else ()
        self._modules = jax.device_put([(p.ram, p.sam) for p in parts], self._replicated)
        # Dropped, so that the programs do not keep the weights alive.
        self._functions = dataclasses.replace(model, params={}, load=None)
        self._turn = threading.Lock()  # held while a batch is drawn
        self._cache_lock = threading.Lock()  # held while texts are read, and for what is kept
        self._prompts: OrderedDict[str, Text] = OrderedDict()
        self._pictures: OrderedDict[tuple, np.ndarray] = OrderedDict()
        self._steps: dict[str, Callable] = {}
        self._decode = jax.jit(self._decoded)

    @property
    def compiled(self) -> int:
        return sum(step._cache_size() for step in (*self._steps.values(), self._decode))

    def read(self, prompt: str) -> Text:
        """What the model reads in a prompt; recent prompts are kept."""
        with self._cache_lock:
            return self._encoded(prompt)

    def decisions(self, prompts: Sequence[str]) -> np.ndarray | None:
        """The adapter's decisions on prompts, as `read_prompts`; None if it reads none.

        Raises:
          UserError: if the adapter reads text states of another size than the model's.
        """
        if self.adapter is None or not reads_prompts(self.adapter):
            return None
        contexts = [self.read(prompt).cond.context for prompt in prompts]
        return read_contexts(self.adapter, np.concatenate(contexts))

    def draw(
        self,
        jobs: Sequence[Job],
        options: SamplerOptions,
        should_stop: Callable[[], bool] = lambda: False,
        on_step: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Draws pictures; equal jobs are drawn once.

        Args:
          jobs: the pictures.
          options: steps, sampler, guidance and negative prompt; the other fields are not used.
          should_stop: asked before each step; the drawing ends when it is true.
          on_step: is told the number of steps done and in total.

        Yields:
          The index of a job and its picture, uint8 `(height, width, 3)`; batch by batch.

        Raises:
          UserError: if the sampler does not have so many steps, or a picture has values that are
            not finite.
        """
        schedule = Schedule.from_config(
            self.model.scheduler_config, options.num_steps, options.sampler
        )
        how = dataclasses.astuple(options)
        places: dict[tuple, list[int]] = {}
        for i, job in enumerate(jobs):
            weights = job.weights if any(job.weights) else ()
            places.setdefault((how, *job._replace(weights=weights)), []).append(i)
        for key in list(places):
            if (picture := self._kept(key)) is not None:
                yield from ((i, picture) for i in places.pop(key))
        todo = list(places)
        size, total = self.batch_size, -(-len(places) // self.batch_size) * options.num_steps
        done = 0
        while todo:
            while not self._turn.acquire(timeout=_WAIT):
                if should_stop():
                    return
            try:
                # Another drawing may have had the same pictures.
                ready = {key: found for key in todo if (found := self._kept(key)) is not None}
                todo = [key for key in todo if key not in ready]
                batch, todo = todo[:size], todo[size:]
                if batch:
                    drawn = [jobs[places[key][0]] for key in batch]
                    drawn += drawn[-1:] * (size - len(drawn))
                    pictures = self._batch(
                        drawn,
                        schedule,
                        options,
                        should_stop,
                        lambda step, done=done: on_step(done + step, total),
                    )
                    if pictures is None:
                        return
                    ready |= zip(batch, pictures, strict=False)
                    done += options.num_steps
            finally:
                self._turn.release()
            for key, picture in ready.items():
                self._keep(key, picture)
                yield from ((i, picture) for i in places[key])

    def _batch(self, jobs, schedule, options, should_stop, tell) -> np.ndarray | None:
        """The pictures of a batch, or None if it was stopped."""
        cond = [self.read(job.prompt).cond for job in jobs]
        cond = jax.device_put(jax.tree.map(lambda *x: np.concatenate(x), *cond), self._by_image)
        uncond = jax.device_put(self.read(options.negative_prompt).cond, self._replicated)
        noise = initial_noise([job.seed for job in jobs], self.model.latent_shape(self.resolution))
        start = schedule.initial_scale * noise
        latents = jax.device_put((start, jnp.zeros_like(start)), self._by_image)
        steered = self._steered(jobs)
        guidance = np.float32(options.guidance_scale)
        step = self._step(schedule)
        for index in range(schedule.num_steps):
            if should_stop():
                return None
            levels = _levels(schedule, index)
            latents = step(self._params, latents, levels, cond, uncond, steered, guidance)
            jax.block_until_ready(latents)
            tell(index + 1)
        pictures, is_finite = jax.device_get(self._decode(self._params, latents[0]))
        if not is_finite.all():
            raise UserError(
                "a picture has values that are not finite: the weights hold such values, or"
                " overflow in this dtype. Check the model and the adapter, and draw in float32"
            )
        return pictures

    def _steered(self, jobs) -> tuple[Steering, ...]:
        if self.adapter is None:
            return ()
        none = (0.0,) * len(self.adapter.concepts)
        chosen = steerings(self.adapter, [job.weights or none for job in jobs])
        always = np.array([[job.steer_always] for job in jobs])

        def limit(max_timestep):
            return np.where(always, np.float32(np.inf), max_timestep)

        own = [(s.ram_scale, s.sam_scale, jax.tree.map(limit, s.max_timestep)) for s in chosen]
        placed = zip(self._modules, jax.device_put(own, self._by_image), strict=True)
        return tuple(Steering(*modules, *scales) for modules, scales in placed)

    def _step(self, schedule: Schedule) -> Callable:
        """The compiled step; samplers other than "dpm++" have the same."""
        sampler = "dpm++" if schedule.sampler == "dpm++" else "ddim"
        if sampler in self._steps:
            return self._steps[sampler]
        modules = tuple(part.module for part in (self.adapter.parts if self.adapter else ()))

        def step(params, latents, levels, cond, uncond, steered, guidance_scale):
            uncond = jax.tree.map(lambda u, c: jnp.broadcast_to(u, c.shape), uncond, cond)
            at = dataclasses.replace(schedule, sampler=sampler, **levels)
            return sampling_step(
                self._functions,
                modules,
                at,
                params,
                latents,
                1,
                cond,
                uncond,
                steered,
                jnp.maximum(guidance_scale, 1.0),
            )

        by_image, replicated = PartitionSpec("data"), PartitionSpec()
        steering = Steering(replicated, replicated, by_image, by_image, by_image)
        steered = (steering,) * len(modules)
        specs = (replicated, by_image, replicated, by_image, replicated, steered, replicated)
        self._steps[sampler] = jax.jit(
            jax.shard_map(
                step, mesh=self._mesh, in_specs=specs, out_specs=by_image, check_vma=False
            )
        )
        return self._steps[sampler]

    def _decoded(self, params, z_0):
        images = self._functions.decode_latents(params, z_0)
        is_finite = jnp.all(jnp.isfinite(images), axis=(1, 2, 3))
        return jnp.round(images * 255).astype(jnp.uint8), is_finite

    def _encoded(self, prompt: str) -> Text:
        if prompt not in self._prompts:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                cond = self.model.encode_prompts([prompt], self.resolution, self._params)
            too_long = any("the text encoder reads" in str(w.message) for w in caught)
            self._prompts[prompt] = Text(jax.device_get(cond), too_long)
            if len(self._prompts) > _KEPT_PROMPTS:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(prompt)
        return self._prompts[prompt]

    def _kept(self, key: tuple) -> np.ndarray | None:
        with self._cache_lock:
            if key in self._pictures:
                self._pictures.move_to_end(key)
            return self._pictures.get(key)

    def _keep(self, key: tuple, picture: np.ndarray) -> None:
        with self._cache_lock:
            self._pictures[key] = picture
            while sum(p.nbytes for p in self._pictures.values()) > _KEPT_BYTES:
                self._pictures.popitem(last=False)


def _levels(schedule: Schedule, index: int) -> dict[str, np.ndarray]:
    """A schedule's noise levels before and at a step, which is at index 1."""
    at = [max(index - 1, 0), index]
    return {
        "timesteps": schedule.timesteps[at].astype(np.float32),
        "alpha_bars": schedule.alpha_bars[at],
        "next_alpha_bars": schedule.next_alpha_bars[at],
    }
