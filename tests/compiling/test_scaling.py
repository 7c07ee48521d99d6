"""The figures in docs/scaling.md follow from its table of compiled programs and from the code."""

import itertools
import math
import pathlib
import re
from functools import partial

import jax
import pytest

from respodiff_jax.backbone import random_backbone
from respodiff_jax.compiling import programs
from respodiff_jax.compiling.topologies import CHIPS
from respodiff_jax.method.state import init_state
from respodiff_jax.training.config import concepts_from, load_config
from respodiff_jax.training.spec import step_spec

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
SAMPLES = 5000
# Google names v4 and v5p slices by cores, two per chip.
CHIPS_OF = {"v5e-8": 8, "v5e-256": 256, "v5p-256": 128, "v6e-256": 256}


def tables():
    """Each table of the page, as a list of rows `{column: cell}`."""
    for block in re.findall(r"(?:^\|.*\|\n)+", PAGE, re.MULTILINE):
        header, _, *rows = (
            [c.strip() for c in r.strip("|\n").split("|")] for r in block.split("\n")[:-1]
        )
        yield [dict(zip(header, row, strict=True)) for row in rows]


def table_with(column):
    return next(rows for rows in tables() if column in rows[0])


def compiled(model, slice_):
    """The row that the page computes with: that chip's smallest slice, replicated parameters."""
    rows = (
        row
        for row in table_with("samples per chip")
        if row["slice"].startswith(slice_)
        and row["model"].startswith(model)
        and "pmap, flash" in row["program"]
    )
    return next(rows, None)


def test_concepts_per_hour_follow_from_the_compiled_table():
    models = {"SD 1.4": "random/sd14", "SDXL": "random/sdxl"}
    rows = table_with("at best")
    pairs = itertools.product(models, CHIPS_OF)
    assert {(row["model"], row["slice"]) for row in rows} == {
        (name, s) for name, s in pairs if compiled(models[name], s.split("-")[0])
    }
    for row in rows:
        slice_ = row["slice"]
        step = compiled(models[row["model"]], slice_.split("-")[0])
        rate = int(step["samples per chip"]) / float(step["at best, s"])
        best = CHIPS_OF[slice_] * 3600 * rate / SAMPLES
        for column, efficiency in (("at best", 1.0), ("assumed", 0.5)):
            shown = float(row[column].replace(",", ""))
            assert math.isclose(shown, efficiency * best, rel_tol=0.02), (row, efficiency * best)


def test_best_times_follow_from_flops_and_traffic():
    for row in table_with("samples per chip"):
        chip = CHIPS[row["slice"].split(":")[0]]
        compute = float(row["TFLOP"]) * 1e12 / chip.flops
        memory = float(row["traffic, GB"]) * 1e9 / chip.bandwidth
        assert math.isclose(float(row["at best, s"]), max(compute, memory), rel_tol=0.01)
        assert row["bound by"] == ("compute" if compute >= memory else "memory")


@pytest.mark.slow  # traces SDXL
def test_memory_table_matches_the_training_state():
    shown = {
        row[""]: int(row["bytes"].replace(",", "")) for row in table_with("bytes") if row["bytes"]
    }
    config = load_config(
        str(ROOT / "configs" / "sdxl_gender.py"), ["--config.model.name=random/sdxl"]
    )
    backbone = random_backbone("sdxl", dtype="bfloat16", abstract=True)
    concepts = concepts_from(config)
    arrays = programs.concept_shapes(backbone, concepts, 1024, 1)
    spec = step_spec(config, backbone, 1024)
    state = jax.eval_shape(partial(init_state, spec, seed=0, batch_size=1), arrays).concepts
    adam = (state.opt_ram, state.opt_sam)
    for name, part in {
        "RAM and SAM": (state.ram, state.sam),
        "Adam's two moments of both": adam,
        "latents in flight, batch 1": state.rollout,
        "a concept's state": state,
    }.items():
        large = [x for x in jax.tree.leaves(part) if math.prod(x.shape) > 1000]
        assert shown[name] == sum(math.prod(x.shape) * x.dtype.itemsize for x in large), name
        small = sum(math.prod(x.shape) for x in jax.tree.leaves(part)) - sum(
            math.prod(x.shape) for x in large
        )
        assert small < 100
    assert shown["10,000 concepts"] == 10_000 * shown["a concept's state"]
