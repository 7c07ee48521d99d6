"""Emoji World: bias, captions, artwork, pictures, tokenizer, dataset builder."""

import collections
import pathlib
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from evaluations import gender_probabilities, tone_group_probabilities
from PIL import Image
from transformers import CLIPTokenizer

from respodiff_jax import emoji
from respodiff_jax.adapters import load_adapter
from respodiff_jax.emoji import recipes, shipped, vocabulary
from respodiff_jax.emoji.making import artwork, captions, rendering, tokenizer, world
from respodiff_jax.emoji.making.emoji_world import emoji_world_dataset_builder as emoji_world
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation.metrics import deviation_ratio
from respodiff_jax.training.config import concepts_from


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(3)
    return [captions.draw(rng) for _ in range(6000)]


def test_using_emoji_world_imports_nothing_from_making():
    for file in pathlib.Path(emoji.__file__).parent.glob("*.py"):
        assert not re.search(r"^\s*(from|import) .*\bmaking\b", file.read_text(), re.MULTILINE), (
            file
        )


@pytest.mark.parametrize("folder", shipped.adapter_folders(), ids=lambda folder: folder.name)
def test_packaged_adapters_have_the_recipes_concepts(folder):
    task = {"gender": "gender", "safety": "safety_hardened"}[folder.name]
    concepts = concepts_from(recipes.task_config(task))
    assert sorted(concepts, key=lambda c: c.name) == sorted(
        load_adapter(folder).concepts, key=lambda c: c.name
    )


def _professions(measure):
    return np.mean([measure(world.BIAS[word]) for word in vocabulary.PROFESSIONS])


def test_bias_table_has_the_documented_bias():
    gender = _professions(lambda bias: deviation_ratio(gender_probabilities(bias)))
    tone = _professions(lambda bias: deviation_ratio(tone_group_probabilities(bias.tones)))
    assert len(vocabulary.PROFESSIONS) == 20
    assert 0.5 <= gender <= 0.6  # the pictures of the guided model have 0.6 to 0.7
    assert tone >= 0.5
    assert min(bias.unsafe for bias in world.BIAS.values()) >= 0.25
    for bias in world.BIAS.values():
        assert sum(bias.tones) == pytest.approx(1)


def test_captions_are_true_of_their_scenes(drawn):
    for caption, claims, scene in drawn:
        assert claims.hold(scene), (caption, claims, scene)
        for gender, word in enumerate(vocabulary.GENDERS):
            if word in caption.split():
                assert scene.gender == gender
        for group, word in enumerate(vocabulary.TONE_GROUPS):
            if f"{word}-skinned" in caption:
                assert scene.tone_group == group
        if scene.kind == "profession" and claims.subject:
            assert scene.subject in caption
        for unsafe in vocabulary.UNSAFE:
            if f"with a {unsafe}" in caption:
                assert scene.unsafe == unsafe


def test_false_claims_do_not_hold():
    scene = world.Scene("profession", "doctor", 0, 4, "knife")
    assert world.Claims().hold(scene)
    assert world.Claims("person", None, 0, 2, frozenset({"knife", "gun"})).hold(scene)
    for wrong in (
        world.Claims("thing"),
        world.Claims("activity"),
        world.Claims("profession", "judge"),
        world.Claims(gender=1),
        world.Claims(tone_group=0),
        world.Claims(unsafe=frozenset()),
        world.Claims(unsafe=frozenset({"gun"})),
    ):
        assert not wrong.hold(scene)


def test_open_attributes_follow_the_bias_table():
    rng = np.random.default_rng(0)
    claims = world.Claims("profession", "farmer")
    scenes = [world.draw_scene(rng, claims) for _ in range(4000)]
    bias = world.BIAS["farmer"]
    tones = np.bincount([scene.tone for scene in scenes], minlength=5) / len(scenes)
    assert np.mean([scene.gender == 0 for scene in scenes]) == pytest.approx(bias.woman, abs=0.02)
    assert np.mean([scene.unsafe is not None for scene in scenes]) == pytest.approx(
        bias.unsafe, abs=0.025
    )
    np.testing.assert_allclose(tones, bias.tones, atol=0.025)


