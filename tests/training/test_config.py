"""Configs and concepts: overrides, shipped configs, mistakes."""

import dataclasses
import pathlib
import re

import pytest

from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import Concept, validate_concepts
from respodiff_jax.training.config import concepts_from, load_config

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
WOMAN = Concept("a woman", "gender", ("a person",), target_prompt="a woman")


def load(name="sd14_gender", *overrides):
    return load_config(str(CONFIGS / f"{name}.py"), [f"--config.{o}" for o in overrides])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid_and_documented(path):
    config = load_config(str(path))
    assert concepts_from(config)
    assert f"respodiff train --config configs/{path.name} --workdir" in path.read_text()


def test_hyper_parameters_equal_the_papers_table():
    """The columns are lr of RAM, lr of SAM, lambda and guidance."""

    def table(name):
        fields = ("lr_ram", "lr_sam", "lambda_sem", "guidance_scale")
        config = load(name)
        rows = {c.name: tuple(getattr(c, f) for f in fields) for c in concepts_from(config)}
        return config.train.steps, rows

    assert table("sd14_gender") == (
        5000,
        {"a woman": (1e-2, 1e-3, 0.5, 4.0), "a man": (1e-2, 1e-4, 0.5, 4.0)},
    )
    steps, race = table("sd14_race")
    assert steps == 5000 and set(race.values()) == {(1e-1, 1e-2, 0.3, 4.0)} and len(race) == 3
    steps, safety = table("sd14_safety")
    assert steps == 1500 and set(safety.values()) == {(1e-2, 1e-4, 1.0, 12.0)}
    assert all(c.is_safety for c in concepts_from(load("sd14_safety")))


