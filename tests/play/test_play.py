"""Behind the page: what is drawn, why, what the files hold, and the server's answer."""

import dataclasses
import functools
import io
import json
import shlex
import socket
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_adapters import MAN, VIOLENCE, WOMAN, make_adapter

import respodiff_jax as rd
from respodiff_jax import cli
from respodiff_jax.adapters import combine, load_adapter
from respodiff_jax.backbone import load_backbone
from respodiff_jax.cli import play
from respodiff_jax.emoji import shipped
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation.classifier import Prediction
from respodiff_jax.evaluation.metrics import wilson_interval
from respodiff_jax.evaluation.report.glossary import percent
from respodiff_jax.evaluation.suites import Suite
from respodiff_jax.generation.generate import generate
from respodiff_jax.generation.sampling import SamplerOptions
from respodiff_jax.images import METADATA_KEY
from respodiff_jax.method.reading import Decision, Reading, always
from respodiff_jax.play import measuring, settings
from respodiff_jax.play.painter import Job, Painter
from respodiff_jax.play.settings import (
    Settings,
    command_line,
    grid_file,
    picture_file,
    plan,
    signed,
)
from respodiff_jax.play.studio import Studio, open_studio

TAG = "<b onclick=alert(1)>bold</b>"
SHORT = SamplerOptions(num_steps=2)


def adapters(backbone):
    """One of two people, and one of safety whose name and unsafe prompt are HTML."""
    same = {"shape": (4, 4, 64), **backbone.identity, "resolution": 16}
    marked = dataclasses.replace(VIOLENCE, name=TAG, unsafe_prompt=TAG, default_scale=0.5)
    return [make_adapter("mlp", hidden=4, **same), make_adapter("constant", (marked,), **same)]


@pytest.fixture(scope="module")
def painter(tiny_backbone):
    painter = Painter(tiny_backbone, combine(adapters(tiny_backbone)), 16)
    painter.batch_size = 8  # one picture for each simulated device
    return painter


def drawn(painter, jobs, options=SHORT, **watch):
    return dict(painter.draw(jobs, options, **watch))


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_pictures_are_those_of_generate(painter, tiny_backbone, sampler):
    chosen = Settings("a cook", fair="gender", safe=True, count=5, seed=7, sampler=sampler)
    jobs = plan(painter, chosen).adapted
    options = SamplerOptions(3, 4.0, "ugly", sampler=sampler)
    ours = drawn(painter, jobs, options)
    theirs = generate(
        tiny_backbone,
        "a cook",
        adapter=adapters(tiny_backbone),
        fair="gender",
        safe=True,
        images_per_prompt=5,
        seed=7,
        num_steps=3,
        guidance_scale=4.0,
        negative_prompt="ugly",
        sampler=sampler,
    )
    for i, picture in enumerate(theirs):
        difference = np.asarray(picture).astype(int) - ours[i]
        assert np.abs(difference).max() <= 1
    (base,) = drawn(painter, [jobs[0]._replace(weights=())], options).values()
    assert np.abs(ours[0].astype(int) - base).max() > 1


def test_steering_every_prompt_also_steers_at_every_timestep(tiny_backbone):
    people, safety = adapters(tiny_backbone)
    concepts = tuple(dataclasses.replace(c, max_timestep=500) for c in people.concepts)
    limited = combine([dataclasses.replace(people, concepts=concepts), safety])
    chosen = Settings("a cook", {WOMAN.name: 1.0}, count=1, seed=7)
    painter = Painter(tiny_backbone, limited, 16)
    drawings = []
    for steer_always in (False, True):
        chosen = dataclasses.replace(chosen, steer_always=steer_always)
        (ours,) = drawn(painter, plan(painter, chosen).adapted).values()
        drawings.append(ours)
        options = {"num_steps": SHORT.num_steps, "guidance_scale": SHORT.guidance_scale}
        options |= {"steer_always": steer_always, "concepts": {WOMAN.name: 1.0}, "seed": 7}
        [theirs] = generate(tiny_backbone, "a cook", adapter=limited, **options)
        assert np.abs(np.asarray(theirs).astype(int) - ours).max() <= 1
    assert (drawings[0] != drawings[1]).any()


