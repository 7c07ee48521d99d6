"""The biased world: who does what with which gender, skin tone and unsafe object, as an exact
published table.

A `Scene` is one subject (a person of some profession, activity or look, or a thing), and an unsafe
object or none. A subject that a caption leaves out is drawn first, whatever else is named: "a
woman" does what "a person" does. What else it leaves out is drawn from `BIAS`, so the bias a model
should learn is known in closed form: gender DevRat 0.51 and tone-group DevRat 0.64 over the
professions, unsafe content in nearly half of the pictures of people. Guidance makes more of the
first, and less of the last.
"""

import dataclasses

import numpy as np

from respodiff_jax.emoji import vocabulary


@dataclasses.dataclass(frozen=True)
class Bias:
    """What pictures of one subject show: P(woman), P(tone) of the five tones, P(unsafe)."""

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
# The same world without bias, in which its evaluator learns to judge.
EVEN = dict.fromkeys(BIAS, Bias(0.5, (1 / 6, 1 / 6, 1 / 3, 1 / 6, 1 / 6), 0.5))
UNSAFE_THINGS = 0.20  # P(unsafe) beside a thing

# what "a person" is: kind -> probability; within a kind all subjects are equally likely
PERSON_KINDS = {"profession": 0.8, "activity": 0.1, "look": 0.1}
P_PERSON_IN_SCENE = 0.7  # "a scene" (and no caption) shows a person, else a thing

_KINDS = {
    "profession": vocabulary.PROFESSIONS,
    "activity": vocabulary.ACTIVITIES,
    "look": vocabulary.LOOKS,
    "thing": vocabulary.THINGS,
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """One picture's content: `kind` is profession, activity, look or thing; a thing has no gender
    and no tone (None).

    `gender` indexes `vocabulary.GENDERS`, `tone` `vocabulary.TONES`; `unsafe` is a key of
    `vocabulary.UNSAFE` or None.
    """

    kind: str
    subject: str
    gender: int | None
    tone: int | None
    unsafe: str | None

    @property
    def tone_group(self):
        """Index into `vocabulary.TONE_GROUPS`, None for a thing."""
        return None if self.tone is None else vocabulary.TONE_GROUP_OF[self.tone]

    @property
    def artwork(self):
        """The name of the subject's sprite."""
        if self.kind == "thing":
            return vocabulary.THINGS[self.subject]
        return f"{_KINDS[self.kind][self.subject][self.gender]}/{self.tone}"


def subjects(kind):
    """The words of all subjects of a kind, in a fixed order."""
    return tuple(_KINDS[kind])


def tone_group_probabilities(tones):
    """(3,) probabilities of the tone groups from those of the five tones."""
    return np.bincount(vocabulary.TONE_GROUP_OF, weights=tones)


def gender_probabilities(bias):
    """(2,) probabilities in the order of `vocabulary.GENDERS`."""
    return np.array([bias.woman, 1 - bias.woman])


@dataclasses.dataclass(frozen=True)
class Claims:
    """What a caption says: None where it says nothing.

    `kind` is "person" (a profession, activity or look), or one of a `Scene`'s kinds; `subject`
    needs the latter. `unsafe` is the set of unsafe objects one of which must be there; the empty
    set says that there is none.
    """

    kind: str | None = None
    subject: str | None = None
    gender: int | None = None
    tone_group: int | None = None
    unsafe: frozenset[str] | None = None

    def hold(self, scene):
        """Whether everything said is true of a `Scene`."""
        if self.kind == "person":
            if scene.kind == "thing":
                return False
        elif self.kind is not None and self.kind != scene.kind:
            return False
        return (
            self.subject in (None, scene.subject)
            and self.gender in (None, scene.gender)
            and self.tone_group in (None, scene.tone_group)
            and (
                self.unsafe is None
                or (scene.unsafe in self.unsafe if self.unsafe else scene.unsafe is None)
            )
        )


def draw_scene(rng, claims, table=BIAS):
    """Draws what is not claimed: the subject first, everything else from the bias table.

    Args:
      rng: `numpy.random.Generator`.
      claims: `Claims`; gender and tone group are claimed of persons only.
      table: `BIAS` or `EVEN`.

    Returns:
      a `Scene` of which the claims hold.
    """
    kind, subject = claims.kind, claims.subject
    if subject is None:
        kind, subject = _draw_subject(rng, kind)
    if kind == "thing":
        return Scene("thing", subject, None, None, _draw_unsafe(rng, UNSAFE_THINGS, claims.unsafe))
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
    """(kind, word) when a caption has no subject."""
    if kind is None and rng.random() >= P_PERSON_IN_SCENE:
        kind = "thing"
    if kind in (None, "person"):
        kind = str(rng.choice(list(PERSON_KINDS), p=list(PERSON_KINDS.values())))
    words = subjects(kind)
    return kind, words[rng.integers(len(words))]
