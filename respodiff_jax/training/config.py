"""Configs: Python files with `get_config()`, which returns a `ml_collections.ConfigDict`.

`default()` has every option. A file in `configs/` changes some options, and the command line can
change more: `--config configs/sd14_gender.py --config.train.steps=200`.
"""

import math
import os
import pathlib
import runpy
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from respodiff_jax.backbone.attention import IMPLEMENTATIONS
from respodiff_jax.data import contrast
from respodiff_jax.data.concept_files import read_concepts
from respodiff_jax.data.prompt_files import is_template
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import HYPER_PARAMETERS, Concept, validate_concepts
from respodiff_jax.method.modules import INITS, KINDS

_CHOICES = {
    "model.dtype": ("bfloat16", "float32"),
    "model.attention": IMPLEMENTATIONS,
    "module.kind": KINDS,
    "module.init": INITS,
    "parallel.strategy": ("pmap", "mesh"),
    "optimizer.lr_schedule": ("constant", "linear", "cosine"),
    "rollout.kind": ("streaming", "faithful"),
}
_LEAST = {
    "rollout.num_steps": 2,
    "rollout.trajectory_steps": 1,
    "train.steps": 1,
    "train.batch_size": 1,
    "optimizer.warmup_steps": 0,
    "adversary.every": 0,
    "adversary.steps": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "log.every": 1,
    "log.grid_every": 0,
    "log.grid_images": 1,
    "log.grid_steps": 1,
}


def default() -> ConfigDict:
    """All options with their defaults. `concepts` is empty: fill it with `add_concepts`."""
    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict()
    config.model.name = "CompVis/stable-diffusion-v1-4"  # a diffusers folder or a hub id
    config.model.revision = placeholder(str)  # hub branch, tag or commit
    config.model.variant = placeholder(str)  # "fp16" reads *.fp16.safetensors
    config.model.dtype = "bfloat16"  # dtype of the frozen parts: "bfloat16" or "float32"
    # "auto", "plain", "chunked", "flash" (TPU), "cudnn" (NVIDIA, bfloat16), "stock".
    config.model.attention = "auto"
    config.model.resolution = placeholder(int)  # in pixels; None is the model's own

    config.module = ConfigDict()
    config.module.kind = "constant"  # "constant", "mlp" or "conv"
    config.module.hidden_channels = placeholder(int)  # for mlp and conv; None is C / 4
    config.module.init = "zeros"  # "zeros" or "uniform"

    # A ConfigDict of concepts, each with the fields of `respodiff_jax.method.concepts.Concept`.
    config.concepts = ConfigDict()
    config.concept_defaults = ConfigDict(HYPER_PARAMETERS)  # for fields that a concepts file omits

    config.rollout = ConfigDict()
    # "streaming" advances trajectories with the predictions of the losses. "faithful", as in the
    # paper, runs each trajectory from pure noise.
    config.rollout.kind = "streaming"
    config.rollout.trajectory_steps = 10  # "streaming": largest number of steps of a trajectory
    config.rollout.num_steps = 50  # steps of the DDIM schedule; the losses see all but the last
    config.rollout.guidance_scale = 3.0

    config.optimizer = ConfigDict()  # Adam, separately for RAM and SAM
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.lr_schedule = "constant"  # or decay to 0 at train.steps: "linear", "cosine"
    config.optimizer.warmup_steps = 0
    config.optimizer.clip_norm = placeholder(float)  # largest global norm of a module's gradient
    # Decay of a moving average of the modules, which the adapter then holds.
    config.optimizer.ema_decay = placeholder(float)

    # Attacks training samples, see `respodiff_jax.method.adversary`.
    config.adversary = ConfigDict()
    config.adversary.every = 0  # steps from one attack to the next; 0 never attacks
    config.adversary.steps = 4  # of Adam, for each attack
    config.adversary.rate = 0.1  # Adam's learning rate
    config.adversary.share = 0.5  # probability that a sample is attacked

    config.train = ConfigDict()
    config.train.steps = 5000
    config.train.batch_size = 1  # samples of each concept in a step, over all devices
    # Largest number of concepts that a device trains at a time; None is no limit. More concepts are
    # trained in waves.
    config.train.concepts_per_device = placeholder(int)
    config.train.remat = False  # save memory: compute the decoder's layers again for the gradient
    # An adapter directory. Concepts whose names it has start from it instead of from module.init.
    config.train.init_adapter = placeholder(str)

    # Adapters read prompts: see `respodiff_jax.method.reading`. Contrast prompts put these phrases,
    # and the concepts' words, into these templates.
    config.reading = ConfigDict()
    config.reading.train = True  # False steers every prompt, as the paper does
    config.reading.people = contrast.PEOPLE
    config.reading.adjectives = contrast.ADJECTIVES
    config.reading.things = contrast.THINGS
    config.reading.templates = contrast.TEMPLATES

    config.parallel = ConfigDict()
    config.parallel.strategy = "pmap"  # or "mesh"

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 500
    config.checkpoint.keep = 3

    config.log = ConfigDict()
    config.log.every = 10
    config.log.grid_every = 500  # 0 draws no validation grids
    config.log.grid_images = 4  # columns of the grid, one seed each
    # Prompts of the columns of fairness concepts; () takes the concept's neutral prompts.
    config.log.grid_prompts = ()
    config.log.grid_steps = 50
    config.log.grid_guidance_scale = 7.5
    return config.lock()


