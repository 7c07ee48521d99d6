"""What the metrics mean, how their numbers are written, and the paper's numbers."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping

from respodiff_jax.evaluation.results import Measurement

HEADLINES = (
    "deviation_ratio",
    "unsafe_rate",
    "unsafe_when_not_asked",
    "unsafe_when_asked",
    "attack_success",
    "clip_score",
)


def _decimals(x: float, places: int = 2) -> str:
    """A number with a minus sign instead of a hyphen, and no sign if all decimals are 0."""
    return f"{x:z.{places}f}".replace("-", "−")


def _thousandths(x: float) -> str:
    return _decimals(1000 * x)


def percent(x: float) -> str:
    """A share as "12 %", with one decimal below 10 % and a no-break space."""
    return f"{100 * x:.{0 if x == 0 or x >= 0.0995 else 1}f}\u00a0%"


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric in words.

    Attributes:
      label: name in headings.
      phrase: name within a sentence.
      definition: text that continues "The {phrase} is".
      better: whether "lower" or "higher" values are better, or None.
      text: writes a value.
      best: what the better value is, in a word.
      within: the smallest and the largest possible value.
      paper: attribute (None for any) -> the paper's numbers of base model and RespoDiff, as text.
    """

    label: str
    phrase: str
    definition: str = ""
    better: str | None = None
    text: Callable[[float], str] = _decimals
    best: str = "better"
    within: tuple[float, float] = (-math.inf, math.inf)
    paper: Mapping[str | None, tuple[str, str]] = dataclasses.field(default_factory=dict)


# A share of pictures, and a deviation from target shares.
_share = functools.partial(Metric, text=percent, within=(0.0, 1.0))
_deviation = functools.partial(Metric, better="lower", best="fairer", within=(0.0, 1.0))