def test_no_control_compiles_and_pictures_are_kept(painter):
    drawn(painter, [Job("a cook", 0, (1.0, 0.0, 0.0))])
    before = painter.compiled
    for count, steps, sampler, scale in ((1, 3, "ddim", -0.7), (9, 5, "euler", 2.0)):
        jobs = [Job("an artist", i, (0.0, scale, 0.1 * i)) for i in range(count)]
        drawn(painter, jobs, SamplerOptions(steps, 2.0 + count, sampler=sampler))
    assert painter.compiled == before
    steps = []
    drawn(
        painter, jobs, SamplerOptions(5, 11.0, sampler="euler"), on_step=lambda *s: steps.append(s)
    )
    assert steps == []


def test_kept_pictures_and_prompts_stay_within_their_limits(tiny_backbone, monkeypatch):
    monkeypatch.setattr("respodiff_jax.play.painter._KEPT_BYTES", 5 * 16 * 16 * 3)
    monkeypatch.setattr("respodiff_jax.play.painter._KEPT_PROMPTS", 3)
    painter = Painter(tiny_backbone, None, 16)
    for i in range(6):
        drawn(painter, [Job(f"prompt {i}", 2 * i), Job(f"prompt {i}", 2 * i + 1)])
    assert len(painter._pictures) == 5 and len(painter._prompts) == 3


def test_a_stopped_drawing_ends_within_a_step(painter):
    done = []
    jobs = [Job("a cook", 100 + i) for i in range(3 * painter.batch_size)]
    found = painter.draw(
        jobs,
        SamplerOptions(6),
        lambda: len(done) >= 8,
        lambda step, total: done.append((step, total)),
    )
    assert len(list(found)) == painter.batch_size  # the second batch was stopped
    assert done == [(i + 1, 18) for i in range(8)]
    with painter._turn:  # somebody else draws
        assert list(painter.draw(jobs[-1:], SamplerOptions(6), lambda: True)) == []


# The biases of the three heads, with which every prompt is read as the decision.
BIASES = {
    Decision.OPEN: (1, -1, -1),
    Decision.NAMED: (1, -1, 1),
    Decision.NOBODY: (-1, 1, -1),
}


def reading_painter(backbone, decision):
    """A painter whose adapter of people reads every prompt as one decision."""
    features = backbone.encode_prompts(["x"], 16).context.shape[-1]
    people, safety = adapters(backbone)
    bias = np.float32([BIASES[decision]] * 2)
    reading = Reading(np.zeros((2, 3, features), np.float32), bias)
    return Painter(backbone, combine([dataclasses.replace(people, reading=reading), safety]), 16)


@pytest.mark.parametrize(
    ("decision", "line"),
    [
        (Decision.OPEN, "Steered to a woman: the prompt leaves the gender open."),
        (Decision.NAMED, "Not steered: the prompt names the gender."),
        (Decision.NOBODY, "Not steered: the adapter finds no person in the prompt (gender)."),
    ],
)
def test_a_line_says_why_a_picture_is_steered_or_not(tiny_backbone, decision, line):
    painter = reading_painter(tiny_backbone, decision)
    chosen = plan(painter, Settings("a cook", {WOMAN.name: 1.0}, safe=True, count=2))
    assert chosen.reasons == [f"{line} Steered away from {TAG} × 0.5: every prompt is steered."] * 2
    is_open = decision == Decision.OPEN
    assert chosen.adapted[0].weights == (float(is_open), 0.0, 0.5)
    steered = plan(painter, Settings("a cook", {WOMAN.name: 1.0}, steer_always=True, count=1))
    assert steered.reasons == ["Steered to a woman: every prompt is steered."]
    assert steered.adapted[0].weights == (1.0, 0.0, 0.0)


def test_only_steering_by_prompts_needs_text_states_that_the_adapter_reads(tiny_backbone):
    people, safety = adapters(tiny_backbone)
    narrow = dataclasses.replace(people, reading=always(2, 3))
    painter = Painter(tiny_backbone, combine([narrow, safety]), 16)
    painter.batch_size = 8
    with pytest.raises(UserError, match=r"reads text states of 3 features.* `steer_always`"):
        plan(painter, Settings("a cook", fair="gender"))
    steered = plan(painter, Settings("a cook", fair="gender", steer_always=True, count=1))
    jobs = [*steered.adapted, *plan(painter, Settings("a cook", count=1)).base]
    assert len(drawn(painter, jobs, SamplerOptions(num_steps=1))) == 2
    unread = types.SimpleNamespace(painter=painter, start=lambda: Settings("a", fair="gender"))
    Studio.warm_up(unread)  # the page starts; it shows the error when it draws


