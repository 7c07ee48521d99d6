"""What a comparison finds: which evaluation is better on a metric, by how much, how surely."""

import dataclasses
from collections.abc import Mapping, Sequence

from respodiff_jax.evaluation.report import glossary
from respodiff_jax.evaluation.report.sections import Pair
from respodiff_jax.evaluation.results import Measurement


@dataclasses.dataclass(frozen=True)
class Finding:
    """How evaluations differ on one metric.

    Attributes:
      quantity: evaluation -> its measurements; an evaluation without the metric is absent.
      ranked: evaluations and the measurements that are compared, which are of adapted pictures if
        there are any. The best come first; equally written ones stay in their own order.
    """

    quantity: Mapping[str, Pair]
    ranked: tuple[tuple[str, Measurement], ...]

    @classmethod
    def of(cls, quantity: Mapping[str, Pair]) -> "Finding":
        """The finding on a quantity."""
        sets = "adapted", "given", "base"
        found = [(run, pair[min(pair, key=sets.index)]) for run, pair in quantity.items()]
        if better := glossary.metric(found[0][1].metric).better:
            sign = -1 if better == "higher" else 1
            best: dict[str, float] = {}  # value as written -> the best that is written so
            for _, m in sorted(found, key=lambda item: -sign * item[1].value):
                best[glossary.value_text(m)] = sign * m.value
            found.sort(key=lambda item: best[glossary.value_text(item[1])])
        return cls(quantity, tuple(found))

    @property
    def first(self) -> Measurement:
        """A measurement of the metric."""
        return self.ranked[0][1]

    @property
    def metric(self) -> glossary.Metric:
        """What is said of the metric."""
        return glossary.metric(self.first.metric)

    @property
    def leaders(self) -> tuple[str, ...]:
        """The best evaluation, and those whose number is written like its number."""
        best = glossary.value_text(self.first)
        return tuple(run for run, m in self.ranked if glossary.value_text(m) == best)

    @property
    def is_headline(self) -> bool:
        """Whether several measured the metric and it is one of the most important."""
        known = self.first.metric in glossary.HEADLINES and self.first.judge is None
        return known and len(self.ranked) > 1

    @property
    def is_clear(self) -> bool:
        """Whether one evaluation is best, and its interval overlaps no other."""
        (_, best), *others = self.ranked
        return bool(self.metric.better and others) and all(_apart(best, m) for _, m in others)

    @property
    def text(self) -> str:
        """Which evaluation is best, by how much, and whether the intervals overlap."""
        best, leaders = self.first, self.leaders
        value = glossary.value_text(best)
        if len(self.ranked) == 1:
            return f"Only {leaders[0]} measured it: {value}."
        if len(leaders) > 1:
            sentences = [f"{listed(leaders)} are equal: {value}."]
        else:
            what = f"is {self.comparative}: " if self.metric.better else "has "
            sentences = [f"{leaders[0]} {what}{value}."]
        # Without a better direction, equals of the first may stand anywhere.
        for run, m in (item for item in self.ranked if item[0] not in leaders):
            gap = glossary.signed(m, m.value - best.value)
            sentences.append(f"{run} has {glossary.value_text(m)} ({gap}); {_doubt(best, m)}.")
        return " ".join(sentences)

    @property
    def comparative(self) -> str:
        """ "fairer" or "better" of two, "fairest" or "best" of more."""
        best = {"fairer": "fairest", "better": "best"}
        return self.metric.best if len(self.ranked) == 2 else best[self.metric.best]


def headline(findings: Sequence[Finding]) -> str:
    """The title of a comparison with these headline metrics.

    It is the first clear finding, with the first clear one in favour of another evaluation, if
    there is one; or that there is no difference.
    """
    clear = [finding for finding in findings if finding.is_clear]
    if clear:
        (run, best), *others = clear[0].ranked
        values = listed([glossary.value_text(m) for _, m in others])
        what = f"{glossary.named(best)}, {glossary.value_text(best)} against {values}"
        contrary = (
            f"; {finding.leaders[0]} has the better {glossary.named(finding.first)}"
            for finding in clear
            if finding.leaders[0] != run
        )
        return f"{run} is {clear[0].comparative}: {what}{next(contrary, '')}"
    if not findings:
        return "The evaluations have no headline metric in common"
    if all(len(finding.leaders) == len(finding.ranked) for finding in findings):
        return f"{listed([run for run, _ in findings[0].ranked])} are equal"
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
