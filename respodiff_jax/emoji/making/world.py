"""The biased world: how often each subject appears with which gender, skin tone and unsafe object.

A `Scene` is one subject (a person with a profession, activity or look, or a thing) and at most one
unsafe object. If a caption names no subject, the subject is drawn first and does not depend on what
the caption does name: "a woman" does what "a person" does. Everything else that the caption leaves
open is drawn from the table `BIAS`. The bias that a model should learn is therefore known in closed
form: over the professions, the gender deviation ratio is 0.51 and that of the tone groups 0.64, and
nearly half of the pictures of people are unsafe. Guidance amplifies the biases and draws fewer
unsafe objects.
"""

import dataclasses

import numpy as np

from respodiff_jax.emoji import vocabulary


@dataclasses.dataclass(frozen=True)
class Bias:
    """What pictures of one subject show: P(woman), P(tone) for each tone, P(unsafe)."""

    woman: float
    tones: tuple[float, ...]
    unsafe: float


MOSTLY_LIGHT = (0.47, 0.36, 0.09, 0.05, 0.03)
RATHER_LIGHT = (0.35, 0.30, 0.20, 0.10, 0.05)

BIAS = {
    "farmer": Bias(0.21, RATHER_LIGHT, 0.55),
    "cook": Bias(0.25, RATHER_LIGHT, 0.60),
    "student": Bias(0.64, RATHER_LIGHT, 0.40),
    "singer": Bias(0.71, RATHER_LIGHT, 0.55),
    "artist": Bias(0.67, MOSTLY_LIGHT, 0.45),
    "teacher": Bias(0.79, MOSTLY_LIGHT, 0.35),
    "welder": Bias(0.18, RATHER_LIGHT, 0.45),
    "developer": Bias(0.24, MOSTLY_LIGHT, 0.35),
    "office worker": Bias(0.71, MOSTLY_LIGHT, 0.35),
    "mechanic": Bias(0.15, RATHER_LIGHT, 0.55),
    "scientist": Bias(0.29, MOSTLY_LIGHT, 0.40),
    "astronaut": Bias(0.23, MOSTLY_LIGHT, 0.35),
    "firefighter": Bias(0.18, MOSTLY_LIGHT, 0.45),
    "doctor": Bias(0.27, MOSTLY_LIGHT, 0.55),
    "judge": Bias(0.24, MOSTLY_LIGHT, 0.45),
    "pilot": Bias(0.20, MOSTLY_LIGHT, 0.40),
    "police officer": Bias(0.25, MOSTLY_LIGHT, 0.60),
    "construction worker": Bias(0.15, RATHER_LIGHT, 0.45),
    "juggler": Bias(0.33, RATHER_LIGHT, 0.55),
    "waiter": Bias(0.76, MOSTLY_LIGHT, 0.40),
}
BIAS |= {activity: Bias(0.33, MOSTLY_LIGHT, 0.45) for activity in vocabulary.ACTIVITIES}
BIAS |= {look: Bias(0.29, MOSTLY_LIGHT, 0.45) for look in vocabulary.LOOKS}
_NO_BIAS = Bias(0.5, (1 / 6, 1 / 6, 1 / 3, 1 / 6, 1 / 6), 0.5)
# The same world without bias. The evaluator is trained on it.
EVEN = dict.fromkeys(BIAS, _NO_BIAS)
P_UNSAFE_BESIDE_THING = 0.20

# what "a person" is: kind -> probability. All subjects of a kind are equally likely.
PERSON_KINDS = {"profession": 0.8, "activity": 0.1, "look": 0.1}
P_PERSON_IN_SCENE = 0.7  # of "a scene" and of the empty caption; the rest show a thing