METRICS = {
    "deviation_ratio": _deviation(
        "Deviation ratio",
        "deviation ratio",
        "how far the pictures of a profession are from the target shares, on average over the"
        " professions: 0 meets the target, 1 is as far away as possible. Few pictures deviate by"
        " chance: with a fair model and two values, 10 pictures of a profession have 0.25 on"
        " average, 150 have 0.07.",
        paper={"gender": ("0.68", "0.14"), "race": ("0.56", "0.16")},
    ),
    "winoalign": Metric(
        "WinoAlign",
        "WinoAlign score",
        "the CLIP score of the professions' pictures with their prompts.",
        "higher",
        paper={None: ("27.51", "27.30 gender, 27.53 race")},
    ),
    "subject_recognised": _share(
        "Profession recognised",
        "share of pictures recognised as their profession",
        "the share of pictures in which the classifier sees the profession of the prompt.",
        "higher",
    ),
    "unsafe_rate": _share(
        "Unsafe pictures",
        "share of unsafe pictures",
        "the share of pictures in which a detector finds unsafe content.",
        "lower",
        paper={None: ("27 %", "16 %")},
    ),
    "unsafe_rate_at": _share(
        "Unsafe pictures",
        "share of unsafe pictures",
        "the share of pictures in which a detector finds unsafe content, at one of its thresholds.",
        "lower",
    ),
    "attack_success": _share(
        "Attack success",
        "attack success",
        "the share of unsafe pictures of prompts that ask for what is unsafe. The prompts are used"
        " as they are, after words that an attacker found, and after free embeddings that it found."
        " The attacker knows model and adapter, but not what judges the pictures. The base pictures"
        " use the same words and embeddings.",
        "lower",
    ),
    "obeyed": _share(
        "Named value shown",
        "share of pictures that show the value that their prompt names",
        "the share of pictures in which the classifier sees the value that the prompt names (“a"
        " photo of a woman doctor”).",
        "higher",
    ),
    "named_deviation_ratio": _deviation(
        "Deviation ratio where another attribute is named",
        "deviation ratio where prompts name another attribute",
        "the deviation ratio of all pictures of prompts that name another attribute.",
    ),
    "attribute_kept": _share(
        "Other attribute kept",
        "share of pictures that keep the attribute of their base picture",
        "the share of pictures in which the classifier sees the same value as in the base picture"
        " from the same noise.",
        "higher",
    ),
    "unchanged": _share(
        "Pictures without people unchanged",
        "share of pictures without people that are unchanged to the bit",
        "the share of the pictures of prompts without people that equal the base picture in every"
        " pixel.",
        "higher",
    ),
    "pixel_change": Metric(
        "Change of pictures without people, grey levels",
        "change of pictures without people, in grey levels,",
        "the mean absolute difference from the base picture, in grey levels from 0 to 255.",
        "lower",
    ),
    "nobody_clip_score": Metric(
        "CLIP score without people",
        "CLIP score of prompts without people",
        "the CLIP score of the pictures of prompts without people.",
        "higher",
    ),
    "steered": _share(
        "Prompts steered",
        "share of prompts that are steered",
        "the share of pictures that the adapter's fairness concepts steer. Pictures of open prompts"
        " should be steered; those of prompts that name a value or no person should not.",
    ),
    "unsafe_when_asked": _share(
        "Unsafe when asked for",
        "share of unsafe pictures of prompts that ask for it",
        "the share of unsafe pictures of prompts such as “a doctor with a knife”.",
        "lower",
    ),
    "unsafe_when_not_asked": _share(
        "Unsafe when not asked for",
        "share of unsafe pictures of prompts that do not ask for it",
        "the share of unsafe pictures of open prompts.",
        "lower",
    ),
    "attribute_kept_when_typed": _share(
        "Other attribute kept when a value is typed",
        "share of pictures that keep their other attribute when a value is typed",
        "the share of the base model's pictures in which the classifier sees the same value whether"
        " or not the prompt names a value of another attribute, from the same noise. Compare"
        " “Other attribute kept” with it.",
    ),
    "deviation_ratio_at": _deviation(
        "Deviation ratio",
        "deviation ratio",
        "the deviation ratio at one guidance scale, or with an adjective before the subject.",
    ),
    "judges_agree": _share(
        "Judges agree",
        "share of pictures on which two judges agree",
        "the share of pictures to which the first CLIP and another one give the same label.",
    ),
    "clip_score": Metric(
        "CLIP score",
        "CLIP score",
        "100 times the cosine between the CLIP embeddings of a picture and its prompt, on average.",
        "higher",
        paper={None: ("31.33", "30.67")},
    ),
    "fid": Metric(
        "FID",
        "FID",
        "the Fréchet distance of Inception features to the reference pictures'. It is larger for"
        " fewer pictures: compare only equal numbers of pictures.",
        "lower",
        paper={None: ("14.09", "14.91 gender, 12.82 race, 17.89 safe")},
    ),
    "clip_frechet_distance": Metric(
        "CLIP Fréchet distance",
        "CLIP Fréchet distance",
        "the Fréchet distance of CLIP features to the reference pictures', by default the base"
        " model's. Its scale differs from FID's. It is larger for fewer pictures: compare only"
        " equal numbers of pictures.",
        "lower",
        functools.partial(_decimals, places=4),
    ),
    "clip_kernel_distance": Metric(
        "CLIP kernel distance × 1000",
        "CLIP kernel distance × 1000",
        "the kernel distance (polynomial MMD) of CLIP features to the reference pictures'. Its"
        " scale differs from KID's. Around 0 there is no visible difference.",
        "lower",
        _thousandths,
    ),
    "kid": Metric(
        "KID × 1000",
        "KID × 1000",
        "the kernel distance (polynomial MMD) of Inception features to the reference pictures'."
        " Around 0 there is no visible difference.",
        "lower",
        _thousandths,
    ),
}


def metric(name: str) -> Metric:
    """The description of a metric; of an unknown metric only its name in words."""
    words = readable(name)
    return METRICS.get(name) or Metric(words.capitalize(), words)


def readable(name: str) -> str:
    """A name in words: "gender x skin_tone" is "gender × skin tone"."""
    return name.replace("_", " ").replace(" x ", " × ")


def label(measurement: Measurement) -> str:
    """A measurement's metric, attribute and judge, and its version unless it is 1."""
    parts = [metric(measurement.metric).label]
    if measurement.attribute:
        parts.append(readable(measurement.attribute))
    if measurement.judge:
        parts.append(f"by {measurement.judge}")
    if measurement.version != 1:
        parts.append(f"version {measurement.version}")
    return ", ".join(parts)


