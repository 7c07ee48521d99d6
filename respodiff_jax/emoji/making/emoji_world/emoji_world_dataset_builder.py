"""`tensorflow_datasets` builder of Emoji World; needs no TensorFlow.

    builder = Builder(data_dir=DIR, file_format="array_record")
    builder.download_and_prepare()
    examples = builder.as_data_source("train")  # random access
    examples[0]["image"]  # (64, 64, 3) uint8

Nothing is downloaded: the pictures are drawn from the package's artwork. The split and the index of
an example determine it.
"""

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from respodiff_jax.emoji import vocabulary
from respodiff_jax.emoji.making import captions, rendering
from respodiff_jax.images import to_png

SIZES = {"train": 50_000, "test": 5_000}
_NONE = "none"  # label of an attribute that the picture does not have


class Builder(tfds.core.GeneratorBasedBuilder):
    """Captioned pictures of a biased world, with the true value of every attribute."""

    name = "emoji_world"
    VERSION = tfds.core.Version("3.0.0")

    def _info(self):
        labels = {
            "gender": vocabulary.GENDERS,
            "tone": vocabulary.TONES,
            "tone_group": vocabulary.TONE_GROUPS,
            "profession": tuple(vocabulary.PROFESSIONS),
            "unsafe": tuple(vocabulary.UNSAFE),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__.split("\n")[0],
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(rendering.IMAGE_SIZE, rendering.IMAGE_SIZE, 3), encoding_format="png"
                    ),
                    "caption": tfds.features.Text(),
                    "subject": tfds.features.Text(),
                    **{
                        key: tfds.features.ClassLabel(names=[*names, _NONE])
                        for key, names in labels.items()
                    },
                }
            ),
            supervised_keys=("caption", "image"),
            license="Artwork: Noto Emoji, Copyright Google, Apache License 2.0",
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SIZES}

    def _generate_examples(self, split):
        for index in range(SIZES[split]):
            yield index, example(split, index)


def example(split, index):
    """Features of the example with this split and index."""
    rng = np.random.default_rng([list(SIZES).index(split), index])
    caption, _, scene = captions.draw(rng)
    is_person = scene.kind != "thing"
    return {
        # Given an array, the feature would need TensorFlow to encode it.
        "image": to_png(Image.fromarray(rendering.render(scene, rng))),
        "caption": caption,
        "subject": scene.subject,
        "gender": vocabulary.GENDERS[scene.gender] if is_person else _NONE,
        "tone": vocabulary.TONES[scene.tone] if is_person else _NONE,
        "tone_group": vocabulary.TONE_GROUPS[scene.tone_group] if is_person else _NONE,
        "profession": scene.subject if scene.kind == "profession" else _NONE,
        "unsafe": scene.unsafe or _NONE,
    }