def test_overrides_reach_every_level_and_type():
    config = load(
        "sd14_gender",
        "train.steps=7",
        "model.resolution=256",
        "optimizer.ema_decay=0.9",
        "module.kind=mlp",
        "concepts.woman.lr_ram=0.03",
        "concepts.woman.neutral_prompts=('a person','someone')",
        "concepts.woman.words=('lady','female {person}')",
        "concepts.woman.default_scale=0.5",
        "concepts.woman.max_timestep=900",
    )
    assert (config.train.steps, config.model.resolution, config.optimizer.ema_decay) == (
        7,
        256,
        0.9,
    )
    man, woman = concepts_from(config)  # sorted by key
    assert woman.lr_ram == 0.03 and man.lr_ram == 0.01
    assert woman.neutral_prompts == ("a person", "someone")
    assert woman.words == ("lady", "female {person}")
    assert (woman.default_scale, woman.max_timestep, man.max_timestep) == (0.5, 900, None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=7", "stepz"),
        ("train.steps=many", "steps"),
        ("train.steps=0", "config.train.steps is 0, expected at least 1"),
        ("train.batch_size=0", "config.train.batch_size is 0"),
        (
            "model.dtype=float16",
            "config.model.dtype is 'float16', expected one of bfloat16, float32",
        ),
        ("model.attention=fast", "config.model.attention is 'fast', expected one of auto, plain"),
        (
            "module.kind=linear",
            "config.module.kind is 'linear', expected one of constant, mlp, conv",
        ),
        ("module.init=ones", "config.module.init is 'ones', expected one of zeros, uniform"),
        (
            "parallel.strategy=xmap",
            "config.parallel.strategy is 'xmap', expected one of pmap, mesh",
        ),
        ("rollout.kind=fast", "config.rollout.kind is 'fast'"),
        ("rollout.num_steps=1", "config.rollout.num_steps is 1"),
        ("rollout.guidance_scale=nan", "config.rollout.guidance_scale is nan"),
        ("log.grid_guidance_scale=inf", "config.log.grid_guidance_scale is inf"),
        ("rollout.trajectory_steps=0", "config.rollout.trajectory_steps is 0"),
        ("optimizer.lr_schedule=step", "config.optimizer.lr_schedule is 'step'"),
        (
            "optimizer.warmup_steps=5000",
            "config.optimizer.warmup_steps is 5000, expected fewer than train.steps=5000; for a"
            " short trial add --config.optimizer.warmup_steps=0",
        ),
        ("train.steps=99999999999", "config.train.steps is 99999999999, expected at most 32 bits"),
        ("seed=" + "9" * 400, "config.seed is a number of 1329 bits, expected at most 32 bits"),
        ("reading.templates=()", r"config.reading.templates is (), expected at least one text"),
        ("reading.templates=('a {person}',)", "expected at least one text with {subject}"),
        ("reading.people=('doctor',)", "config.reading.people is ('doctor',), expected at least"),
        ("reading.things=()", "config.reading.things is (), expected at least a dozen phrases"),
        ("reading.adjectives=('old', ' ')", "config.reading.adjectives is ('old', ' '), expected"),
        ("optimizer.clip_norm=0.0", "config.optimizer.clip_norm is 0.0"),
        ("optimizer.ema_decay=1.0", "config.optimizer.ema_decay is 1.0"),
        ("checkpoint.every=0", "config.checkpoint.every is 0"),
        ("concepts.man.name=a woman", "'a woman' and 'a woman' are duplicates"),
        ("concepts.man.target_prompt= ", "concept 'a man': target_prompt is ' '"),
        ("concepts.man.lr_ram=inf", "concept 'a man': lr_ram is inf"),
        ("concepts.man.lambda_sem=-1.0", "concept 'a man': lambda_sem is -1.0"),
    ],
)
def test_wrong_overrides_are_refused(override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load("sd14_gender", override)


def test_missing_config_file_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.py"):
        load_config(str(tmp_path / "nothing.py"))


def test_config_without_concepts_is_refused(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("from respodiff_jax.training.config import default as get_config\n")
    with pytest.raises(UserError, match="no concepts"):
        load_config(str(path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "name is ''"),
        ({"neutral_prompts": ()}, r"neutral_prompts is \(\)"),
        ({"neutral_prompts": ("a person", " ")}, "neutral_prompts is"),
        ({"target_prompt": None}, "target_prompt and unsafe_prompt are missing"),
        ({"guidance_scale": 0.0}, "guidance_scale is 0.0"),
        ({"guidance_scale": "4"}, "guidance_scale is '4', expected a positive number"),
        ({"lr_ram": -1.0}, "lr_ram is -1.0"),
        ({"lambda_sem": True}, "lambda_sem is True"),
    ],
)
def test_wrong_concepts_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(WOMAN, **fields)


def test_concepts_round_trip_and_refuse_wrong_fields():
    assert Concept.from_dict(WOMAN.to_dict()) == WOMAN
    with pytest.raises(UserError, match=r"unknown fields \['lr'\]"):
        Concept.from_dict(WOMAN.to_dict() | {"lr": 1.0})
    with pytest.raises(UserError, match=r"missing fields \['group'\]"):
        Concept.from_dict({"name": "a woman", "neutral_prompts": ["a person"]})
    with pytest.raises(UserError, match="neutral_prompts is 5, expected a text or a list"):
        Concept.from_dict(WOMAN.to_dict() | {"neutral_prompts": 5})
    with pytest.raises(UserError, match="duplicates"):
        validate_concepts([WOMAN, WOMAN])


def test_concept_may_have_a_target_and_a_guidance_for_each_neutral_prompt():
    fields = dict(name="c", group="safety", neutral_prompts=["a", "a with a knife"])
    concept = Concept(
        **fields, unsafe_prompt="violence", target_prompt=["x", "y"], guidance_scale=[1.5, 3]
    )
    assert concept.is_safety
    assert concept.has_counterparts
    weaker = dataclasses.replace(concept, default_scale=0.7, max_timestep=900)
    assert Concept.from_dict(weaker.to_dict()) == weaker
    assert not {"default_scale", "max_timestep"} & concept.to_dict().keys()
    assert concept.own_prompts == ("x", "y")
    assert concept.guidance_scales == (1.5, 3)
    assert Concept.from_dict(concept.to_dict()) == concept
    assert Concept(**fields, target_prompt="x").own_prompts == ("x", "x")
    assert not Concept(**fields, target_prompt="x").has_counterparts
    assert Concept(**fields, target_prompt=["x", "y"]).has_counterparts
    assert not Concept(**fields, unsafe_prompt="violence").has_counterparts
    for wrong, message in (
        ({"target_prompt": ["x"]}, "or one for each of the neutral_prompts"),
        ({"target_prompt": ["x", " "]}, "target_prompt is"),
        ({"target_prompt": "x", "guidance_scale": [1.0]}, "guidance_scale is"),
        ({"target_prompt": "x", "guidance_scale": [1.0, -1.0]}, "a positive number, or one"),
        ({"unsafe_prompt": ["x", "y"]}, "unsafe_prompt is"),
        ({}, "target_prompt and unsafe_prompt are missing"),
        (
            {"target_prompt": "x", "unsafe_prompt": "violence"},
            "target_prompt is 'x', expected one counterpart for each of the neutral_prompts",
        ),
        ({"target_prompt": "x", "default_scale": "1"}, "default_scale is '1', expected a finite"),
        ({"target_prompt": "x", "max_timestep": -1}, "max_timestep is -1, expected a whole number"),
        ({"target_prompt": "x", "max_timestep": 0.9}, "max_timestep is 0.9, expected a whole"),
        ({"target_prompt": "x", "max_timestep": True}, "max_timestep is True, expected a whole"),
    ):
        with pytest.raises(UserError, match=message):
            Concept(**fields | wrong)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def get_config(:\n", r"mine\.py, line 1: SyntaxError: "),
        ("import ml_collectionz\n", r"line 1: ModuleNotFoundError: No module named 'ml_coll"),
        ("x = 1\n\n\ny = x / 0\n", r"line 4: ZeroDivisionError: division by zero"),
        ("{imports}\n\ndef get_config():\n    c = default()\n    c.train.stepz = 3\n", r"line 5: "),
        (
            "{imports}\n\ndef get_config():\n    c = default()\n    c.train.steps = 'many'\n",
            "line 5",
        ),
        (
            "def get_config():\n    pass\n",
            r"mine\.py: get_config\(\) returns None, expected a Conf",
        ),
        ("x = 1\n", r"mine\.py: config file .* defines no get_config\(\)"),
        ("raise KeyError\n", "line 1: KeyError: "),
    ],
)
def test_fault_in_a_config_file_is_named_with_its_line(tmp_path, code, message):
    file = tmp_path / "mine.py"
    file.write_text(code.format(imports="from respodiff_jax.training.config import default"))
    with pytest.raises(UserError, match=message) as error:
        load_config(file)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.train.stepz=3", r"^config\.train has no 'stepz'; it has batch_size, "),
        (
            "--config.concepts.wizard.lr_ram=0.1",
            r"^config\.concepts has no 'wizard'; it has man, wom",
        ),
        ("--config.seed.x=3", r"^config\.seed is 0, which has no 'x'"),
        ("--config.train.steps=many", r"smoke\.py: .*many"),
    ],
)
def test_unknown_override_is_named_with_what_there_is(override, message):
    with pytest.raises(UserError, match=message) as error:
        load_config("configs/smoke.py", [override])
    assert "\\" not in str(error.value)
