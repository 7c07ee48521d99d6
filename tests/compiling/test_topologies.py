"""Names of TPU slices, and opening them; `pytest -m tpu_compile` opens them with libtpu."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from respodiff_jax.compiling import analysis, topologies
from respodiff_jax.errors import UserError

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed: pip install -e ".[tpu]"',
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5litepod-16", "unknown chip 'v5litepod-16'; expected CHIP:SHAPE with one of v4, v5e"),
        ("v5:4x4", "one of v4, v5e, v5p, v6e, for example v5e:4x4"),
        ("v5e", "v5e has no slice ''; expected 2 sides with at most 256 chips, such as 1x1"),
        ("v5e:4x4x4", "no slice '4x4x4'; expected 2 sides"),
        ("v4:4x4", "no slice '4x4'; expected 3 sides with at most 4096 chips, such as 2x2x1"),
        ("v5e:32x32", "no slice '32x32'"),
        ("v6e:0x4", "no slice '0x4'"),
    ],
)
def test_unknown_topologies_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        topologies.open_topology(name)


def test_topology_names_are_parsed():
    assert topologies.parse_topology("v4:2x2x4") == (topologies.CHIPS["v4"], (2, 2, 4))
    for chip in topologies.CHIPS.values():
        for slice_ in chip.slices:
            assert topologies.parse_topology(f"{chip.name}:{slice_}")[0] is chip


def test_open_topology_makes_each_chip_one_device(monkeypatch):
    asked = []

    def get_topology_desc(**options):
        asked.append(options)
        if options["topology_name"] == "v5e:3x3":
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: not divisible")
        if options["topology_name"] == "v5e:4x4":
            raise jax.errors.JaxRuntimeError("ABORTED: libtpu multi-process lockfile")
        return type("Found", (), {"devices": jax.devices()})

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topologies.topologies, "get_topology_desc", get_topology_desc)
    found = topologies.open_topology("v4:2x2x2")
    assert found.devices == tuple(jax.devices()) and found.chip.flops == 275e12
    topologies.open_topology("v6e:1x1")
    assert [sorted(set(options) - {"platform", "topology_name"}) for options in asked] == [
        ["chip_config_name"],
        ["chips_per_host_bounds"],
    ]
    with pytest.raises(UserError, match=r"'v5e:3x3' is refused by the compiler \(INVALID"):
        topologies.open_topology("v5e:3x3")
    with pytest.raises(UserError, match="another process uses libtpu"):
        topologies.open_topology("v5e:4x4")


def test_missing_libtpu_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs the package libtpu.*pip install -e "\.\[tpu\]"'):
        topologies.open_topology("v5e:4x4")


@pytest.mark.tpu_compile
@needs_libtpu
@pytest.mark.parametrize(
    ("name", "count"),
    [("v4:2x2x2", 8), ("v5e:1x1", 1), ("v5e:4x4", 16), ("v5p:2x2x1", 4), ("v6e:2x2", 4)],
)
def test_each_device_is_a_chip_with_its_memory(name, count, no_metadata_server):
    topology = topologies.open_topology(name)
    assert len(topology.devices) == count
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    x = jax.ShapeDtypeStruct((200, 2**30), jnp.bfloat16, sharding=sharding)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(lambda x: x + 1).lower(x).compile()
    assert f"available HBM ({topology.chip.hbm / 2**30:.2f}G)" in str(error.value)
    assert analysis._out_of_memory(str(error.value)).required == 800 * 2**30


@pytest.mark.tpu_compile
@needs_libtpu
def test_slices_unknown_to_the_compiler_are_refused(no_metadata_server):
    with pytest.raises(UserError, match="'v5e:3x3' is refused by the compiler"):
        topologies.open_topology("v5e:3x3")
