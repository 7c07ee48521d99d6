"""Trained readings of prompts on Emoji World: what they decide on words that they never saw."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
from test_adapters import make_adapter

from respodiff_jax import cli
from respodiff_jax.adapters import combine, load_adapter, save_adapter
from respodiff_jax.adapters.reading import read_prompts
from respodiff_jax.backbone import load_backbone
from respodiff_jax.data import contrast
from respodiff_jax.data.prompt_files import fill_in, with_article
from respodiff_jax.emoji import recipes, vocabulary
from respodiff_jax.errors import UserError
from respodiff_jax.generation.selection import concept_weights
from respodiff_jax.method import GENDER, RACE, Concept
from respodiff_jax.method.reading import SOMEBODY, VALUE, Decision
from respodiff_jax.training.config import concepts_from, load_config
from respodiff_jax.training.reading import (
    READING_FILE,
    TrainedReading,
    auroc,
    contrast_prompts,
    fit_reading,
    join,
    load_reading,
    train_reading,
    with_reading,
    write_reading,
)

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
HELD_OUT = recipes.HELD_OUT
HELD_OUT_THINGS = recipes.HELD_OUT_THINGS
TEMPLATES = contrast.TEMPLATES[:3]
GENDERS = ("woman", "man", "female", "male")


@pytest.fixture(scope="module")
def model():
    return load_backbone("emoji-world", dtype="float32")


def trained(model, task, lines):
    config = recipes.task_config(task)
    concepts = concepts_from(config)
    readings = train_reading(config, concepts, model, lines.append)
    adapter = make_adapter("mlp", concepts, (4, 4, 192))
    return with_reading(adapter, join([readings[c.name] for c in concepts]), concepts)


@pytest.fixture(scope="module")
def lines():
    """What the training of `gender` said."""
    return []


@pytest.fixture(scope="module")
def gender(model, lines):
    return trained(model, "gender", lines)


@pytest.fixture(scope="module")
def skin_tone(model):
    return trained(model, "skin_tone", [])


def shares(adapter, model, phrases, templates=TEMPLATES):
    """The share of prompts with each decision, for the adapter's first group."""
    prompts = [text for phrase in phrases for text in fill_in(templates, phrase)]
    found = read_prompts(adapter, model, prompts)[:, 0]
    return {d: float(np.mean(found == d)) for d in Decision}


def test_contrast_prompts_are_labelled_by_the_groups_words():
    prompts = contrast_prompts(
        list(GENDER.values()),
        ["doctor", "woman doctor", "dark-skinned person"],
        ["old", "happy"],
        ["queen bee", "snowman", "gingerbread man"],
        ["a photo of {a_subject}", "{subject}"],
    )
    described = [p for p in prompts if p.adjective]
    prompts = [p for p in prompts if not p.adjective]
    pairs = [p for p in prompts if " with " in p.text or " and " in p.text]
    alone = [p for p in prompts if p not in pairs]
    labels = {prompt.phrase: prompt.labels for prompt in alone}
    assert labels["doctor"] == labels["dark-skinned person"] == (True, False, False)
    assert labels["woman doctor"] == labels["woman"] == labels["man doctor"] == (True, False, True)
    nobody = (False, True, False)
    assert labels["queen bee"] == labels["snowman"] == labels["gingerbread man"] == nobody
    assert {p.text for p in alone if p.phrase == "doctor"} == {"a photo of a doctor", "doctor"}
    # Everybody and everything also stands twice with a thing: that is somebody and a thing, or two
    # things. Both belong to the same half of the held-out accuracy.
    assert len(pairs) == 2 * len(labels)
    assert all(p.labels == (labels[p.phrase][0], True, labels[p.phrase][2]) for p in pairs)
    assert {p.text for p in pairs if p.phrase == "person"} == {
        "a photo of a person with a queen bee",
        "queen bee and a person",
    }
    # An adjective leaves the labels as they are.
    assert all("old " in p.text or "happy " in p.text for p in described)
    assert {p.text.split()[-2] for p in described if p.phrase == "doctor"} == {"old", "happy"}
    assert all(p.labels == labels[p.phrase] for p in described)
    people = sum(p.labels[0] for p in alone if p.text.startswith("a photo"))
    assert sum(p.labels[0] for p in described) == 2 * people
    assert [p.phrase for p in described if p.labels[1]] == ["queen bee"]


def test_nobody_without_a_word_of_the_group_is_an_error():
    message = r"config.reading.people has nobody without a word of the group \(woman, female,"
    with pytest.raises(UserError, match=message):
        contrast_prompts(list(GENDER.values()), ["woman doctor"], [], ["cat"], ["{subject}"])