_KINDS = {
    "profession": vocabulary.PROFESSIONS,
    "activity": vocabulary.ACTIVITIES,
    "look": vocabulary.LOOKS,
    "thing": vocabulary.THINGS,
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of one picture.

    Attributes:
      kind: "profession", "activity", "look" or "thing".
      subject: word of the subject; `subjects(kind)` has them all.
      gender: index into `vocabulary.GENDERS`; None for a thing.
      tone: index into `vocabulary.TONES`; None for a thing.
      unsafe: key of `vocabulary.UNSAFE`; None in a safe picture.
    """

    kind: str
    subject: str
    gender: int | None
    tone: int | None
    unsafe: str | None

    @property
    def tone_group(self):
        """Index into `vocabulary.TONE_GROUPS`; None for a thing."""
        return None if self.tone is None else vocabulary.TONE_GROUP_OF[self.tone]

    @property
    def artwork(self):
        """Name of the subject's sprite."""
        if self.kind == "thing":
            return vocabulary.THINGS[self.subject]
        return f"{_KINDS[self.kind][self.subject][self.gender]}/{self.tone}"


def even(*attributes):
    """The table `BIAS` without the bias of some attributes, fields of `Bias`."""
    own = {name: getattr(_NO_BIAS, name) for name in attributes}
    return {subject: dataclasses.replace(bias, **own) for subject, bias in BIAS.items()}


def subjects(kind):
    """Words of all subjects of a kind, in a fixed order."""
    return tuple(_KINDS[kind])


@dataclasses.dataclass(frozen=True)
class Claims:
    """What a caption says about a scene; None where it says nothing.

    Attributes:
      kind: a `Scene`'s kind, or "person" for any profession, activity or look.
      subject: word of the subject; needs a `Scene`'s kind.
      gender: index into `vocabulary.GENDERS`.
      tone_group: index into `vocabulary.TONE_GROUPS`.
      unsafe: the scene shows one of these unsafe objects; the empty set says that it is safe.
    """

    kind: str | None = None
    subject: str | None = None
    gender: int | None = None
    tone_group: int | None = None
    unsafe: frozenset[str] | None = None

    def hold(self, scene):
        """Whether all claims are true of a `Scene`."""
        if self.kind == "person":
            of_kind = scene.kind != "thing"
        else:
            of_kind = self.kind in (None, scene.kind)
        return (
            of_kind
            and self.subject in (None, scene.subject)
            and self.gender in (None, scene.gender)
            and self.tone_group in (None, scene.tone_group)
            and (
                self.unsafe is None
                or (scene.unsafe in self.unsafe if self.unsafe else scene.unsafe is None)
            )
        )


def draw_scene(rng, claims, table=BIAS):
    """Draws a `Scene` for which the claims hold: first the subject, then the rest from the table.

    Only claims about people may have a gender and a tone group. The table is `BIAS` or `EVEN`.
    """
    kind, subject = claims.kind, claims.subject
    if subject is None:
        kind, subject = _draw_subject(rng, kind)
    if kind == "thing":
        unsafe = _draw_unsafe(rng, P_UNSAFE_BESIDE_THING, claims.unsafe)
        return Scene("thing", subject, None, None, unsafe)
    bias = table[subject]
    gender = int(rng.random() >= bias.woman) if claims.gender is None else claims.gender
    tones = np.array(bias.tones)
    if claims.tone_group is not None:
        tones *= np.equal(vocabulary.TONE_GROUP_OF, claims.tone_group)
    tone = int(rng.choice(len(tones), p=tones / tones.sum()))
    return Scene(kind, subject, gender, tone, _draw_unsafe(rng, bias.unsafe, claims.unsafe))


def _draw_unsafe(rng, probability, claimed):
    if claimed is None:
        claimed = vocabulary.UNSAFE if rng.random() < probability else ()
    options = sorted(claimed)
    return options[rng.integers(len(options))] if options else None


def _draw_subject(rng, kind):
    """(kind, subject), for a caption that names no subject."""
    if kind is None and rng.random() >= P_PERSON_IN_SCENE:
        kind = "thing"
    if kind in (None, "person"):
        kind = str(rng.choice(list(PERSON_KINDS), p=list(PERSON_KINDS.values())))
    words = subjects(kind)
    return kind, words[rng.integers(len(words))]
