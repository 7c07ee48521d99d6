"""Estimates of memory, made before anything is compiled."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import respodiff_jax as rd
from respodiff_jax.backbone import memory, random_backbone
from respodiff_jax.backbone.attention import attention
from respodiff_jax.backbone.memory import available_bytes, estimate_bytes, report_memory

X = jax.ShapeDtypeStruct((256, 256), jnp.float32)
SIZE = 256 * 256 * 4


@pytest.mark.parametrize(
    ("function", "arrays"),
    [
        (lambda x: jnp.sin(jnp.cos(x)), 1),  # the second result overwrites the first
        (lambda x: x @ (x @ x), 2),
        (lambda x: (x @ x) + jnp.broadcast_to(x[:1], x.shape), 1),  # a broadcast takes no memory
        (lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c @ c), None), x, length=9)[0], 2),
        (lambda x: sum(jnp.sin(i * x) @ x for i in range(5)), 3),
    ],
)
def test_estimate_counts_what_is_alive_at_once(function, arrays):
    assert estimate_bytes(function, X) == pytest.approx(arrays * SIZE, rel=0.02)


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
def test_estimate_is_near_what_the_compiler_needs(implementation):
    """For the gradient of an attention over a long sequence."""
    x = jax.ShapeDtypeStruct((1, 2048, 2, 16), jnp.float32)
    attend = partial(attention, scale=0.25, implementation=implementation)

    def gradient(*args):
        return jax.vjp(attend, *args[:3])[1](args[3])

    compiled = jax.jit(gradient).lower(x, x, x, x).compile().memory_analysis()
    ratio = estimate_bytes(gradient, x, x, x, x) / compiled.temp_size_in_bytes
    assert 0.5 < ratio < 2


def test_free_memory_is_shared_by_the_devices_of_the_cpu():
    machine = available_bytes() * jax.local_device_count()
    assert 2**28 < machine < 2**45


def test_short_memory_is_a_warning_that_says_what_to_change(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 3 * 2**30)
    needed = {"the model": 2**30, "sampling": 5 * 2**29}
    with pytest.warns(UserWarning, match=r"about 3.5 GiB .*3.0 GiB are free.*killed; lower x"):
        report_memory(needed, "lower x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "1.0 GiB a device (the model 1.0)" in report_memory({"the model": 2**30}, "")


def test_train_and_generate_warn_before_weights_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**20)

    def loaded(self):
        raise InterruptedError

    monkeypatch.setattr("respodiff_jax.backbone.Backbone.loaded", loaded)
    config = rd.load_config("configs/smoke.py", log={"grid_every": 0})
    short = "free. The process may be killed; "
    with (
        pytest.warns(UserWarning, match=f"{short}set train.concepts_per_device to 1"),
        pytest.raises(InterruptedError),
    ):
        rd.train(config, tmp_path / "run")
    assert "memory: about 0.0 GiB a device (the model" in capsys.readouterr().out
    model = random_backbone("tiny", abstract=True)
    with (
        pytest.warns(UserWarning, match=rf"{short}lower `batch_size` \(now 8\)"),
        pytest.raises(InterruptedError),
    ):
        rd.generate(model, "a man")