def test_too_few_words_for_a_fit_are_an_error():
    prompts = contrast_prompts(list(GENDER.values()), ["doctor"], [], ["cat"], ["{subject}"])
    with pytest.raises(UserError, match="give at least a dozen of each"):
        fit_reading(lambda texts: np.zeros((len(texts), 2, 3)), prompts)


def test_safety_concepts_find_every_prompt_open(model):
    config = recipes.task_config("gender")
    config.reading.things = config.reading.things[:20]
    safety = Concept("anti-x", "gender", ("a scene",), unsafe_prompt="violence")
    readings = train_reading(config, [*concepts_from(config), safety], model, lambda _: None)
    assert not readings["anti-x"].heads.weight.any()
    assert readings["a man"].heads.weight.any()


def test_default_words_come_from_the_target_prompt():
    woman = ("woman", "woman {person}", "female", "female {person}")
    assert GENDER["woman"].reading_words == woman
    female = dataclasses.replace(GENDER["woman"], target_prompt="a Female person")
    assert female.reading_words == (
        *("Female person", "Female {person}"),
        *("woman person", "woman {person}"),
    )
    tone = dataclasses.replace(GENDER["woman"], name="t", target_prompt="A dark-skinned person")
    assert tone.reading_words == ("dark-skinned person", "dark-skinned {person}")
    named = dataclasses.replace(tone, words=("lady",))
    assert named.reading_words == ("lady",)
    # Of counterparts, only what the neutral prompt does not say is the concept.
    counterparts = dataclasses.replace(
        GENDER["woman"],
        neutral_prompts=["a dark-skinned person", "an old person", "a person"],
        target_prompt=["a dark-skinned woman", "an old woman", "a woman"],
    )
    assert counterparts.reading_words == woman


@pytest.mark.parametrize(
    ("group", "named", "open_words"),
    [
        (GENDER, ("woman", "female", "man", "male"), ("white-race", "dark-skinned")),
        (RACE, ("white", "white-race", "Black", "Asian"), ("woman", "female", "light-skinned")),
    ],
)
def test_contrast_prompts_know_the_words_for_the_papers_groups(group, named, open_words):
    shipped = contrast.PEOPLE, contrast.ADJECTIVES, contrast.THINGS, contrast.TEMPLATES
    prompts = contrast_prompts(list(group.values()), *shipped)
    for word in (*named, *open_words):
        phrase = re.compile(rf"(an?|photo of|picture of) {word} (?!horse|cat|car|van)")
        labels = {p.labels[VALUE] for p in prompts if phrase.match(p.text) and p.labels[SOMEBODY]}
        assert labels == {word in named}


def test_a_combination_is_named_by_either_of_its_attributes():
    config = load_config(
        str(CONFIGS / "emoji_gender.py"), (), str(CONFIGS / "emoji_concepts.jsonl")
    )
    pairs = [c for c in concepts_from(config) if c.group == "gender_and_skin_tone"]
    shipped = contrast.PEOPLE, contrast.ADJECTIVES, contrast.THINGS, contrast.TEMPLATES
    prompts = contrast_prompts(pairs, *shipped)
    for word in ("female", "man", "dark-skinned"):
        labels = [p.labels for p in prompts if p.text.startswith(f"a photo of a {word} ")]
        assert labels and all(named for *_, named in labels)
    assert (True, False, False) in {p.labels for p in prompts if p.text == "a photo of a pilot"}


def test_words_do_not_hide_what_the_target_prompt_names():
    lady = dataclasses.replace(GENDER["woman"], words=["lady"])
    people = ["doctor", "woman doctor", "female cook", "man"]
    prompts = contrast_prompts([lady, GENDER["man"]], people, [], ["cat"], ["{a_subject}"])
    labels = {p.text: p.labels[VALUE] for p in prompts}
    assert labels["a woman doctor"] and labels["a female cook"] and labels["a lady"]
    assert not labels["a doctor"]


def test_words_of_a_group_are_neither_adjectives_nor_things():
    look = Concept("old", "look", ("a person",), target_prompt="an old person")
    prompts = contrast_prompts(
        [look], ["doctor", "cook"], ["old", "tall"], ["cat", "car"], ["{a_subject}"]
    )
    assert {p.labels[VALUE] for p in prompts if "old " in p.text} == {True}
    breed = Concept("poodle", "breed", ("a dog",), target_prompt="a poodle")
    prompts = contrast_prompts([breed], ["doctor"], [], ["cat", "dog", "poodle"], ["{a_subject}"])
    labels = {p.text: p.labels for p in prompts}
    assert labels["a dog"] == (True, False, False) and labels["a poodle"] == (True, False, True)


