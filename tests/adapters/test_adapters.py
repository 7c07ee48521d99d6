"""Adapter directories: round trips, PyTorch layouts, wrong files."""

import dataclasses
import json
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from respodiff_jax.adapters import (
    Adapter,
    check_fits,
    combine,
    load_adapter,
    save_adapter,
    select,
    steerings,
)
from respodiff_jax.adapters import adapter as adapter_module
from respodiff_jax.adapters.reading import reads_prompts
from respodiff_jax.backbone import random_backbone
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.modules import KINDS, MidBlockModule, steer
from respodiff_jax.method.reading import always

STORED = pathlib.Path(__file__).parents[1] / "data" / "emoji_gender" / "adapter"
SHAPE = (3, 4, 8)
WOMAN = Concept("a woman", "gender", ("a person",), target_prompt="a woman")
MAN = Concept("a man", "gender", ("a person", "someone"), target_prompt="a man", lr_sam=1e-4)
OLD = Concept("old", "age", ("a person",), target_prompt="an old person")
VIOLENCE = Concept("anti-violence", "safety", ("a scene",), unsafe_prompt="violence")
TRAINED_ON = {
    "name": "some/model",
    "revision": None,
    "variant": None,
    "unet_sha256": "0" * 64,
    "resolution": 16,
    "prediction_type": "epsilon",
}


def with_scales(adapter, *scales):
    concepts = [
        dataclasses.replace(c, default_scale=scale)
        for c, scale in zip(adapter.concepts, scales, strict=True)
    ]
    return dataclasses.replace(adapter, concepts=tuple(concepts))


def make_adapter(
    kind="constant", concepts=(WOMAN, MAN), seed=0, shape=SHAPE, hidden=None, **backbone
):
    module = MidBlockModule(kind, shape, hidden)
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return rng.standard_normal((len(concepts), *leaf.shape), np.float32)

    shapes = jax.eval_shape(module.init_params, jax.random.key(0))
    ram, sam = jax.tree.map(draw, shapes), jax.tree.map(draw, shapes)
    return Adapter(tuple(concepts), module, ram, sam, TRAINED_ON | backbone)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_keeps_all_fields_and_bytes(tmp_path, kind):
    adapter = dataclasses.replace(make_adapter(kind), training={"steps": 7})
    save_adapter(adapter, tmp_path / "first")
    loaded = load_adapter(tmp_path / "first")
    assert loaded.concepts == adapter.concepts
    assert loaded.backbone == adapter.backbone
    assert loaded.training == {"steps": 7}
    assert (loaded.module.kind, loaded.module.mid_block_shape) == (kind, SHAPE)
    jax.tree.map(
        np.testing.assert_array_equal, (loaded.ram, loaded.sam), (adapter.ram, adapter.sam)
    )
    save_adapter(loaded, tmp_path / "second")
    files = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert sorted(files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}