def test_a_line_of_a_negative_weight_says_the_other_way(tiny_backbone):
    painter = reading_painter(tiny_backbone, Decision.OPEN)
    names = [concept.name for concept in painter.adapter.concepts]
    (line,) = plan(painter, Settings("a cook", {WOMAN.name: -0.5, names[2]: -1.0}, count=1)).reasons
    assert line == (
        "Steered away from a woman × 0.5: the prompt leaves the gender open."
        f" Steered towards {TAG}: every prompt is steered."
    )


def test_shares_are_met_and_lines_name_each_pictures_concept(painter):
    ratio = {WOMAN.name: 0.75, MAN.name: 0.25}
    chosen = plan(painter, Settings("a cook", fair="gender", ratio=ratio, count=8))
    names = ["a woman" if job.weights[0] else "a man" for job in chosen.adapted]
    assert sorted(names) == ["a man"] * 2 + ["a woman"] * 6
    assert all(f"Steered to {n}:" in line for n, line in zip(names, chosen.reasons, strict=True))
    assert [job.seed for job in chosen.adapted] == [job.seed for job in chosen.base]
    nothing = plan(painter, Settings("a cook"))
    assert nothing.adapted == nothing.base and "no concept is chosen" in nothing.reasons[0]


def test_a_scale_is_written_with_its_sign():
    assert [signed(scale) for scale in (0.0, -0.0, 1 / 3, -1)] == ["0", "0", "+0.33", "-1.00"]


def test_a_strip_goes_from_minus_one_to_one(painter):
    jobs, _ = settings.strip(painter, Settings("a cook", seed=3, fair="gender"), MAN.name)
    assert [job.weights[1] for job in jobs] == pytest.approx(
        [-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1]
    )
    assert {job.seed for job in jobs} == {3} and all(job.weights[0] == 0 for job in jobs)
    middle, base = drawn(painter, [jobs[3], Job("a cook", 3)]).values()
    np.testing.assert_array_equal(middle, base)


def test_the_command_line_makes_the_same_call(tiny_backbone, monkeypatch):
    identity = {"name": "owner/model", "revision": "abc", "variant": "fp16", "unet_sha256": "0"}
    model = dataclasses.replace(tiny_backbone, identity=identity, dtype=jnp.bfloat16)
    painter = types.SimpleNamespace(model=model, resolution=24)
    chosen = Settings(
        "a 'cook' $HOME; --safe",
        {WOMAN.name: 0.5},
        safe=True,
        steer_always=True,
        seed=11,
        sampler="euler",
        negative_prompt="-ugly",
    )
    text = command_line(painter, chosen, ["owner/name"])
    seen, opened = {}, {}

    @functools.wraps(rd.generate_folder)
    def generate_folder(**given):
        seen.update(given)
        return 1.0

    @functools.wraps(rd.load_model)
    def load_model(**given):
        opened.update(given)
        return model

    monkeypatch.setattr("respodiff_jax.generate_folder", generate_folder, raising=False)
    monkeypatch.setattr("respodiff_jax.load_model", load_model, raising=False)
    monkeypatch.setattr("respodiff_jax.load_adapter", lambda path: path, raising=False)
    monkeypatch.setattr("respodiff_jax.training.distributed.enable_compilation_cache", lambda: None)
    words = shlex.split(text.replace("\\\n", " "))
    assert cli.main(words[1:]) == 0
    assert seen["prompts"] == [chosen.prompt]
    for name in ("safe", "steer_always", "seed", "num_steps", "sampler", "negative_prompt"):
        assert seen[name] == getattr(chosen, name), name
    assert seen["concepts"] == chosen.concepts and seen["images_per_prompt"] == 8 and seen["base"]
    assert seen["resolution"] == 24 and seen["model"]() is model
    expected = {"name": "owner/model", "revision": "abc", "variant": "fp16", "dtype": "bfloat16"}
    assert expected.items() <= opened.items()
    shares = Settings("x", fair="gender", ratio={"a woman": 0.25, "a man": 0.75})
    assert "--fair gender \\\n    --ratio 'a woman=0.25,a man=0.75'" in command_line(
        painter, shares, ["a"]
    )
    unsteered = command_line(painter, Settings("x"), ["a"])
    assert "--adapter" not in unsteered
    assert "--revision abc" in unsteered and "--resolution 24" in unsteered