def test_scenes_are_safe_and_persons_may_be_unsafe(drawn):
    def unsafe(*texts):
        return np.mean([scene.unsafe is not None for text, _, scene in drawn if text in texts])

    assert unsafe(*captions.SCENE_CAPTIONS) == 0
    assert unsafe("") > 0.3
    assert unsafe("a person", "a photo of a person") > 0.3


def test_subject_does_not_depend_on_named_attributes():
    rng = np.random.default_rng(0)
    for claims in ({}, {"gender": 0}, {"gender": 1}, {"unsafe": frozenset({"gun"})}):
        scenes = [world.draw_scene(rng, world.Claims("person", **claims)) for _ in range(4000)]
        kinds = collections.Counter(scene.kind for scene in scenes)
        for kind, probability in world.PERSON_KINDS.items():
            assert kinds[kind] / len(scenes) == pytest.approx(probability, abs=0.03)
        counts = collections.Counter(scene.subject for scene in scenes)
        for profession in vocabulary.PROFESSIONS:
            expected = world.PERSON_KINDS["profession"] / len(vocabulary.PROFESSIONS)
            assert counts[profession] / len(scenes) == pytest.approx(expected, abs=0.012)


def test_even_world_has_no_bias():
    rng = np.random.default_rng(0)
    naming = captions.Naming(gender=0, tone=0, unsafe=0, safe=0)
    scenes = [captions.draw(rng, naming, world.EVEN)[2] for _ in range(3000)]
    people = [scene for scene in scenes if scene.kind != "thing"]
    for attribute, count in (("gender", 2), ("tone_group", 3)):
        shares = np.bincount([getattr(scene, attribute) for scene in people]) / len(people)
        np.testing.assert_allclose(shares, 1 / count, atol=0.04)
    assert np.mean([scene.unsafe is not None for scene in people]) == pytest.approx(0.5, abs=0.04)


def test_captions_occur_as_often_as_specified(drawn):
    texts = collections.Counter(text for text, _, _ in drawn)
    assert texts[""] / len(drawn) == pytest.approx(captions.KINDS["nothing"], abs=0.015)
    for text in ("a scene", "a person", "a photo of a person", "a photo of a doctor"):
        assert texts[text] > 0


@pytest.mark.parametrize(
    ("claims", "style", "expected"),
    [
        (world.Claims("profession", "doctor", 0, 2), 1, "dark-skinned woman doctor"),
        (world.Claims("profession", "doctor", 1), 0, "male doctor"),
        (world.Claims("person", tone_group=0), 0, "light-skinned person"),
        (world.Claims("look", "blond", 1), 0, "blond man"),
        (world.Claims("look", ""), 0, "person"),
        (world.Claims("activity", "running", 0), 0, "woman running"),
        (world.Claims("thing", "dog"), 0, "dog"),
    ],
)
def test_claims_are_described_in_words(claims, style, expected):
    assert captions.describe(claims, style) == expected


def test_every_subject_has_artwork():
    sprites = artwork.sprites()
    for kind in ("profession", "activity", "look"):
        for word in world.subjects(kind):
            for gender in range(2):
                shades = [
                    sprites[world.Scene(kind, word, gender, tone, None).artwork]
                    for tone in range(5)
                ]
                assert all(not np.array_equal(shades[0], other) for other in shades[1:])
    for word in vocabulary.THINGS:
        sprite = sprites[world.Scene("thing", word, None, None, None).artwork]
        assert sprite.shape == (64, 64, 4)
        assert sprite[..., 3].max() == 255
    unsafe = {name for name, _ in vocabulary.UNSAFE.values()}
    assert unsafe <= sprites.keys()
    assert not unsafe & set(vocabulary.THINGS.values())  # no thing is unsafe


def test_artwork_table_without_an_emoji_is_refused():
    with pytest.raises(UserError, match=r"lacks.*female-farmer"):
        artwork.sprite_files([])


def test_scene_and_seed_determine_the_picture():
    scene = world.Scene("profession", "doctor", 0, 4, "knife")

    def render(seed):
        return rendering.render(scene, np.random.default_rng(seed))

    assert render(1).shape == (64, 64, 3)
    assert render(1).dtype == np.uint8
    np.testing.assert_array_equal(render(1), render(1))
    assert not np.array_equal(render(1), render(2))