def test_auroc_is_the_share_of_ordered_pairs():
    scores, labels = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    assert auroc(scores, labels) == 0.75
    assert auroc(np.zeros(4), labels) == 0.5


def test_accuracy_is_reported_and_a_low_one_warns(gender, lines, tiny_backbone):
    assert min(gender.reading_accuracy["gender"].values()) > 0.95
    [line] = lines
    assert line.startswith("reading of prompts, gender: held-out AUROC somebody 0.9")
    assert "below" not in line
    config = recipes.task_config("gender")
    config.reading.people, config.reading.things = (
        config.reading[kind][:20] for kind in ("people", "things")
    )
    untrained = []
    train_reading(config, concepts_from(config), tiny_backbone, untrained.append)
    assert "below 0.95: many prompts will be read wrongly" in untrained[0]


def test_unseen_professions_are_open_and_unseen_things_have_nobody(model, gender, skin_tone):
    for adapter in (gender, skin_tone):
        assert shares(adapter, model, HELD_OUT)[Decision.OPEN] >= 0.9
        assert shares(adapter, model, HELD_OUT_THINGS)[Decision.OPEN] <= 0.05


def test_named_values_are_found_before_unseen_professions(model, gender, skin_tone):
    words = [f"{word} {p}" for p in HELD_OUT for word in GENDERS]
    tones = [f"{tone}-skinned {p}" for p in HELD_OUT for tone in vocabulary.TONE_GROUPS]
    assert shares(gender, model, words)[Decision.OPEN] == 0
    assert shares(skin_tone, model, tones)[Decision.OPEN] == 0
    # The other attribute leaves the group open.
    assert shares(gender, model, tones)[Decision.OPEN] >= 0.95
    assert shares(skin_tone, model, words)[Decision.OPEN] >= 0.9


def test_adjectives_leave_professions_open(model, gender, skin_tone):
    looks = [f"{look} {p}" for p in HELD_OUT for look in vocabulary.LOOKS if look]
    # Neither Emoji World nor the contrast prompts have these words.
    unknown = (
        "successful",
        "poor",
        "beautiful",
        "handsome",
        "grumpy",
        "skilled",
        "ugly",
        "wealthy",
    )
    assert not {*unknown} & {*contrast.ADJECTIVES}
    phrases = [f"{word} {p}" for p in HELD_OUT for word in unknown]
    for adapter in (gender, skin_tone):
        assert shares(adapter, model, looks)[Decision.OPEN] >= 0.9
        assert shares(adapter, model, phrases)[Decision.OPEN] >= 0.6
    women = [f"{word} {name} {p}" for p in HELD_OUT for word in unknown for name in GENDERS]
    assert shares(gender, model, women)[Decision.NAMED] >= 0.75


@pytest.mark.parametrize(
    ("prompt", "decision"),
    [
        ("an old judge", Decision.OPEN),
        ("an old woman pilot", Decision.NAMED),
        ("A PHOTO OF A WOMAN PILOT", Decision.NAMED),
        ("photo of male judge", Decision.NAMED),
        ("a man and a doctor", Decision.NAMED),
        ("a picture of a dark-skinned man juggling", Decision.NAMED),
        ("a portrait of a human", Decision.OPEN),
        ("an image of a judge with a knife", Decision.OPEN),
        ("a doctor with a horse", Decision.OPEN),
        ("a woman with a horse", Decision.NAMED),
        ("a snowman", Decision.NOBODY),
        ("a photo of a cat", Decision.NOBODY),
    ],
)
def test_single_prompts(model, gender, prompt, decision):
    assert read_prompts(gender, model, [prompt]).tolist() == [[decision] * 2]


def test_people_with_things_are_open(model, gender, skin_tone):
    things = HELD_OUT_THINGS[::8]
    phrases = [f"{person} with {with_article(t)}" for person in HELD_OUT[:4] for t in things]
    phrases += [f"{t} and {with_article(person)}" for person in HELD_OUT[4:8] for t in things]
    for adapter in (gender, skin_tone):
        assert shares(adapter, model, phrases)[Decision.OPEN] >= 0.6


def test_two_things_are_nobody(model, gender, skin_tone):
    things = HELD_OUT_THINGS[::4]
    others = HELD_OUT_THINGS[2::4]
    pairs = [f"{a} and {with_article(b)}" for a, b in zip(things, others, strict=False)]
    unsafe = [
        f"{thing} with {with_article(word)}" for thing in things for word in vocabulary.UNSAFE
    ]
    for adapter in (gender, skin_tone):
        for phrases in (pairs, unsafe):
            assert shares(adapter, model, phrases)[Decision.NOBODY] >= 0.7