def test_stored_adapter_loads_and_saves_the_same_bytes(tmp_path):
    save_adapter(load_adapter(STORED), tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (STORED / file.name).read_bytes(), file.name


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_work_in_torch_as_documented(tmp_path, kind):
    adapter = make_adapter(kind)
    save_adapter(adapter, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    h_nhwc = np.random.default_rng(1).standard_normal((2, *SHAPE), np.float32)
    h_nchw = torch.from_numpy(h_nhwc).permute(0, 3, 1, 2)
    sam_of_man = {
        key.removeprefix("concepts.1.sam."): value
        for key, value in tensors.items()
        if key.startswith("concepts.1.sam.")
    }
    delta = torch_delta(sam_of_man, h_nchw).permute(0, 2, 3, 1).numpy()
    ours = adapter.module.delta(jax.tree.map(lambda leaf: leaf[1], adapter.sam), h_nhwc)
    np.testing.assert_allclose(delta, np.broadcast_to(ours, delta.shape), atol=2e-5)


def torch_delta(tensors, h):
    """`T(h)` of one concept's RAM or SAM, as documented; `h` is (B, C, H, W)."""
    if "constant" in tensors:
        return tensors["constant"][None].expand_as(h)
    weights = [
        tensors[f"{layer}.{name}"] for layer in ("hidden", "out") for name in ("weight", "bias")
    ]
    if weights[0].ndim == 4:
        hidden = torch.nn.functional.conv2d(h, *weights[:2], padding=1)
        return torch.nn.functional.conv2d(torch.nn.functional.silu(hidden), *weights[2:], padding=1)
    hidden = torch.nn.functional.linear(h.movedim(1, -1), *weights[:2])
    out = torch.nn.functional.linear(torch.nn.functional.silu(hidden), *weights[2:])
    return out.movedim(-1, 1)


def test_config_describes_the_adapter(tmp_path):
    twins = dataclasses.replace(WOMAN, name="A Woman!")
    save_adapter(make_adapter("mlp", (WOMAN, twins, VIOLENCE)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["format_version"] == 1
    assert config["module"] == {
        "kind": "mlp",
        "mid_block_shape": {"channels": 8, "height": 3, "width": 4},
        "hidden_channels": 2,
    }
    assert config["guidance"]["steered_half"] == "conditional"
    assert config["backbone"] == TRAINED_ON
    assert [entry["slug"] for entry in config["concepts"]] == [
        "a-woman",
        "a-woman-2",
        "anti-violence",
    ]
    assert config["concepts"][2]["unsafe_prompt"] == "violence"


def test_float16_weights_are_read_as_float32(tmp_path):
    adapter = make_adapter()
    save_adapter(adapter, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({k: v.astype(np.float16) for k, v in tensors.items()}, path)
    loaded = load_adapter(tmp_path)
    assert loaded.ram["constant"].dtype == np.float32
    np.testing.assert_allclose(loaded.ram["constant"], adapter.ram["constant"], rtol=1e-3)


def edit_config(change):
    def edit(folder):
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return edit


def edit_tensors(change):
    def edit(folder):
        path = folder / "adapter_model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        change(tensors)
        safetensors.numpy.save_file(tensors, path)

    return edit


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


class Explosive:
    def __reduce__(self):
        return pytest.fail, ("the pickle was executed",)


def put_pickle(folder):
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(Explosive()))


RAM_0 = "concepts.0.ram.constant"
METRIC = dict.fromkeys(("metric", "attribute", "images", "n", "interval")) | {"value": 0.5}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff{"), "read as UTF-8"),
        (
            lambda folder: (folder / "adapter_config.json").write_text('{"a": 1, "a": 2}'),
            r"keys \['a'\] more than once",
        ),
        (truncate, "damaged or truncated"),
        (put_pickle, "not a whole safetensors file"),
        (edit_config(lambda c: c.update(format="lora")), "respodiff-adapter"),
        (edit_config(lambda c: c.update(format_version=4)), "update respodiff_jax"),
        (edit_config(lambda c: c.update(format_version="1")), "format_version is '1'"),
        (edit_config(lambda c: c.pop("guidance")), r"missing: \['guidance'\]"),
        (edit_config(lambda c: c.update(note=1)), r"extra: \['note'\]"),
        (edit_config(lambda c: c.update(module=None)), "module is None, expected a mapping"),
        (edit_config(lambda c: c["module"].update(kind="lora")), "module kind is 'lora'"),
        (edit_config(lambda c: c["module"].update(kind="mlp+conv")), "module kind is 'mlp.conv'"),
        (edit_config(lambda c: c["module"]["mid_block_shape"].update(width=0)), "width is 0"),
        (
            edit_config(lambda c: c["module"]["mid_block_shape"].update(width=2**63)),
            "has 19 digits",
        ),
        (edit_config(lambda c: c["module"].update(mid_block_shape=[8, 3, 4])), "expected a mapp"),
        (edit_config(lambda c: c["module"].update(hidden_channels="2")), "hidden_channels is '2'"),
        (edit_config(lambda c: c["backbone"].pop("name")), r"missing: \['name'\]"),
        (
            edit_config(lambda c: c["backbone"].update(name=5)),
            "backbone name is 5, expected a text",
        ),
        (
            edit_config(lambda c: c["backbone"].update(unet_sha256=5)),
            "unet_sha256 is 5, expected a text",
        ),
        (
            edit_config(lambda c: c["backbone"].update(revision=[])),
            r"revision is \[\], expected a text",
        ),
        (edit_config(lambda c: c.update(training="long")), "training is 'long'"),
        (edit_config(lambda c: c.update(training={"x": float("nan")})), "NaN is not finite"),
        (edit_config(lambda c: c.update(training={"x": "\ud800"})), "half of a surrogate pair"),
        (edit_config(lambda c: c.update(concepts={})), "concepts is {}, expected a list"),
        (edit_config(lambda c: c.update(concepts=[5])), "concept is 5, expected a mapping"),
        (edit_config(lambda c: c.update(metrics=5)), "metrics is 5, expected a list"),
        (edit_config(lambda c: c.update(metrics=[5])), "entry is 5, expected a mapping"),
        (edit_config(lambda c: c.update(metrics=[METRIC])), "metric is None, expected a text"),
        (edit_config(lambda c: c.update(metrics=[{"value": 1}])), "metrics does not have the exp"),
        (edit_config(lambda c: c.update(metrics=[METRIC | {"value": "high"}])), "not finite"),
        (edit_config(lambda c: c.update(metrics=[METRIC | {"interval": [0]}])), "not finite"),
        (
            edit_config(lambda c: c["concepts"][0].update(default_scale="1")),
            r"default_scale is '1', expected a finite number",
        ),
        (
            edit_config(lambda c: c["concepts"][0].update(default_scale=10**400)),
            "has 401 digits",
        ),
        (
            edit_config(lambda c: c["concepts"][0].update(group="\ud800")),
            "half of a surrogate pair",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("[" * 10**5), "is not JSON"),
        (
            edit_config(lambda c: c["guidance"].update(steered_half="both")),
            "steered_half is 'both",
        ),
        (edit_config(lambda c: c["concepts"][0].update(colour=1)), "unknown fields"),
        (
            edit_config(lambda c: c["concepts"][0].update(lr_ram="high")),
            "lr_ram is 'high', expected zero or a positive number",
        ),
        (edit_config(lambda c: c["concepts"][0].update(lr_ram=10**400)), "has 401 digits"),
        (edit_config(lambda c: c["concepts"][0].update(neutral_prompts=5)), "neutral_prompts is 5"),
        (edit_config(lambda c: c["concepts"][0].update(name="a man")), "duplicates"),
        (edit_config(lambda c: c.update(concepts=[])), "no concepts"),
        (edit_config(lambda c: c["concepts"].pop()), "extra: .*concepts.1.ram.constant"),
        (edit_tensors(lambda t: t.pop(RAM_0)), "missing: .*concepts.0.ram.constant"),
        (edit_tensors(lambda t: t.update(x=t[RAM_0])), r"extra: \['x'\]"),
        (edit_tensors(lambda t: t.update({RAM_0: t[RAM_0][:-1]})), r"F32 \(7, 3, 4\), expected"),
        (edit_tensors(lambda t: t.update({RAM_0: t[RAM_0].astype(int)})), "is I64"),
        (
            edit_tensors(lambda t: t[RAM_0].fill(np.nan)),
            "concept 'a woman': ram.constant holds NaN",
        ),
    ],
)
def test_wrong_files_are_refused(tmp_path, damage, message):
    save_adapter(make_adapter(), tmp_path)
    load_adapter(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load_adapter(tmp_path)


def test_a_fault_of_the_code_is_not_reported_as_a_wrong_file(tmp_path, monkeypatch):
    save_adapter(make_adapter(), tmp_path)
    monkeypatch.setattr(adapter_module, "read_weights", lambda *_: len(5))
    with pytest.raises(TypeError):
        load_adapter(tmp_path)


def test_missing_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not an adapter directory"):
        load_adapter(tmp_path / "nowhere")


def test_parameters_must_fit_module_and_concepts():
    adapter = make_adapter()
    with pytest.raises(UserError, match=r"ram.constant has shape \(2, 3, 4, 8\), expected \(1, 3"):
        dataclasses.replace(adapter, concepts=(WOMAN,))
    with pytest.raises(UserError, match=r"missing: .*hidden\.bias"):
        dataclasses.replace(adapter, module=MidBlockModule("mlp", SHAPE))


def test_steering_scales_ram_and_sam():
    (steering,) = steerings(make_adapter(), [[1.0, 0.5]])
    for scale in (steering.ram_scale, steering.sam_scale):
        np.testing.assert_array_equal(scale, jnp.array([[1.0, 0.5]]))
    with pytest.raises(UserError, match=r"\(1, 3\), expected \(batch, 2\)"):
        steerings(make_adapter(), [[1.0, 0.5, 1.0]])


def test_combine_puts_concepts_after_each_other(tmp_path):
    gender, safety = make_adapter("mlp"), make_adapter("mlp", (VIOLENCE,), seed=1)
    both = combine([gender, safety])
    assert both.names == ("a woman", "a man", "anti-violence")
    for role in ("ram", "sam"):
        kernel = getattr(both, role)["hidden"]["kernel"]
        np.testing.assert_array_equal(kernel[2], getattr(safety, role)["hidden"]["kernel"][0])
        np.testing.assert_array_equal(kernel[:2], getattr(gender, role)["hidden"]["kernel"])
    assert combine([gender]) is gender
    # What the parts were trained alike with stays.
    parts = [dataclasses.replace(part, training={"steps": 7}) for part in (gender, safety)]
    assert combine(parts).training == {"steps": 7} and both.training is None
    assert combine([parts[0], safety]).training is None
    # The width of None and the same width by number are one thing.
    save_adapter(safety, tmp_path)
    assert combine([gender, load_adapter(tmp_path)]).names == both.names


@pytest.mark.parametrize("kinds", [("constant", "mlp", "conv"), ("mlp", "mlp", "constant")])
def test_concepts_of_several_kinds_and_widths_steer_together(kinds):
    parts = [
        make_adapter(kinds[0]),
        make_adapter(kinds[1], (VIOLENCE,), 1, hidden=5),
        make_adapter(kinds[2], (OLD,), 2),
    ]
    h = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    weights = np.array([[1.0, 0.5, 2.0, 0.7], [0.3, 1.0, 0.0, 1.5]])

    def deltas(adapter, columns):
        modules = [part.module for part in adapter.parts]
        return steer(modules, steerings(adapter, weights[:, columns]), np.zeros(2), h) - h

    expected = deltas(parts[0], [0, 1]) + deltas(parts[1], [2]) + deltas(parts[2], [3])
    for order in ((0, 1, 2), (2, 0, 1)):
        together = combine([parts[part] for part in order])
        columns = [("a woman", "a man", "anti-violence", "old").index(n) for n in together.names]
        np.testing.assert_allclose(deltas(together, columns), expected, atol=1e-5)
    one = select(together, ["anti-violence"])
    np.testing.assert_allclose(deltas(one, [2]), deltas(parts[1], [2]), atol=1e-5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_adapter(concepts=(VIOLENCE,), shape=(4, 4, 8)), "mid-block shapes"),
        (make_adapter(concepts=(MAN,)), "'a man' and 'a man' are duplicates"),
    ],
)
def test_concatenate_refuses_what_does_not_go_together(other, message):
    with pytest.raises(UserError, match=message):
        combine([make_adapter(), other])


@pytest.fixture(scope="module")
def backbone():
    return random_backbone("tiny", abstract=True)


def test_check_fits_compares_mid_blocks_and_prediction_types(backbone):
    own = dict(backbone.identity) | {"resolution": 16}
    check_fits(make_adapter(shape=(4, 4, 64), **own), backbone, 16)
    with pytest.raises(UserError, match=r"\(4, 4, 64\).*\(8, 8, 64\); generate at resolution 16"):
        check_fits(make_adapter(shape=(4, 4, 64), **own), backbone, 32)
    # mlp and conv work on each position's channels, at any resolution.
    conv = make_adapter("conv", shape=(4, 4, 64), **own)
    check_fits(conv, backbone, 32)
    with pytest.raises(UserError, match="generate at resolution 16"):
        constant = make_adapter("constant", (VIOLENCE,), shape=(4, 4, 64), **own)
        check_fits(combine([conv, constant]), backbone, 32)
    with pytest.raises(UserError, match=r"use the model that it was trained on, random/tiny"):
        check_fits(make_adapter("mlp", shape=(4, 4, 32), **own), backbone, 16)
    # Like SD 1.4 and SDXL: the same number of channels, but one halves its latents once more.
    with pytest.raises(UserError, match=r"use the model that it was trained on, random/tiny"):
        check_fits(make_adapter("mlp", shape=(4, 4, 64), **own | {"resolution": 32}), backbone, 16)
    with pytest.raises(UserError, match="'v_prediction', but random/tiny predicts 'epsilon'"):
        v_prediction = own | {"prediction_type": "v_prediction"}
        check_fits(make_adapter(shape=(4, 4, 64), **v_prediction), backbone, 16)
    with pytest.warns(UserWarning, match="some/model, whose UNet weights differ from"):
        check_fits(make_adapter(shape=(4, 4, 64)), backbone, 16)


def test_saving_replaces_an_older_adapter(tmp_path):
    save_adapter(make_adapter("conv"), tmp_path)
    save_adapter(make_adapter("constant"), tmp_path)
    assert load_adapter(tmp_path).module.kind == "constant"
    assert len(list(tmp_path.iterdir())) == 2


def test_safety_concepts_alone_read_no_prompt():
    both = dataclasses.replace(make_adapter(concepts=(WOMAN, VIOLENCE)), reading=always(2, 8))
    assert reads_prompts(both) and reads_prompts(select(both, ["a woman"]))
    safety = select(both, ["anti-violence"])
    assert safety.reading is not None and not reads_prompts(safety)
