"""The PyTorch loader and the JAX loader accept and refuse the same adapters."""

import copy
import dataclasses
import json
import random

import numpy as np
import pytest
import safetensors.numpy
from test_adapters import MAN, VIOLENCE, WOMAN, make_adapter

from respodiff_jax.adapters import load_adapter, save_adapter
from respodiff_jax.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from respodiff_jax.method.reading import Reading
from respodiff_jax.torch_adapter import RespoDiffAdapter

# What a mutated field becomes.
VALUES = [
    *(None, True, False, 0, 1, 2, -1, 3.5, 0.0, -0.5, 1e39, 1e300, float("inf"), float("nan")),
    *(10**400, 2**31, "", " ", "a man", "a woman", "conditional", "conv", "mlp", "\ud800", "1"),
    *([], [1], ["a", "b"], ["a"], [""], [4.0, 2.0], [None], {}, {"a": 1}, {"a": {"b": 0.5}}),
]


def spots(value, path=()):
    """The paths of all fields of a config."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from spots(inner, (*path, key))


def mutate_config(config, rng):
    path = rng.choice(list(spots(config)))
    parent = config
    for key in path[:-1]:
        parent = parent[key]
    match rng.randrange(5):
        case 0:
            del parent[path[-1]]
        case 1 if isinstance(parent, dict):
            names = ("words", "lr_ram", "extra", "unsafe_prompt", "default_scale", "reading")
            parent[rng.choice(names)] = copy.deepcopy(rng.choice(VALUES))
        case 2 if isinstance(parent, list):
            parent.append(copy.deepcopy(rng.choice([parent[path[-1]], *VALUES])))
        case _:
            parent[path[-1]] = copy.deepcopy(rng.choice(VALUES))


def mutate_tensors(tensors, rng):
    key = rng.choice(list(tensors))
    value = tensors[key]
    match rng.randrange(6):
        case 0:
            del tensors[key]
        case 1:
            tensors[rng.choice((f"{key}.more", key.replace("0", "9")))] = value
        case 2:
            tensors[key] = value[..., :-1].copy()
        case 3:
            tensors[key] = value.astype(rng.choice(("float16", "float64", "int32", "uint8")))
        case 4:
            tensors[key] = value.copy()
            tensors[key].flat[rng.randrange(value.size)] = rng.choice((np.nan, np.inf, 7.0))
        case 5:
            tensors[key] = np.ascontiguousarray(value.T)


def mutate_bytes(content, rng):
    content = bytearray(content)
    match rng.randrange(3):
        case 0:
            content[rng.randrange(len(content))] = rng.randrange(256)
        case 1:
            content[rng.randrange(300)] = rng.randrange(256)
        case 2:
            del content[rng.randrange(len(content)) :]
    return bytes(content)


def originals(tmp_path):
    for kind, concepts in (("mlp", (WOMAN, MAN)), ("constant", (MAN, VIOLENCE))):
        adapter = make_adapter(kind, concepts)
        heads = Reading(np.ones((2, 3, 5), np.float32), np.zeros((2, 3), np.float32))
        metric = {"metric": "m", "attribute": None, "images": "base", "value": 0.5, "n": 3}
        for name, changes in (
            ("plain", {}),
            (
                "full",
                {
                    "reading": heads,
                    "reading_accuracy": {"gender": {"thing": 0.9}},
                    "training": {"steps": 7, "more": [1, {"a": "b"}]},
                    "metrics": [metric | {"interval": [0.1, 0.9]}],
                },
            ),
        ):
            folder = tmp_path / f"{kind}-{name}"
            save_adapter(dataclasses.replace(adapter, **changes), folder)
            yield folder


def compare(tmp_path, count):
    """How many of the mutated adapters both loaders accept; fails where they disagree."""
    rng = random.Random(0)
    sources = [
        (
            json.loads((folder / CONFIG_FILE).read_text()),
            safetensors.numpy.load_file(folder / WEIGHTS_FILE),
            (folder / WEIGHTS_FILE).read_bytes(),
        )
        for folder in originals(tmp_path)
    ]
    folder, accepted = tmp_path / "mutated", 0
    folder.mkdir()
    for number in range(count):
        config, tensors, weights = copy.deepcopy(rng.choice(sources))
        what = rng.choices(("config", "two", "tensors", "weights", "text"), (6, 2, 2, 1, 1))[0]
        text = None
        if what in ("config", "two"):
            for _ in range(2 if what == "two" else 1):
                mutate_config(config, rng)
        elif what == "tensors":
            mutate_tensors(tensors, rng)
            weights = safetensors.numpy.save(tensors)
        elif what == "weights":
            weights = mutate_bytes(weights, rng)
        else:
            text = mutate_bytes(json.dumps(config).encode(), rng)
        text = json.dumps(config).encode() if text is None else text
        (folder / CONFIG_FILE).write_bytes(text)
        (folder / WEIGHTS_FILE).write_bytes(weights)
        answers = []
        for load in (load_adapter, RespoDiffAdapter.from_pretrained):
            try:
                load(folder)
                answers.append("accepts")
            except ValueError as error:  # UserError is one
                answers.append(f"refuses: {error}")
        kinds = [answer.split(":")[0] for answer in answers]
        assert kinds[0] == kinds[1], (number, what, answers, text.decode("utf-8", "replace"))
        accepted += kinds[0] == "accepts"
    return accepted


def test_both_loaders_agree_on_mutated_adapters(tmp_path):
    assert 10 < compare(tmp_path, 150) < 140


@pytest.mark.slow
def test_both_loaders_agree_on_ten_thousand_mutated_adapters(tmp_path):
    assert 500 < compare(tmp_path, 10_000) < 9_500
