"""What a comparison finds: which evaluation is better on a metric, by how much, how surely."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from respodiff_jax.evaluation.report import glossary
from respodiff_jax.evaluation.report.sections import Pair
from respodiff_jax.evaluation.results import Measurement

Quantity = Mapping[str, Pair]  # by evaluation; one that did not measure it is absent


def chosen(pair: Pair) -> Measurement:
    """What evaluations are compared by: their adapted pictures, if there are any."""
    return pair[min(pair, key=("adapted", "given", "base").index)]


@dataclasses.dataclass(frozen=True)
class Finding:
    """How evaluations differ on one metric.

    Attributes:
      metric: what is said of the metric.
      name: the metric and its attribute, as within a sentence.
      ranked: evaluations and the measurements that are compared; the best come first, and those
        of one rounded number in the order of the page.
    """

    metric: glossary.Metric
    name: str
    ranked: tuple[tuple[str, Measurement], ...]

    @classmethod
    def of(cls, quantity: Quantity) -> "Finding":
        """The finding on a quantity."""
        found = [(run, chosen(pair)) for run, pair in quantity.items()]
        metric, name = glossary.metric(found[0][1].metric), glossary.named(found[0][1])
        if metric.better:
            sign = -1 if metric.better == "higher" else 1
            best = {}  # value as written -> the best value that is written so
            for _, m in found:
                text = glossary.value_text(m)
                best[text] = min(sign * m.value, best.get(text, math.inf))
            found.sort(key=lambda item: best[glossary.value_text(item[1])])
        return cls(metric, name, tuple(found))

    @property
    def leaders(self) -> tuple[str, ...]:
        """The best evaluation, and those whose number is written like its number."""
        best = glossary.value_text(self.ranked[0][1])
        return tuple(run for run, m in self.ranked if glossary.value_text(m) == best)

    @property
    def is_headline(self) -> bool:
        """Whether the metric is one of the most important, by the first judge."""
        m = self.ranked[0][1]
        return m.metric in glossary.HEADLINES and m.judge is None

    @property
    def is_clear(self) -> bool:
        """Whether one evaluation is best, and its interval overlaps no other."""
        (_, best), *others = self.ranked
        return bool(self.metric.better and others) and all(_apart(best, m) for _, m in others)

    @property
    def text(self) -> str:
        """Which evaluation is best, by how much, and whether the intervals overlap."""
        (_, best), leaders = self.ranked[0], self.leaders
        value = glossary.value_text(best)
        if len(self.ranked) == 1:
            return f"Only {leaders[0]} measured it: {value}."
        if len(leaders) > 1:
            sentences = [f"{listed(leaders)} are equal: {value}."]
        else:
            what = f"is {self.comparative}: " if self.metric.better else "has "
            sentences = [f"{leaders[0]} {what}{value}."]
        for run, m in self.ranked[len(leaders) :]:
            gap = glossary.signed(m, m.value - best.value)
            sentences.append(f"{run} has {glossary.value_text(m)} ({gap}); {_doubt(best, m)}.")
        return " ".join(sentences)

    @property
    def comparative(self) -> str:
        """ "fairer" or "better" of two, "fairest" or "best" of more."""
        best = {"fairer": "fairest", "better": "best"}
        return self.metric.best if len(self.ranked) == 2 else best[self.metric.best]


def headline(findings: Sequence[Finding]) -> str:
    """The title of a comparison: its first clear finding, or that there is none."""
    compared = [finding for finding in findings if len(finding.ranked) > 1]
    for finding in compared:
        if finding.is_clear:
            (run, best), *others = finding.ranked
            values = listed([glossary.value_text(m) for _, m in others])
            title = f"{run} is {finding.comparative}: {finding.name} {glossary.value_text(best)}"
            return f"{title} against {values}"
    if not compared:
        return "The evaluations have no headline metric in common"
    if all(len(finding.leaders) == len(finding.ranked) for finding in compared):
        return f"{listed([run for run, _ in compared[0].ranked])} are equal"
    return "No headline metric tells the evaluations apart"


def listed(names: Sequence[str]) -> str:
    """Names as "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _apart(a: Measurement, b: Measurement) -> bool | None:
    """Whether two intervals do not overlap; None if one is missing."""
    if a.interval is None or b.interval is None:
        return None
    return a.interval[1] < b.interval[0] or b.interval[1] < a.interval[0]


def _doubt(a: Measurement, b: Measurement) -> str:
    return {
        True: "the intervals do not overlap",
        False: "the intervals overlap, so this may be chance",
        None: "no intervals tell whether this is chance",
    }[_apart(a, b)]