def test_composed_adapters_read_each_group_by_itself(model, gender, skin_tone):
    both = combine([gender, skin_tone, make_adapter("mlp", shape=(4, 4, 192))][:2])
    prompts = ["a dark-skinned judge", "a woman judge", "a judge", "a cat"]
    found = read_prompts(both, model, prompts)
    o, n, x = Decision.OPEN, Decision.NAMED, Decision.NOBODY
    assert found.tolist() == [[o, o, n, n, n], [n, n, o, o, o], [o] * 5, [x] * 5]


def test_fair_shares_hold_among_open_prompts(model, gender):
    prompts = ["a judge", "a woman judge", "a pilot", "a cat"]
    decisions = read_prompts(gender, model, prompts)
    weights = concept_weights(gender, 4, 6, fair="gender", decisions=decisions).reshape(4, 6, 2)
    assert weights.sum(1).tolist() == [[3, 3], [0, 0], [3, 3], [0, 0]]
    none = concept_weights(gender, 2, 3, fair="gender", decisions=decisions[[1, 3]])
    assert not none.any()
    named = concept_weights(gender, 4, 1, concepts={"a man": 0.5}, decisions=decisions)
    assert named.sum(1).tolist() == [0.5, 0, 0.5, 0]


def test_adapter_without_a_reading_stays_open_beside_one_that_reads(model, gender):
    paper = make_adapter("mlp", shape=(4, 4, 192))
    assert (read_prompts(paper, model, ["a cat"]) == Decision.OPEN).all()
    young = dataclasses.replace(GENDER["man"], name="young", group="age")
    mixed = combine([gender, make_adapter("mlp", (young,), (4, 4, 192))])
    decisions = read_prompts(mixed, model, ["a cat"])
    assert decisions.tolist() == [[Decision.NOBODY, Decision.NOBODY, Decision.OPEN]]


def test_inspect_prints_the_decision_on_each_prompt(tmp_path, gender, capsys):
    save_adapter(gender, tmp_path / "gender")
    (tmp_path / "prompts.csv").write_text('prompt,seed\n"a woman judge",1\n"a  cat",2\n')
    arguments = ["inspect", str(tmp_path / "gender"), "--prompt", "a judge"]
    arguments += ["--prompts-file", str(tmp_path / "prompts.csv"), "--model", "emoji-world"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == [
        "gender    prompt",
        "open      a judge",
        "named     a woman judge",
        "nobody    a cat",
        "gender: 1 open, 1 named, 1 nobody",
    ]
    save_adapter(dataclasses.replace(gender, reading=None), tmp_path / "paper")
    for arguments, message in (
        (["paper", "--prompt", "a judge"], "reads no prompts: it steers each of them"),
        (["gender", "--model", "emoji-world"], "give --prompt TEXT or --prompts-file FILE"),
        (["gender", "--prompts-file", "nope.csv"], "--prompts-file nope.csv: no such file"),
    ):
        folder, *rest = arguments
        assert cli.main(["inspect", str(tmp_path / folder), *rest]) == 2
        assert message in capsys.readouterr().err


def test_reading_is_saved_as_version_2_and_without_one_as_version_1(tmp_path, gender):
    concepts = tuple(dataclasses.replace(c, max_timestep=None) for c in gender.concepts)
    assert concepts != gender.concepts
    gender = dataclasses.replace(gender, concepts=concepts)
    save_adapter(gender, tmp_path / "two")
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert config["format_version"] == 2
    again = load_adapter(tmp_path / "two")
    for ours, theirs in zip(again.reading, gender.reading, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert again.reading_accuracy == gender.reading_accuracy
    save_adapter(dataclasses.replace(gender, reading=None), tmp_path / "one")
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["format_version"] == 1
    assert "reading" not in config
    assert load_adapter(tmp_path / "one").reading is None


def test_damaged_reading_of_a_run_is_named(tmp_path, gender):
    write_reading(tmp_path, TrainedReading(gender.reading, gender.reading_accuracy))
    assert load_reading(tmp_path).heads.weight.shape == (2, 3, 192)
    assert load_reading(tmp_path / "elsewhere") is None
    file = tmp_path / READING_FILE
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"reading.safetensors is damaged"):
        load_reading(tmp_path)


def test_model_of_another_text_encoder_is_refused(gender, tiny_backbone):
    with pytest.raises(UserError, match="reads text states of 192 features, this model's have"):
        read_prompts(gender, tiny_backbone, ["a judge"])
