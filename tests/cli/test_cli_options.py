"""The options of the commands and the parameters of the API have the same names."""

import argparse
import inspect

import respodiff_jax as rd
from respodiff_jax import cli
from respodiff_jax.bench.benchmark import benchmark
from respodiff_jax.compiling.ahead_of_time import compile_steps


def test_every_option_reaches_the_api():
    parser = cli._parser()
    (verbs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    of_the_model = {"dtype", "revision", "variant"}
    for verb, function, elsewhere in (
        ("generate", rd.generate_folder, {*of_the_model, "prompts_file"}),
        ("evaluate", rd.evaluate, of_the_model),
        ("export", rd.export, {"source", "step", "only"}),
        ("import", rd.import_checkpoint, {"out"}),
        ("bench", benchmark, {"concepts", "workdir"}),
        ("compile", compile_steps, {"concepts"}),
    ):
        options = {action.dest for action in verbs.choices[verb]._actions} - {"help"}
        assert options - inspect.signature(function).parameters.keys() == elsewhere, verb
    assert of_the_model <= inspect.signature(rd.load_model).parameters.keys()