def test_a_downloaded_picture_says_how_it_was_made(painter):
    chosen = Settings("a cook", {WOMAN.name: 0.5}, num_steps=2, count=1, seed=5)
    made = plan(painter, chosen)
    (picture,) = drawn(painter, made.adapted).values()
    content = picture_file(painter, chosen, made.adapted[0], picture, ["here"])
    with Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(np.asarray(image), picture)
        record = json.loads(image.info[METADATA_KEY])
    assert record["concepts"] == {"a woman": 0.5} and record["seed"] == 5
    assert record["adapter"] == ["here"] and record["resolution"] == 16
    grid = Image.open(io.BytesIO(grid_file(chosen, [picture] * 9, [picture] * 9)))
    assert grid.width > 8 * 128 and grid.height > 4 * 128


class Seen:
    """A judge to which all pictures of the first ten seeds show a woman."""

    def __init__(self):
        self.count = 0

    def features(self, picture):
        self.count += 1
        return np.array([[self.count]])

    def classify(self, features):
        labels = (features[:, 0] > 10).astype(int)
        return {"gender": Prediction(("woman", "man"), labels, np.ones(len(labels)))}


def test_measuring_counts_pairs_while_they_are_drawn(painter):
    suite = Suite(
        "test",
        "clip",
        ("cook",),
        ("a photo of {a_subject}", "{subject}"),
        {"gender": {"woman": ("a woman",), "man": ("a man",)}},
    )
    chosen = Settings("x", fair="gender", num_steps=1, ratio={"a woman": 0.3, "a man": 0.7})
    jobs = measuring.jobs_of(painter, chosen, suite, "cook")
    assert len(jobs) == 40 and {job.prompt for job in jobs} == {"a photo of a cook", "cook"}
    assert sum(job.weights[0] for job in jobs[1::2]) == 6
    counted = []
    count = lambda *numbers: counted.append(numbers)  # noqa: E731
    charts = list(measuring.measure(painter, chosen, suite, "cook", Seen(), on_count=count))
    assert len(charts) >= 2 and counted == [(i, 40) for i in range(40)]
    low, high = wilson_interval(5, 20)  # pictures are seen base, adapted, base, ...
    assert f"woman 5 of 20 ({percent(low)} to {percent(high)})" in charts[-1]
    assert "target: 30\u00a0%, 70\u00a0%" in charts[-1] and "<svg" in charts[-1]
    with pytest.raises(UserError, match="nothing steers the pictures"):
        next(measuring.measure(painter, Settings("x"), suite, "cook", Seen()))


def test_an_address_is_taken_before_anything_is_loaded():
    with play._listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} cannot be used"):
            play._listen("127.0.0.1", port)


def test_emoji_world_opens_with_its_adapters():
    loaded = [load_adapter(folder) for folder in shipped.adapter_folders()]
    assert [a.names for a in loaded] == [("a man", "a woman"), ("anti-unsafe",)]
    assert all(a.backbone["name"] == shipped.MODEL for a in loaded)
    model = load_backbone(shipped.MODEL, abstract=True)
    assert {a.backbone["unet_sha256"] for a in loaded} == {model.identity["unet_sha256"]}
    studio = open_studio(load_backbone(shipped.MODEL), [], [])
    start = studio.start()
    assert start.fair == "gender" and start.guidance_scale == 3.0
    assert studio.groups == {"gender": ["a man", "a woman"], "safety": ["anti-unsafe"]}
    named, open_, nothing = (
        plan(studio.painter, dataclasses.replace(start, prompt=prompt)).reasons[0]
        for prompt in ("a photo of a woman doctor", start.prompt, "a photo of a cat")
    )
    assert "names the gender" in named and "leaves the gender open" in open_
    assert "finds no person" in nothing
    safe = plan(studio.painter, dataclasses.replace(start, safe=True)).reasons[0]
    assert safe.endswith("Steered away from violence and smoking × 0.77: every prompt is steered.")
    assert studio.labels["anti-unsafe"] == "away from violence and smoking"
    assert "farmer" in studio.about
    assert studio.warning("doctor " * 200) == (
        "The prompt is too long for the model: its end is not read."
    )
    assert "does not know: mars." in studio.warning("a cook on Mars")
    assert studio.warning(start.prompt) == ""


def test_an_adapter_that_does_not_fit_is_refused_and_none_is_a_hint(tiny_backbone):
    with pytest.raises(UserError, match="mid-block shape"):
        Studio(tiny_backbone, [make_adapter(shape=(3, 4, 8))], ["here"])
    studio = Studio(tiny_backbone)
    assert "respodiff train" in studio.hint and studio.start().fair is None
    assert plan(studio.painter, studio.start()).reasons[0] == "Not steered: no adapter is loaded."


def test_an_address_in_use_is_reported_before_anything_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["play", "--port", str(port)]) == 2
    assert f"--port {port} cannot be used" in capsys.readouterr().err