def add_concepts(config: ConfigDict, concepts: Mapping[str, Concept]) -> None:
    """Adds concepts to a config, each under a key of one word, for overrides.

    `--config.concepts.KEY.lr_ram=0.03` is an override.
    """
    with config.unlocked():
        for key, concept in concepts.items():
            config.concepts[key] = _entry(concept)


def with_concepts(config: ConfigDict, concepts: Sequence[Concept]) -> ConfigDict:
    """Copies the config, with these concepts, in this order, instead of its own."""
    copy = config.copy_and_resolve_references()
    digits = len(str(len(concepts)))
    with copy.unlocked():
        copy.concepts = ConfigDict(
            {f"concept_{i:0{digits}d}": _entry(concept) for i, concept in enumerate(concepts)}
        )
    return copy.lock()


def _entry(concept: Concept) -> ConfigDict:
    fields = concept.to_dict()
    # Flags replace tuples, and only options that exist.
    fields |= {key: getattr(concept, key) for key in ("neutral_prompts", "words", "default_scale")}
    fields = {name: placeholder(str) if value is None else value for name, value in fields.items()}
    last = concept.max_timestep
    return ConfigDict(fields | {"max_timestep": placeholder(int) if last is None else last})


def load_config(
    path: str | os.PathLike,
    overrides: Sequence[str] = (),
    concepts: str | os.PathLike | None = None,
    **sections: Any,
) -> ConfigDict:
    """Reads a config file, changes options and validates the result.

    Args:
      path: a Python file with `get_config()`.
      overrides: options as on the command line, such as `"--config.train.steps=200"`.
      concepts: a concepts file or a prepared data set, see `read_concepts`; its concepts replace
        the config's.
      **sections: options as keywords: sections, such as `train={"steps": 200}`, and top-level
        options, such as `seed=1`.

    Returns:
      The config, locked.

    Raises:
      UserError: if a file is missing or wrong, an option is unknown or of the wrong type, or
        `validate` finds a mistake.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"config file {path} does not exist")
    config = _read_file(str(path))
    for override in overrides:
        _check_override(config, override)
    values = flags.FlagValues()
    argv = ["respodiff", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        rest = values(argv)[1:]
        config = values.config.lock()
        _check_known(config, sections)
        config.update(sections)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"config {path}: {' '.join(map(str, e.args)):.300}") from e
    if rest:
        raise UserError(f"`overrides`: {rest} are not --config.SECTION.OPTION=VALUE")
    if concepts is not None:
        defaults = config.concept_defaults.to_dict()
        config = with_concepts(config, read_concepts(concepts, defaults))
    validate(config)
    return config


def _read_file(path: str) -> ConfigDict:
    """What `get_config()` of a config file returns; a fault in the file is told with its line."""
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError(f"config file {path} defines no get_config()")
        config = get_config()
    except UserError as error:
        raise UserError(f"config {path}: {error}") from error
    except Exception as error:  # whatever the user's code raises
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else "?"
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise UserError(
            f"config {path}, line {line}: {type(error).__name__}: {reason:.200}"
        ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"config {path}: get_config() returns {config!r:.80}, expected a ConfigDict"
        )
    return config


def _check_override(config: ConfigDict, override: str) -> None:
    """Checks that a config has the option of `--config.SECTION.OPTION=VALUE`."""
    name, _, _ = override.partition("=")
    if not name.startswith("--config.") or "[" in name:
        return
    node, path = config, "config"
    for key in name.removeprefix("--config.").split("."):
        if not isinstance(node, ConfigDict):
            raise UserError(f"{path} is {node!r:.80}, which has no {key!r}")
        _check_has(node, key, path)
        node, path = node[key], f"{path}.{key}"


def _check_has(section: ConfigDict, key: str, path: str) -> None:
    if key not in section:
        raise UserError(f"{path} has no {key!r}; it has {', '.join(sorted(section))}")


def _check_known(config: ConfigDict, changes: Mapping[str, Any], path: str = "config") -> None:
    for key, value in changes.items():
        _check_has(config, key, path)
        if isinstance(config[key], ConfigDict):
            if not isinstance(value, Mapping | ConfigDict):
                raise UserError(f"{path}.{key} is {value!r}, expected a mapping of its options")
            _check_known(config[key], value, f"{path}.{key}")


def concepts_from(config: ConfigDict) -> tuple[Concept, ...]:
    """The validated concepts of a config, sorted by key."""
    concepts = tuple(
        Concept.from_dict(config.concepts[key].to_dict()) for key in sorted(config.concepts)
    )
    validate_concepts(concepts)
    return concepts


def _are_texts(values: Any) -> bool:
    """Whether there is a list of texts, none of them blank."""
    is_list = isinstance(values, list | tuple)
    return is_list and all(isinstance(text, str) and text.strip() for text in values)


def validate(config: ConfigDict) -> None:
    """Checks everything that needs no model.

    Raises:
      UserError: if a value is wrong; the message names the key, the value and what is expected.
    """

    def check(key: str, holds: Callable[[Any], bool], expected: str):
        section, option = key.split(".")
        value = config[section][option]
        if not holds(value):
            raise UserError(f"config.{key} is {value!r}, expected {expected}")

    if not isinstance(config, ConfigDict):
        raise UserError(f"`config` is {config!r}, expected a config as from `load_config`")
    concepts_from(config)
    for key, choices in _CHOICES.items():
        check(key, choices.__contains__, f"one of {', '.join(choices)}")
    for key, least in _LEAST.items():
        check(key, lambda n, least=least: n >= least, f"at least {least}")
    for key, value in flatten_dict(config.to_dict(), sep=".").items():
        if isinstance(value, int) and not -(2**31) <= value < 2**32:
            # Numbers of thousands of digits cannot even be printed.
            text = f"a number of {value.bit_length()} bits" if abs(value) >= 2**64 else str(value)
            raise UserError(f"config.{key} is {text}, expected at most 32 bits")
    for key in ("rollout.guidance_scale", "log.grid_guidance_scale"):
        check(key, math.isfinite, "a finite number")
    check("log.grid_prompts", _are_texts, "prompts")
    if config.reading.train:
        check(
            "reading.templates",
            lambda x: bool(x) and _are_texts(x) and all(map(is_template, x)),
            "at least one text with {subject} or {a_subject}, and no other braces",
        )
        check("reading.adjectives", _are_texts, "words")
        for key in ("reading.people", "reading.things"):
            check(key, lambda x: len(x) >= 12 and _are_texts(x), "at least a dozen phrases")
    steps = config.train.steps
    check(
        "optimizer.warmup_steps",
        lambda n: n < steps,
        f"fewer than train.steps={steps}; for a short trial add --config.optimizer.warmup_steps=0",
    )
    for beta in ("optimizer.b1", "optimizer.b2"):
        check(beta, lambda x: 0 <= x < 1, "within 0..1")
    check("optimizer.eps", lambda x: x > 0, "a positive number")
    check("adversary.rate", lambda x: 0 < x < math.inf, "a positive number")
    check("adversary.share", lambda x: 0 < x <= 1, "above 0, at most 1")
    for key, holds, expected in (
        ("model.resolution", lambda n: n > 0, "a number of pixels"),
        ("module.hidden_channels", lambda n: n > 0, "at least 1"),
        ("train.concepts_per_device", lambda n: n >= 1, "at least 1"),
        ("optimizer.clip_norm", lambda x: x > 0, "a positive number"),
        ("optimizer.ema_decay", lambda x: 0 < x < 1, "within 0..1"),
    ):
        check(key, lambda x, holds=holds: x is None or holds(x), f"None or {expected}")
