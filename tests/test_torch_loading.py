"""The PyTorch adapter without pipelines: quotas, refused files, imports."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_adapters import (
    MAN,
    RAM_0,
    VIOLENCE,
    WOMAN,
    edit_config,
    edit_tensors,
    make_adapter,
    put_pickle,
    truncate,
    with_scales,
)

from respodiff_jax import torch_adapter
from respodiff_jax.adapters import save_adapter
from respodiff_jax.generation.selection import fair_assignment
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.modules import KINDS
from respodiff_jax.torch_adapter import RespoDiffAdapter

OLD = Concept("old", "age", ("a person",), target_prompt="an old person")
ELEMENTS = [
    Concept(name, "element", ("a place",), target_prompt=name)
    for name in ("earth", "water", "air", "fire")
]


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(make_adapter("constant", (WOMAN, MAN, VIOLENCE, OLD, *ELEMENTS)), folder)
    return RespoDiffAdapter.from_pretrained(folder)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.29, 0.71), (1.0, 0.0), (0.33, 0.67)])
@pytest.mark.parametrize(("images", "prompts"), [(1, 1), (7, 3), (100, 1), (3, 10), (1, 9)])
def test_fair_quotas_equal_those_of_flax(adapter, shares, images, prompts):
    ratio = dict(zip(("a woman", "a man"), shares, strict=True))
    generator = torch.Generator().manual_seed(1)
    picks = adapter.fair("gender", images, prompts, ratio=ratio, generator=generator)
    flax = fair_assignment(images, prompts, shares, seed=0)
    counts = [picks.count(name) for name in ratio]
    if 0.5 not in shares:  # ties are broken at random
        assert counts == np.bincount(flax.reshape(-1), minlength=2).tolist()
    assert all(
        abs(n - share * images * prompts) < 1 for n, share in zip(counts, shares, strict=True)
    )
    for start in range(0, len(picks), images):
        women = picks[start : start + images].count("a woman")
        assert abs(women - shares[0] * images) < 1
    columns = adapter._weights[:, [adapter.names.index(pick) for pick in ("a woman", "a man")]]
    assert columns.tolist() == [[float(p == "a woman"), float(p == "a man")] for p in picks]


@pytest.mark.parametrize("shares", [(0.25,) * 4, (0.1, 0.2, 0.3, 0.4), (0.45, 0.45, 0.1, 0)])
@pytest.mark.parametrize(("images", "prompts"), [(7, 3), (3, 10), (5, 4)])
def test_fair_spreads_the_remainder_over_the_prompts(adapter, shares, images, prompts):
    names = [concept.name for concept in ELEMENTS]
    picks = adapter.fair("element", images, prompts, ratio=dict(zip(names, shares, strict=True)))
    assert len(picks) == images * prompts
    for name, share in zip(names, shares, strict=True):
        assert abs(picks.count(name) - share * images * prompts) < 1
        for start in range(0, len(picks), images):
            assert abs(picks[start : start + images].count(name) - share * images) < 1


def test_fair_is_random_and_repeatable_with_a_generator(adapter):
    def draw(seed):
        return adapter.fair("gender", 40, generator=torch.Generator().manual_seed(seed))

    assert draw(0) == draw(0) != draw(1)
    assert adapter.fair("gender", 40) != adapter.fair("gender", 40)


def test_choices_of_different_concepts_add_up(adapter):
    adapter.set_concepts({"old": 0.5})
    picks = adapter.fair("gender", 4, scale=0.6)
    adapter.safe(2.0)
    expected = [[0.6 * (p == "a woman"), 0.6 * (p == "a man"), 2.0, 0.5] for p in picks]
    np.testing.assert_allclose(adapter._weights[:, :4], expected)
    adapter.fair("gender", 2)  # for another number of images
    assert len(adapter._weights) == 2 and (adapter._weights[:, 2:4] == torch.tensor([2, 0.5])).all()
    adapter.set_concepts([{"old": 1.0}, {}])
    with pytest.raises(ValueError, match=r"chosen for 2 images, but these are for 4; call set_c"):
        adapter.fair("gender", 4)
    adapter.set_concepts({})
    assert not adapter.active


def test_choices_hold_only_for_their_number_of_images(adapter):
    h = torch.zeros(3, 8, 3, 4)
    adapter.set_concepts({"old": 1.0})
    assert adapter.delta(h).shape == (1, 8, 3, 4)  # for any number of images
    for choose in (
        lambda: adapter.set_concepts([{"old": 1.0}]),
        lambda: adapter.fair("gender", 1),
        lambda: (adapter.fair("gender", 1), adapter.safe()),
    ):
        choose()
        assert len(adapter.delta(h[:1])) == 1
        with pytest.raises(ValueError, match="chosen for 1 images, but the batch has 3"):
            adapter.delta(h)


@pytest.mark.parametrize("kind", KINDS)
def test_deltas_are_float32_under_autocast(tmp_path, kind):
    save_adapter(make_adapter(kind), tmp_path)
    adapter = RespoDiffAdapter.from_pretrained(tmp_path)
    adapter.set_concepts({"a woman": 1.0, "a man": 0.3})
    h = torch.randn(2, 8, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = adapter.delta(h)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(adapter.delta(h), expected, rtol=0, atol=0)


def test_default_scales_are_used(tmp_path):
    save_adapter(with_scales(make_adapter(), 0.8, 0.5), tmp_path)
    adapter = RespoDiffAdapter.from_pretrained(tmp_path)
    adapter.fair("gender", 2)
    np.testing.assert_allclose(adapter._weights.sum(0), [0.8, 0.5])
    adapter.set_concepts([{"a man": None}, {"a woman": None, "a man": 2.0}, {}])
    np.testing.assert_allclose(adapter._weights, [[0, 0.5], [0.8, 2.0], [0, 0]])


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (
            lambda a: a.set_concepts({"a cat": 1}),
            "'a cat' is not in the adapter. It has gender: a w",
        ),
        (lambda a: a.set_concepts({"a man": float("nan")}), "scale of 'a man' is nan"),
        (lambda a: a.set_concepts({"a man": 10**400}), "scale of 'a man' is 1000"),
        (lambda a: a.set_concepts({"a man": 1e39}), "scale of 'a man' is 1e.39, expected a finite"),
        (lambda a: a.safe("2"), "scale is '2', expected a finite number"),
        (lambda a: a.set_concepts([]), "concepts is empty"),
        (lambda a: a.fair("race", 2), "no group 'race'"),
        (lambda a: a.fair("safety", 2), "use safe()"),
        (lambda a: a.fair("age", 2), "only 'old', nothing to balance"),
        (lambda a: a.fair("gender", 0), "num_images_per_prompt is 0"),
        (lambda a: a.fair("gender", 1, num_prompts=0), "num_prompts 0"),
        (lambda a: a.fair("gender", 2, ratio={"old": 1}), r"`ratio` names \['old'\], but group"),
        (lambda a: a.fair("gender", 2, ratio={"a man": 0.4}), "`ratio` sums to 0.4"),
        (lambda a: a.fair("gender", 2, ratio={"a man": 2, "a woman": -1}), "shares of 0 or more"),
    ],
)
def test_wrong_choices_change_nothing(adapter, choose, message):
    adapter.set_concepts({"a woman": 0.5})
    before = adapter._weights
    with pytest.raises(ValueError, match=message):
        choose(adapter)
    assert adapter._weights is before


def test_safe_needs_safety_concepts(tmp_path):
    save_adapter(make_adapter(), tmp_path)
    with pytest.raises(ValueError, match=r"has no safety concepts\. It has gender: a woman, a man"):
        RespoDiffAdapter.from_pretrained(tmp_path).safe()


def write_config(content):
    return lambda folder: (folder / "adapter_config.json").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model"),
        (write_config(b"{"), "is not JSON"),
        (write_config(b"\xff"), "is not JSON"),
        (write_config(b"[" * 100_000), "is not JSON"),
        (write_config(b"[]"), "does not say"),
        (truncate, "damaged or truncated"),
        (put_pickle, "not a whole safetensors file"),
        (edit_config(lambda c: c.update(format="lora")), "respodiff-adapter"),
        (edit_config(lambda c: c.update(format_version=4)), "get a newer respodiff_jax"),
        (edit_config(lambda c: c.update(format_version=True)), "format_version is True"),
        (edit_config(lambda c: c.pop("format_version")), "format_version is missing"),
        (edit_config(lambda c: c.pop("guidance")), "guidance is missing"),
        (edit_config(lambda c: c.update(guidance=[])), r"guidance is \[\], expected a mapping"),
        (
            edit_config(lambda c: c["guidance"].clear()),
            "steered_half is None",
        ),
        (edit_config(lambda c: c.pop("module")), "module is missing"),
        (edit_config(lambda c: c.update(module=None)), "module is None, expected a mapping"),
        (edit_config(lambda c: c["module"].pop("kind")), "module.kind is missing"),
        (edit_config(lambda c: c["module"].update(kind="lora")), "module.kind is 'lora'"),
        (edit_config(lambda c: c["module"].update(kind="mlp")), "missing: .*hidden.bias"),
        (edit_config(lambda c: c["module"].update(mid_block_shape=5)), "mid_block_shape is 5, exp"),
        (edit_config(lambda c: c["module"]["mid_block_shape"].pop("width")), "width is missing"),
        (
            edit_config(lambda c: c["module"]["mid_block_shape"].update(width=0)),
            "a whole number of",
        ),
        (
            edit_config(lambda c: c["module"]["mid_block_shape"].update(width="4")),
            "module.mid_block_shape.width is '4', expected a whole number of 1 or more",
        ),
        (
            edit_config(lambda c: c["module"]["mid_block_shape"].update(width=10**400)),
            "width is 1000",
        ),
        (edit_config(lambda c: c["backbone"].pop("name")), "backbone.name is missing"),
        (
            edit_config(lambda c: c["backbone"].update(name=5)),
            "backbone.name is 5, expected a text",
        ),
        (
            edit_config(lambda c: c["backbone"].update(resolution=1.5)),
            "resolution is 1.5, expected",
        ),
        (edit_config(lambda c: c.update(concepts={"a": 1})), "concepts is .* expected a list"),
        (edit_config(lambda c: c["concepts"].append("a")), r"concepts\[2\] is 'a', expected a map"),
        (edit_config(lambda c: c["concepts"][1].pop("group")), r"concepts\[1\].group is missing"),
        (
            edit_config(lambda c: c["concepts"][0].update(unsafe_prompt=5)),
            "unsafe_prompt is 5, exp",
        ),
        (
            edit_config(lambda c: c["concepts"][0].update(default_scale="1")),
            r"concepts\[0\].default_scale is '1', expected a finite number",
        ),
        (
            edit_config(lambda c: c["concepts"][0].update(default_scale=10**400)),
            "default_scale is 1000",
        ),
        (edit_config(lambda c: c["guidance"].update(steered_half="both")), "steered_half is 'both"),
        (edit_config(lambda c: c["concepts"][0].update(name="a man")), "all different"),
        (edit_config(lambda c: c["concepts"][0].update(name=["a man"])), "name is .'a man'., exp"),
        (
            edit_config(lambda c: c["concepts"][0].update(name="")),
            "name is '', expected a text that",
        ),
        (
            edit_config(lambda c: c["concepts"][0].update(default_scale=1e999)),
            "default_scale is inf",
        ),
        (edit_config(lambda c: c.update(concepts=[])), "expected one or more"),
        (edit_config(lambda c: c["concepts"].pop()), "extra: .*concepts.1.ram.constant"),
        (edit_tensors(lambda t: t.pop(RAM_0)), "missing: .*concepts.0.ram.constant"),
        (edit_tensors(lambda t: t.update({RAM_0: t[RAM_0][:-1]})), r"F32 \(7, 3, 4\), expected"),
        (edit_tensors(lambda t: t.update({RAM_0: t[RAM_0].astype(int)})), "is I64"),
        (edit_tensors(lambda t: t[RAM_0].fill(np.nan)), "concepts.0.ram.constant holds NaN"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    save_adapter(make_adapter(), tmp_path)
    RespoDiffAdapter.from_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        RespoDiffAdapter.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "../nowhere/at/all", "no/such", "a/b/../../c"])
def test_name_that_is_no_folder_and_no_hub_id_is_refused(name):
    with pytest.raises(ValueError, match=f"adapter {name}: no such folder"):
        RespoDiffAdapter.from_pretrained(name)


def test_unreadable_files_are_value_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="File name too long"):
        RespoDiffAdapter.from_pretrained("a" * 5000)
    save_adapter(make_adapter(), tmp_path)

    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"Permission denied: .*adapter_config\.json"):
        RespoDiffAdapter.from_pretrained(tmp_path)


def test_the_file_works_alone(tmp_path):
    """A copy beside an adapter runs without the rest of this package and without JAX."""
    save_adapter(make_adapter("conv"), tmp_path / "adapter")
    code = pathlib.Path(torch_adapter.__file__).read_text()
    (tmp_path / "torch_adapter.py").write_text(code)
    script = """
import sys
for name in ("jax", "flax", "respodiff_jax", "huggingface_hub", "diffusers", "transformers"):
    sys.modules[name] = None  # importing it fails
import torch
from torch_adapter import RespoDiffAdapter
adapter = RespoDiffAdapter.from_pretrained("adapter")
adapter.set_concepts({"a woman": 1.0})
print(tuple(adapter.delta(torch.ones(2, 8, 3, 4)).shape))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(2, 8, 3, 4)"
