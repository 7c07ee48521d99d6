"""*Measure this*: pictures of a profession, base and adapted, counted while they are drawn."""

from collections.abc import Callable, Iterator

import numpy as np

from respodiff_jax.backbone import load_clip
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation import metrics
from respodiff_jax.evaluation.classifier import Prediction, classify
from respodiff_jax.evaluation.report import glossary, sections
from respodiff_jax.evaluation.report.markup import Markup, fragment, tag
from respodiff_jax.evaluation.results import Measurement, Results
from respodiff_jax.evaluation.suites import Suite
from respodiff_jax.generation.selection import concept_weights
from respodiff_jax.play.painter import Job, Painter
from respodiff_jax.play.settings import Settings, decide

PICTURES = 20


def jobs_of(painter: Painter, settings: Settings, suite: Suite, subject: str) -> list[Job]:
    """Pairs of a base and an adapted picture, one after the other; templates take turns.

    Raises:
      UserError: if nothing is chosen that could steer.
    """
    if painter.adapter is None or not settings.steers:
        raise UserError(
            "nothing steers the pictures, so there is nothing to compare: switch on a fair group"
            " or safety, or move a slider"
        )
    templates = suite.prompts(subject)
    prompts = [templates[i % len(templates)] for i in range(PICTURES)]
    weights = concept_weights(
        painter.adapter,
        PICTURES,
        1,
        seed=settings.seed,
        decisions=decide(painter, settings, prompts),
        **settings.selection(),
    )
    jobs = []
    for i, (prompt, row) in enumerate(zip(prompts, weights.tolist(), strict=True)):
        base = Job(prompt, settings.seed + i)
        own = {"weights": tuple(row), "steer_always": settings.steer_always}
        jobs += [base, base._replace(**own)]
    return jobs


class Judge:
    """Counts pictures as `respodiff evaluate fairness` does.

    Args:
      suite: whose CLIP and classifier prompts are used.

    Raises:
      UserError: if the CLIP cannot be found.
    """

    def __init__(self, suite: Suite):
        self._suite, self._clip = suite, load_clip(suite.clip)

    def features(self, picture: np.ndarray) -> np.ndarray:
        """The CLIP feature of a picture, `(1, D)`."""
        return self._clip.image_features([picture])

    def classify(self, features: np.ndarray) -> dict[str, Prediction]:
        """The values of each attribute in pictures."""
        return {
            name: classify(self._clip, features, classes)
            for name, classes in self._suite.attributes.items()
        }


def measure(
    painter: Painter,
    settings: Settings,
    suite: Suite,
    subject: str,
    judge: Judge,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_count: Callable[[int, int], None] = lambda counted, total: None,
) -> Iterator[Markup]:
    """Draws and counts pictures; yields the charts of those so far.

    Args:
      painter: draws.
      settings: how; their prompt and number are not used.
      suite: its templates and attributes.
      subject: the profession.
      judge: counts.
      should_stop, on_step: as in `Painter.draw`.
      on_count: is told how many pictures are counted, before each, and how many there are.

    Raises:
      UserError: if nothing steers the pictures.
    """
    jobs = jobs_of(painter, settings, suite, subject)
    features: dict[int, np.ndarray] = {}
    for i, picture in painter.draw(jobs, settings.options, should_stop, on_step):
        on_count(len(features), len(jobs))
        features[i] = judge.features(picture)
        # Pairs only, so that both sets show the same noise.
        pairs = [i for i in range(0, len(jobs), 2) if i in features and i + 1 in features]
        if pairs and (len(features) == len(jobs) or len(features) % 2 == 0):
            sets = {
                name: judge.classify(np.concatenate([features[i + offset] for i in pairs]))
                for offset, name in enumerate(("base", "adapted"))
            }
            is_uniform = not (settings.fair and settings.ratio)
            target = None if is_uniform else (settings.fair, dict(settings.ratio))
            yield charted(suite, subject, sets, target)


def charted(
    suite: Suite,
    subject: str,
    sets: dict[str, dict[str, Prediction]],
    target: tuple[str, dict[str, float]] | None = None,
) -> Markup:
    """The counts of a profession's pictures, as the report draws them.

    Args:
      suite: its attributes.
      subject: the profession.
      sets: "base" and "adapted" -> attribute -> what its pictures show.
      target: a group and the share of each of its concepts; uniform if None.
    """
    parts, start = [], 0  # of colours and symbols
    for attribute, classes in suite.attributes.items():
        shares = _shares(list(classes), attribute, target)
        common = {"metric": "deviation_ratio", "part": "fairness"}
        common |= {"attribute": attribute, "subject": subject}
        found = [
            metrics.deviation(p[attribute].counts(), shares, picture_set=name, **common)
            for name, p in sets.items()
        ]
        results = Results(tuple(found), made={}, scored={}, environment={})
        parts.append(sections.fairness(results, attribute, list(classes), True, start))
        parts.append(_table(found))
        start += len(classes)
    return fragment(parts)


def _shares(
    values: list[str], attribute: str, target: tuple[str, dict[str, float]] | None
) -> tuple[float, ...]:
    """The target share of each value: of the concept that has its word, "a woman" for "woman"."""
    if target and target[0] == attribute:
        shares = [
            sum(share for name, share in target[1].items() if value in name.split())
            for value in values
        ]
        if abs(sum(shares) - 1) < 0.01:
            return tuple(shares)
    return (1 / len(values),) * len(values)


def _table(found: list[Measurement]) -> Markup:
    """Counts with their shares' intervals in words."""
    rows = []
    for m in found:
        cells = []
        for value, count in m.counts.items():
            low, high = metrics.wilson_interval(count, m.n)
            cells.append(
                f"{glossary.readable(value)} {count} of {m.n}"
                f" ({glossary.percent(low)} to {glossary.percent(high)})"
            )
        rows.append(tag("p", tag("b", m.picture_set), ": ", ", ".join(cells), class_="counts"))
    return tag("div", rows)