def test_unsafe_object_is_visible_in_the_picture():
    rng = np.random.default_rng
    safe = world.Scene("look", "", 0, 0, None)
    bloody = world.Scene("look", "", 0, 0, "drop of blood")

    def red(scene):
        pictures = [rendering.render(scene, rng(seed)).astype(int) for seed in range(20)]
        return np.mean([((p[..., 0] > 180) & (p[..., 1:].max(-1) < 90)).sum() for p in pictures])

    assert red(bloody) > red(safe) + 100


def test_clothes_do_not_show_the_gender():
    rng = np.random.default_rng(1)

    def purple_and_teal(gender):
        """Shares of the pictures' area in the colours of the artwork's women and men."""
        shares = []
        for kind in ("profession", "activity", "look"):
            for word in world.subjects(kind) * 6:
                scene = world.Scene(kind, word, gender, int(rng.integers(5)), None)
                picture = Image.fromarray(rendering.render(scene, rng)).convert("HSV")
                hue, saturation, value = np.moveaxis(np.asarray(picture) / 255, -1, 0)
                cloth = (saturation > 0.6) & (value > 0.4)  # backgrounds are pale
                purple, teal = (hue > 0.69) & (hue < 0.76), (hue > 0.44) & (hue < 0.53)
                shares.append([(cloth & colour).mean() for colour in (purple, teal)])
        return np.mean(shares, axis=0)

    np.testing.assert_allclose(purple_and_teal(0), purple_and_teal(1), atol=0.01)


def test_smearing_changes_part_of_the_picture():
    picture = rendering.render(
        world.Scene("profession", "farmer", 0, 2, "knife"), np.random.default_rng(0)
    )

    def smear(seed):
        return rendering.smear(picture, np.random.default_rng(seed))

    changed = np.array([(smear(seed) != picture).any(-1).mean() for seed in range(40)])
    assert smear(3).dtype == np.uint8 and smear(3).shape == picture.shape
    np.testing.assert_array_equal(smear(3), smear(3))
    assert 0 < (changed == 0).mean() < 0.5  # a quarter is not changed
    assert 0.05 < changed[changed > 0].mean() < 0.5


def test_most_frequent_pair_is_merged_first():
    merges = tokenizer.learn_merges({"aab": 3, "ab": 2})
    assert merges == [("a", "b</w>"), ("a", "ab</w>")]


def test_tokenizer_has_a_token_per_word(tmp_path, drawn):
    tokenizer.write_tokenizer(tmp_path, seed=0)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == tokenizer.CONTEXT_LENGTH
    assert loaded.pad_token_id == loaded.eos_token_id == len(loaded) - 1
    for caption in {text for text, _, _ in drawn[:400]}:
        ids = loaded(caption).input_ids
        assert len(ids) <= tokenizer.CONTEXT_LENGTH
        assert len(ids) == 2 + len(caption.replace("-", " - ").split())
        back = loaded.decode(ids, skip_special_tokens=True)
        assert back.replace(" - ", "-").strip() == caption
    strange = loaded.decode(loaded("Zürich 42!").input_ids, skip_special_tokens=True)
    assert strange.replace(" ", "") == "zürich42!"


def test_dataset_builder_writes_true_labels(tmp_path, monkeypatch):
    sizes = {"train": 20, "test": 6}
    monkeypatch.setattr(emoji_world, "SIZES", sizes)
    builder = emoji_world.Builder(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == sizes
    examples = list(builder.as_data_source("test"))
    captions_seen = {example["caption"].decode() for example in examples}
    assert captions_seen == {emoji_world.example("test", index)["caption"] for index in range(6)}
    for example in examples:
        assert example["image"].shape == (64, 64, 3)
        tone, group = example["tone"], example["tone_group"]
        is_person = tone < len(vocabulary.TONES)
        assert group == (vocabulary.TONE_GROUP_OF[tone] if is_person else 3)
        assert (example["gender"] < 2) == is_person
    assert isinstance(builder, tfds.core.GeneratorBasedBuilder)
