"""The sections of a report, one function each."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from etils import epath

from respodiff_jax.errors import UserError
from respodiff_jax.evaluation.report import charts, glossary
from respodiff_jax.evaluation.report.markup import (
    Markup,
    Section,
    breakable,
    definitions,
    flat,
    folded,
    fragment,
    link,
    section,
    subject_anchor,
    table,
    tag,
)
from respodiff_jax.evaluation.results import (
    PER_IMAGE_FILE,
    PICTURE_SETS,
    RESULTS_FILE,
    Measurement,
    Results,
)
from respodiff_jax.storage import PathLike, open_path, read_json_lines

TRAINING_FILE = "metrics.jsonl"

_LOSSES = {"loss_resp": "Responsibility loss (RAM)", "loss_sem": "Semantic loss (SAM)"}
_UNIT = (0.0, 1.0)

Pair = Mapping[str, Measurement]  # a quantity by set of pictures


def fairness(
    results: Results,
    attribute: str,
    values: Sequence[str],
    opened: bool,
    start: int = 0,
    shown: Collection[str] = (),
) -> Section | None:
    """The shares and deviation ratios of each profession, and the mean ratio.

    Args:
      results: the results.
      attribute: what was counted.
      values: the attribute's values, in order.
      opened: whether the professions are unfolded.
      start: number of the first value's symbol and colour.
      shown: professions whose pictures are on the page, to link to.
    """
    found: dict[str, dict[str, Measurement]] = {}
    for m in results.find("deviation_ratio", attribute=attribute):
        if m.subject is not None and m.counts:
            found.setdefault(m.subject, {})[m.picture_set] = m
    if not found:
        return None
    names = [glossary.readable(value) for value in values]
    by_share = sorted(found.items(), key=lambda item: -_first_share(item[1]))
    rows = [
        _shares_row(link(name, subject_anchor(name)) if name in shown else name, pair, start)
        for name, pair in by_share
    ]
    scale = charts.axis([(0, "0"), (0.5, "deviation ratio"), (1, "1")])
    shares = charts.axis([(0, "0 %"), (0.5, "share of pictures"), (1, "100 %")])
    keys = tag(
        "div",
        charts.legend(names, start),
        tag("p", tag("span", class_="target-key"), _aim(by_share[0][1]), class_="key"),
        class_="legends",
    )
    overall = glossary.overall(results.find("deviation_ratio", attribute=attribute))
    mean = [
        charts.row("", charts.lane("", scale, "")),
        *(dot_row(f"mean of {len(found)} professions", pair, _UNIT) for pair in overall),
    ]
    head = charts.row("", charts.lane("", shares, scale, ""))
    professions = fragment(keys, tag("div", head, rows, class_="chart shares"))
    return section(
        f"{glossary.readable(attribute).capitalize()}, profession by profession",
        tag("div", mean, class_="chart") if overall else None,
        professions if opened else folded(f"{len(found)} professions", professions),
        note="Shares as the classifier counted them, and the deviation ratio with its 95 %"
        f" interval. A ratio of 0 meets the target. Professions with the most “{names[0]}” pictures"
        " come first.",
    )


def metrics_table(results: Results) -> Section | None:
    """The numbers over all subjects, and the paper's numbers in their own columns."""
    pairs = glossary.overall(results.measurements)
    sets = [s for s in PICTURE_SETS if any(s in pair for pair in pairs)]
    if not pairs:
        return None
    columns = (*sets, *(["change"] if "adapted" in sets else []), "pictures")
    head = fragment(
        tag(
            "tr",
            tag("th", "metric", rowspan=2, scope="col"),
            tag("th", "measured here, 95 % interval", colspan=len(columns), scope="colgroup"),
            tag("th", "the paper, SD 1.4", colspan=2, scope="colgroup", class_="paper"),
        ),
        tag(
            "tr",
            (tag("th", name, scope="col") for name in columns),
            (tag("th", name, scope="col", class_="paper") for name in ("base", "RespoDiff")),
        ),
    )
    rows = []
    for pair in pairs:
        first = next(iter(pair.values()))
        pictures = dict.fromkeys(f"{m.n:,}" for m in pair.values())
        known = glossary.paper(first)
        paper = zip(("base", "RespoDiff"), known or ("–", "–"), strict=True)
        class_ = "paper" if known else "paper absent"
        cells = [
            metric_name(first),
            *(measured(pair.get(name), name) for name in sets),
            "adapted" in sets and number(*(glossary.change(pair) or ("–", None)), "change"),
            tag("td", " / ".join(pictures), data_label="pictures"),
            *(tag("td", x, class_=class_, data_label=f"paper, {name}") for name, x in paper),
        ]
        rows.append(tag("tr", cells))
    return section(
        "The numbers",
        table("The numbers", head, rows, columns=1 + len(columns) // 2),
        note="The paper's numbers (arXiv 2509.15257) are not measured here. The paper reports them"
        " for Stable Diffusion 1.4 and its own protocol. Compare them only if model, prompts and"
        " classifiers are the same.",
    )


def safety(results: Results) -> Section | None:
    """The unsafe rates over all prompts and by category."""
    found: dict[str | None, dict[str, Measurement]] = {}
    for m in results.find("unsafe_rate"):
        found.setdefault(m.subject, {})[m.picture_set] = m
    if not found:
        return None
    highest = max(edge for pair in found.values() for edge in _edges(pair))
    domain = (0.0, max(highest, 0.01))
    ends = charts.axis([(0, "0 %"), (1, glossary.percent(domain[1]))])
    rows = [dot_row(s or "all prompts", pair, domain, bar=True) for s, pair in found.items()]
    at: dict[str | None, dict[str, Measurement]] = {}
    for m in results.find("unsafe_rate_at", part="safety"):
        at.setdefault(m.attribute, {})[m.picture_set] = m
    curve = own_scale(at, "by threshold") if at else None
    return section(
        "Safety by category",
        tag("div", charts.row("", charts.lane("", ends, "")), rows, class_="chart"),
        curve and tag("div", curve, class_="chart"),
        note="Share of pictures in which a detector found unsafe content, with 95 % intervals. A"
        " prompt may belong to several categories. The pictures themselves are not shown.",
    )


def intent(results: Results) -> Section | None:
    """What the adapter does to prompts that name a value, have no people, or ask for the unsafe."""
    pairs = glossary.overall(m for m in results.measurements if m.part == "intent")
    if not pairs:
        return None
    return section(
        "What was asked for",
        tag("div", (own_scale({glossary.label(_first(p)): p}) for p in pairs), class_="chart"),
        note="Pictures should show the value that their prompt names. Pictures without people"
        " should stay the same. Other attributes should be kept. Each metric has its own scale.",
    )


def curves(results: Results) -> Section | None:
    """The deviation ratio of each attribute over guidance scales and adjectives."""
    charts_of: dict[str, dict[str, Pair]] = {}
    for pair in glossary.overall(results.find("deviation_ratio_at")):
        attribute, _, condition = _first(pair).attribute.partition(", ")
        charts_of.setdefault(attribute, {})[condition] = pair
    if not charts_of:
        return None
    drawn = (own_scale(rows, glossary.readable(name)) for name, rows in charts_of.items())
    return section(
        "Guidance and adjectives",
        (tag("div", chart, class_="chart") for chart in drawn),
        note="The mean deviation ratio of the professions at several guidance scales, and with an"
        " adjective before the profession. All rows have the same noise.",
    )


def quality(results: Results) -> Section | None:
    """The quality metrics, each on its own scale."""
    pairs = glossary.overall(m for m in results.measurements if m.part == "quality")
    if not pairs:
        return None
    return section(
        "Quality",
        tag("div", (own_scale({glossary.label(_first(p)): p}) for p in pairs), class_="chart"),
        note="How the adapter changes pictures of ordinary captions. Each metric has its own scale,"
        " which does not start at zero.",
    )


def training(results: Results, workdir: PathLike | None) -> Section | None:
    """The loss curves of a training workdir, and the adapter's training summary.

    Raises:
      UserError: if the workdir has no readable losses.
    """
    if workdir is None and not results.training:
        return None
    curves = None if workdir is None else _loss_curves(workdir)
    summary = results.training and folded("How it was trained", definitions(flat(results.training)))
    note = curves and "Thin lines are the losses, thick ones their moving averages. The numbers are"
    return section(
        "Training",
        curves and tag("div", curves, class_="curves"),
        summary,
        note=note and f"{note} the averages' last values.",
    )


def settings(results: Results) -> dict[str, dict[str, str]]:
    """The settings by subject, without the suite's note."""
    return {
        "Pictures": flat(results.made),
        "Scores": flat({k: v for k, v in results.scored.items() if k != "note"}),
        "Versions and hardware": flat(results.environment),
    }


def how_made(results: Results) -> Section:
    """All settings, folded away."""
    parts = settings(results).items()
    lists = ((tag("h3", name), definitions(pairs)) for name, pairs in parts if pairs)
    return section("How it was made", folded("Pictures, scores, versions and hardware", lists))


def meanings(measurements: Iterable[Measurement]) -> Section:
    """What the metrics and their intervals mean."""
    infos = [glossary.metric(name) for name in dict.fromkeys(m.metric for m in measurements)]
    return section(
        "What the metrics mean",
        definitions({info.label: info.definition for info in infos if info.definition}),
        tag(
            "p",
            "Intervals have 95 % confidence. Shares, and the deviation ratios that follow from"
            " them, have Wilson's intervals; means and distances have bootstrap intervals. If all"
            " professions have the same deviation ratio, their own intervals are combined. A number"
            " has no interval if the pictures do not show how certain it is. The interval of a"
            " change is that of the mean difference between pictures that share their noise. The"
            " numbers are in ",
            tag("code", RESULTS_FILE),
            ", a line for each picture in ",
            tag("code", PER_IMAGE_FILE),
            ".",
            class_="note",
        ),
    )


def measured(m: Measurement | None, name: str, more: Markup | None = None) -> Markup:
    """A table cell with a number, its interval and `more`, in the column `name`."""
    if m is None:
        return number("–", None, name)
    return number(glossary.value_text(m), glossary.interval_text(m), name, more)


def number(text: str, interval: str | None, name: str, more: Markup | None = None) -> Markup:
    """A table cell in the column `name`, with an interval below the number."""
    label = re.sub("([/_])", "\\1\u200b", name)  # as `breakable`, for the style sheet
    return tag("td", text, interval and tag("small", interval), more, data_label=label)


def metric_name(m: Measurement) -> Markup:
    """A row heading: the metric, and whether lower or higher is better."""
    better = glossary.metric(m.metric).better
    return tag("th", glossary.label(m), better and tag("small", f"{better} is better"), scope="row")


def dot_row(
    name: Markup | str, pair: Pair, domain: tuple[float, float], bar: bool = False
) -> Markup:
    """A row of a chart with a dot or bar for each set of pictures."""
    lanes = (
        charts.lane(
            m.picture_set, charts.dot(m.value, m.interval, domain, _described(m), bar), _number(m)
        )
        for m in pair.values()
    )
    return charts.row(name, *lanes)


def own_scale(pairs: Mapping[str, Pair], title: str = "") -> Markup:
    """Rows of one metric below a scale that fits them.

    A single number without an interval has no scale.

    Args:
      pairs: the quantity in each row, by the row's name.
      title: text beside the scale.
    """
    found = [m for pair in pairs.values() for m in pair.values()]
    if len(found) == 1 and found[0].interval is None:
        alone = charts.lane(found[0].picture_set, tag("span"), _number(found[0]))
        return charts.row(": ".join(filter(None, (title, *pairs))), alone)
    info = glossary.metric(found[0].metric)
    text, edges = info.text, [edge for pair in pairs.values() for edge in _edges(pair)]
    domain = charts.domain(edges, text, info.within)
    ends = charts.axis([(0, text(domain[0])), (1, text(domain[1]))])
    return fragment(
        charts.row(title, charts.lane("", ends, "")),
        (dot_row(breakable(name), pair, domain) for name, pair in pairs.items()),
    )


def _first(pair: Pair) -> Measurement:
    return next(iter(pair.values()))


def _edges(pair: Pair) -> list[float]:
    return [x for m in pair.values() for x in (m.value, *(m.interval or ()))]


def _first_share(pair: Pair) -> float:
    counts = tuple(_first(pair).counts.values())
    return counts[0] / (sum(counts) or 1)


def _aim(pair: Pair) -> str:
    """The target in words, with its shares unless they are all equal."""
    target = _first(pair).target or ()
    same = len({f"{share:.3f}" for share in target}) < 2
    return "target" if same else f"target: {', '.join(map(glossary.percent, target))}"


def _shares_row(subject: Markup | str, pair: Pair, start: int) -> Markup:
    lanes = (
        charts.lane(
            m.picture_set,
            charts.shares_bar(m.counts, m.target, start),
            charts.dot(m.value, m.interval, _UNIT, _described(m)),
            _number(m),
        )
        for m in pair.values()
    )
    return charts.row(subject, *lanes)


def _number(m: Measurement) -> Markup:
    return tag("span", glossary.value_text(m), class_="number")


def _described(m: Measurement) -> str:
    interval = glossary.interval_text(m)
    return f"{m.picture_set}: {glossary.value_text(m)}" + (
        f", interval {interval}" if interval else ""
    )


def has_losses(workdir: PathLike) -> bool:
    """Whether a path is a training workdir with losses."""
    return bool(_loss_files(workdir))


def _loss_files(workdir: PathLike) -> list[epath.Path]:
    """The losses of a run, or of all its waves."""
    folder = open_path(workdir)
    files = *sorted(folder.glob(f"waves/*/{TRAINING_FILE}")), folder / TRAINING_FILE
    return [file for file in files if file.is_file()]


def _loss_curves(workdir: PathLike) -> list[Markup]:
    files = _loss_files(workdir)
    if not files:
        raise UserError(f"{workdir} has no {TRAINING_FILE}; expected a training workdir")
    entries = [entry for path in files for entry in read_json_lines(path)]
    found = []
    for loss, title in _LOSSES.items():
        points: dict[str, list[tuple[float, float]]] = {}
        for entry in entries:
            for name, scalars in entry["concepts"].items():
                if scalars.get(loss) is not None:
                    points.setdefault(name, []).append((entry["step"], scalars[loss]))
        series = [charts.Line(name, line) for name, line in points.items()]
        found.append(charts.lines(title, series, "steps"))
    return found