def named(measurement: Measurement) -> str:
    """A measurement's attribute and metric within a sentence: "gender deviation ratio"."""
    attribute, _, condition = readable(measurement.attribute or "").partition(", ")
    parts = attribute, metric(measurement.metric).phrase, condition and f"({condition})"
    return " ".join(filter(None, parts))


def paper(measurement: Measurement) -> tuple[str, str] | None:
    """The paper's numbers for a measurement, of base model and RespoDiff, or None."""
    known = metric(measurement.metric).paper
    return known.get(measurement.attribute, known.get(None))


def value_text(measurement: Measurement) -> str:
    return metric(measurement.metric).text(measurement.value)


def interval_text(measurement: Measurement) -> str | None:
    """The interval as "0.05–0.12", or "−0.12 to 0.05", or None."""
    if measurement.interval is None:
        return None
    low, high = map(metric(measurement.metric).text, measurement.interval)
    low = low.removesuffix("\u00a0%")
    return f"{low} to {high}" if "−" in low else f"{low}–{high}"


def signed(measurement: Measurement, difference: float) -> str:
    """A difference of values as "+0.03", "−0.12" or, if it rounds to nothing, "0.00"."""
    write = metric(measurement.metric).text
    text = write(abs(difference))
    sign = "" if text == write(0.0) else "−" if difference < 0 else "+"
    return f"{sign}{text}"


def change_text(measurement: Measurement) -> str | None:
    """The interval of the change as "−0.12 to +0.03", or None."""
    if measurement.change is None:
        return None
    return " to ".join(signed(measurement, x) for x in measurement.change)


def change(pair: Mapping[str, Measurement]) -> tuple[str, str | None] | None:
    """The change from base to adapted pictures and its interval, as texts; None without both."""
    if not {"base", "adapted"} <= set(pair):
        return None
    after = pair["adapted"]
    return signed(after, after.value - pair["base"].value), change_text(after)


def overall(measurements: Iterable[Measurement]) -> list[dict[str, Measurement]]:
    """Measurements over all subjects: one mapping, by set of pictures, for each quantity.

    A quantity has one metric, attribute, part, judge and version.
    """
    together: dict[tuple, dict[str, Measurement]] = {}
    for m in measurements:
        if m.subject is None:
            key = (m.part, m.metric, m.attribute, m.judge, m.version)
            together.setdefault(key, {})[m.picture_set] = m
    return list(together.values())


def sentence(pair: Mapping[str, Measurement], interval: bool = False) -> str:
    """A sentence about a quantity: "The gender deviation ratio falls from 0.66 to 0.08".

    Args:
      pair: the quantity by set of pictures.
      interval: whether to add the interval of a change that may be chance.
    """
    first = next(iter(pair.values()))
    what = f"The {named(first)}"
    if not {"base", "adapted"} <= set(pair):
        whose = {"base": " of the base model", "adapted": " with the adapter", "given": ""}
        return f"{what}{whose[first.picture_set]} is {value_text(first)}"
    before, after = pair["base"], pair["adapted"]
    texts = value_text(before), value_text(after)
    if texts[0] == texts[1]:
        return f"{what} stays at {texts[0]}"
    verb = "falls" if after.value < before.value else "rises"
    by_chance = after.change is not None and after.change[0] <= 0 <= after.change[1]
    doubt = ", which may be chance" if by_chance else ""
    if by_chance and interval:
        doubt += f" ({change_text(after)})"
    return f"{what} {verb} from {texts[0]} to {texts[1]}{doubt}"


def certainty(pair: Mapping[str, Measurement]) -> str:
    """Sentences on the intervals of a quantity and on what is better; "" if there are neither."""
    whose = {"base": " before", "adapted": " after", "given": ""}
    found = [f"{text}{whose[s]}" for s, m in pair.items() if (text := interval_text(m))]
    info = metric(next(iter(pair.values())).metric)
    parts = [
        found and f"With 95 % confidence it is {' and '.join(found)}.",
        info.better and f"{info.better.capitalize()} is {info.best}.",
    ]
    return " ".join(filter(None, parts))
