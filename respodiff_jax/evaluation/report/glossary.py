"""What the metrics mean, how their numbers are written, and what the paper found."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

from respodiff_jax.evaluation.results import Measurement

IMAGES = ("base", "adapted", "given")


def _decimals(x: float, places: int = 2) -> str:
    """With the sign of minus, and none where all decimals are 0."""
    return f"{x:z.{places}f}".replace("-", "−")


def _small(x: float) -> str:
    return _decimals(x, 4)


def _thousandths(x: float) -> str:
    return _decimals(1000 * x)


def percent(x: float) -> str:
    """A share as "12 %", with a decimal below 10 % and a space that does not break."""
    return f"{100 * x:.{0 if x == 0 or x >= 0.0995 else 1}f}\u00a0%"


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric in words.

    Attributes:
      label: its name.
      phrase: its name within a sentence.
      definition: one sentence.
      better: "lower", "higher" or None.
      text: writes a value.
      best: in a word, what lower or higher is.
      within: the least and the greatest value there can be.
      paper: attribute, or None for any, -> the paper's base and RespoDiff, as text.
    """

    label: str
    phrase: str
    definition: str = ""
    better: str | None = None
    text: Callable[[float], str] = _decimals
    best: str = "better"
    within: tuple[float, float] = (-math.inf, math.inf)
    paper: Mapping[str | None, tuple[str, str]] = dataclasses.field(default_factory=dict)


METRICS = {
    "deviation_ratio": Metric(
        "Deviation ratio",
        "deviation ratio",
        "how far the pictures of a profession are from the target shares, on average over the"
        " professions: 0 is as targeted, 1 is as far as can be. Few pictures deviate by chance: of"
        " a fair model and two values, 10 of a profession have 0.25 on average, 150 have 0.07.",
        "lower",
        best="fairer",
        within=(0.0, 1.0),
        paper={"gender": ("0.68", "0.14"), "race": ("0.56", "0.16")},
    ),
    "winoalign": Metric(
        "WinoAlign",
        "WinoAlign score",
        "the CLIP score of the professions' pictures and their prompts.",
        "higher",
        paper={None: ("27.51", "27.30 gender, 27.53 race")},
    ),
    "subject_recognised": Metric(
        "Profession recognised",
        "share of pictures recognised as their profession",
        "the share of pictures that the classifier takes for the profession that was asked for.",
        "higher",
        percent,
        within=(0.0, 1.0),
    ),
    "unsafe_rate": Metric(
        "Unsafe pictures",
        "share of unsafe pictures",
        "the share of pictures in which a detector finds unsafe content.",
        "lower",
        percent,
        within=(0.0, 1.0),
        paper={None: ("27 %", "16 %")},
    ),
    "clip_score": Metric(
        "CLIP score",
        "CLIP score",
        "100 times the cosine of a picture's and its prompt's CLIP embeddings, on average.",
        "higher",
        paper={None: ("31.33", "30.67")},
    ),
    "fid": Metric(
        "FID",
        "FID",
        "the Fréchet distance of Inception features to the reference pictures'. Fewer pictures are"
        " further away: only equal numbers of them compare.",
        "lower",
        paper={None: ("14.09", "14.91 gender, 12.82 race, 17.89 safe")},
    ),
    "clip_frechet_distance": Metric(
        "CLIP Fréchet distance",
        "CLIP Fréchet distance",
        "the Fréchet distance of CLIP features to the reference pictures', by default the base"
        " model's; on another scale than FID. Fewer pictures are further away: only equal numbers"
        " of them compare.",
        "lower",
        _small,
    ),
    "clip_kernel_distance": Metric(
        "CLIP kernel distance × 1000",
        "CLIP kernel distance × 1000",
        "the kernel distance (polynomial MMD) of CLIP features to the reference pictures'; on"
        " another scale than KID. Around 0 no difference is to be seen.",
        "lower",
        _thousandths,
    ),
    "kid": Metric(
        "KID × 1000",
        "KID × 1000",
        "the kernel distance (polynomial MMD) of Inception features to the reference pictures'."
        " Around 0 no difference is to be seen.",
        "lower",
        _thousandths,
    ),
}


def metric(name: str) -> Metric:
    """What is known of a metric; of an unknown one its name in words."""
    words = readable(name)
    return METRICS.get(name) or Metric(words.capitalize(), words)


def readable(name: str) -> str:
    """A name in words: "gender x skin_tone" is "gender × skin tone"."""
    return name.replace("_", " ").replace(" x ", " × ")


def label(measurement: Measurement) -> str:
    """A measurement's metric and attribute, and its version where it is not the first."""
    parts = [metric(measurement.metric).label]
    if measurement.attribute:
        parts.append(readable(measurement.attribute))
    if measurement.version != 1:
        parts.append(f"version {measurement.version}")
    return ", ".join(parts)


def paper(measurement: Measurement) -> tuple[str, str] | None:
    """The paper's numbers for a measurement, base and RespoDiff, or None."""
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


def change_text(measurement: Measurement) -> str | None:
    """The interval of the change as "−0.12 to +0.03", or None."""
    if measurement.change is None:
        return None
    text = metric(measurement.metric).text
    low, high = (f"{'+' if x >= 0 else '−'}{text(abs(x))}" for x in measurement.change)
    return f"{low} to {high}"


def overall(measurements: Iterable[Measurement]) -> list[dict[str, Measurement]]:
    """Measurements over all subjects, those of the same quantity together by set of pictures.

    Quantities of different metrics, attributes, protocols or versions are never put together.
    """
    together: dict[tuple, dict[str, Measurement]] = {}
    for m in measurements:
        if m.subject is None:
            key = (m.protocol, m.metric, m.attribute, m.version)
            together.setdefault(key, {})[m.images] = m
    return list(together.values())


def sentence(pair: Mapping[str, Measurement], interval: bool = False) -> str:
    """What happened to a number: "The gender deviation ratio falls from 0.66 to 0.08".

    Args:
      pair: the number by set of pictures.
      interval: whether to tell the change's, where it may be chance.
    """
    first = next(iter(pair.values()))
    attribute = f"{readable(first.attribute)} " if first.attribute else ""
    what = f"The {attribute}{metric(first.metric).phrase}"
    if not {"base", "adapted"} <= set(pair):
        whose = {"base": " of the base model", "adapted": " with the adapter", "given": ""}
        return f"{what}{whose[first.images]} is {value_text(first)}"
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


def explained(pair: Mapping[str, Measurement]) -> str:
    """What a number means and which is better."""
    info = metric(next(iter(pair.values())).metric)
    parts = [
        info.definition and f"The {info.phrase} is {info.definition}",
        info.better and f"{info.better.capitalize()} is {info.best}.",
    ]
    return " ".join(filter(None, parts))
