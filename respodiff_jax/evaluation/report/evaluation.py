"""`report.html`: one self-contained page with an evaluation's numbers, charts and pictures."""

import datetime
import os
import pathlib
from collections.abc import Mapping, Sequence

from respodiff_jax.errors import UserError
from respodiff_jax.evaluation.report import glossary, sections, thumbnails
from respodiff_jax.evaluation.report.glossary import PICTURE_SETS
from respodiff_jax.evaluation.report.markup import (
    Markup,
    definitions,
    flat,
    folded,
    fragment,
    page,
    section,
    tag,
)
from respodiff_jax.evaluation.results import (
    PER_IMAGE_FILE,
    RESULTS_FILE,
    Measurement,
    Results,
    load_per_image,
    load_results,
)
from respodiff_jax.storage import write_whole

REPORT_FILE = "report.html"
OPEN_SUBJECTS = 4
_COLUMNS = {"file", "protocol", "images", "prompt", "subject"}


def write_report(
    folder: str | os.PathLike, workdir: str | os.PathLike | None = None
) -> pathlib.Path:
    """Writes `report.html` into an evaluation's folder.

    Args:
      folder: has `results.json`; pictures are shown if it has `per_image.csv` and the pictures.
      workdir: training workdir of the adapter, for its loss curves, or None.

    Returns:
      The page's path.

    Raises:
      UserError: if there are no readable results, or no losses in `workdir`.
    """
    folder = pathlib.Path(folder)
    results = load_results(folder)
    rows = read_rows(folder)
    parts = [
        _pictures(results, rows, folder),
        *(
            sections.fairness(results, name, values, opened=i == 0)
            for i, (name, values) in enumerate(attributes(results).items())
        ),
        sections.metrics_table(results),
        sections.intent(results),
        sections.curves(results),
        sections.safety(results),
        sections.quality(results),
        sections.training(results, workdir),
        _making(results),
    ]
    title = ", ".join(concepts(results)) or model_name(results)
    html = page(f"RespoDiff evaluation: {title}", _header(results), tag("main", parts))
    path = folder / REPORT_FILE
    write_whole(path, html)
    return path


def read_rows(folder: pathlib.Path) -> list[dict[str, str]]:
    """The lines of `per_image.csv`; [] if there is none.

    Raises:
      UserError: if the file is damaged, or lacks a column that pages need.
    """
    rows = load_per_image(folder) if (folder / PER_IMAGE_FILE).is_file() else []
    if lacks := sorted(_COLUMNS - set(rows[0])) if rows else []:
        raise UserError(
            f"{folder / PER_IMAGE_FILE} lacks the column(s) {', '.join(lacks)}; expected a table"
            " of `respodiff evaluate`"
        )
    return rows


def attributes(results: Results) -> dict[str, tuple[str, ...]]:
    """The attributes with a deviation ratio, and their values; the adapter's groups come first."""
    found: dict[str, tuple[str, ...]] = {}
    for m in results.find("deviation_ratio"):
        if m.attribute and m.counts:
            found.setdefault(m.attribute, tuple(m.counts))
    groups = _adapter(results).get("groups", ())
    return dict(sorted(found.items(), key=lambda item: item[0] not in groups))


def marked(results: Results, rows: Sequence[thumbnails.Row]) -> list[thumbnails.Attribute]:
    """The attributes to mark on pictures: those with a column in `per_image.csv`."""
    columns = rows[0] if rows else ()
    found = attributes(results).items()
    return [thumbnails.Attribute(name, values) for name, values in found if name in columns]


def concepts(results: Results) -> list[str]:
    """Names of the adapter's concepts; [] without an adapter."""
    return [str(name) for name in _adapter(results).get("concepts", ())]


def model_name(results: Results) -> str:
    """The model's name, or the folder of existing pictures."""
    model = results.made.get("model") or {}
    return str(model.get("name") or results.made.get("images") or "unnamed model")


def _adapter(results: Results) -> Mapping:
    return results.made.get("adapter") or {}


def _header(results: Results) -> Markup:
    pairs = _by_importance(results)
    if results.made.get("model"):
        facts = {"model": model_name(results), "adapter": ", ".join(concepts(results)) or "none"}
    else:
        facts = {"folder": model_name(results)}
    facts |= {"pictures": f"{_count(results):,}", "date": _day(results)}
    dek = " ".join(
        [part for p in pairs[:1] for part in (glossary.explained(p), glossary.certainty(p))]
        + [quotas for p in pairs[:1] if (quotas := forced(results, p))]
        + [f"{glossary.sentence(p, interval=True)}." for p in pairs[1:4]]
    )
    title = glossary.sentence(pairs[0]) if pairs else "Nothing was measured"
    return header(title, dek, facts, [text[:1].upper() + text[1:] for text in results.warnings])


def forced(results: Results, pair: Mapping[str, Measurement]) -> str:
    """A sentence, if quotas force the shares that a deviation ratio compares."""
    m = pair.get("adapted")
    if m is None or m.metric != "deviation_ratio":
        return ""
    if not set(str(m.attribute).split(" x ")) <= set(_adapter(results).get("groups", ())):
        return ""
    return (
        "Quotas give each concept its exact share of the pictures of a profession, so the number"
        " after says how well pictures show their concepts."
    )


def _count(results: Results) -> int:
    """Number of pictures; existing pictures are the same for all parts."""
    largest: dict[tuple[str, str], int] = {}
    for m in results.measurements:
        key = ("" if m.picture_set == "given" else m.part, m.picture_set)
        largest[key] = max(largest.get(key, 0), m.n)
    return sum(largest.values())


def _day(results: Results) -> str:
    date = str(results.environment.get("date", "unknown"))
    try:
        day = datetime.datetime.fromisoformat(date)
    except ValueError:
        return date
    return f"{day.day} {day:%B %Y}"


def _by_importance(results: Results) -> list[dict[str, Measurement]]:
    """The quantities over all subjects: first what the adapter is for, last its costs."""
    first = [*attributes(results)]
    order = ["deviation_ratio", "unsafe_rate", "clip_score"]
    if _adapter(results).get("safe") and not _adapter(results).get("groups"):
        order = ["unsafe_rate", "deviation_ratio", "clip_score"]

    def rank(pair: dict[str, Measurement]) -> tuple[int, int]:
        m = next(iter(pair.values()))
        return (
            order.index(m.metric) if m.metric in order else len(order),
            first.index(m.attribute) if m.attribute in first else len(first),
        )

    return sorted(glossary.overall(results.measurements), key=rank)


def _pictures(
    results: Results, rows: Sequence[thumbnails.Row], folder: pathlib.Path
) -> Markup | None:
    by_subject = thumbnails.by_subject(rows)
    if not by_subject:
        return None
    names = marked(results, rows)
    sets = [name for name in PICTURE_SETS if any(name in found for found in by_subject.values())]
    columns = thumbnails.columns_for(len(by_subject), len(sets))
    shown = thumbnails.MAX_PICTURES // (columns * len(sets))
    cards = []
    for subject, found in list(by_subject.items())[:shown]:
        lines = [(name, folder, found.get(name, [])) for name in sets]
        if grid := thumbnails.grid(lines, names, columns):
            cards.append(card(subject, _deviations(results, subject, names), grid))
    if not cards:
        return section("Pictures", tag("p", "The pictures are not in this folder."))
    note = "The first pictures of each profession, not chosen by hand."
    if len(sets) > 1:
        note += " Pictures one above the other started from the same noise."
    if names:
        note += " Below each is what the classifier saw."
    if left_out := len(by_subject) - len(cards):
        note += f" {left_out} professions are not shown."
    return cards_section("Before and after" if len(sets) > 1 else "Pictures", cards, note)


def header(title: str, dek: str, facts: Mapping[str, str], warnings: Sequence[str]) -> Markup:
    """The head of a page: a title, a text, facts, and what a reader should know first."""
    pairs = (tag("div", tag("dt", name), tag("dd", text)) for name, text in facts.items())
    items = (tag("li", text) for text in warnings)
    aside = tag("h2", "Before you believe the numbers"), tag("ul", items)
    return tag(
        "header",
        tag("p", "RespoDiff evaluation", class_="kicker"),
        tag("h1", title),
        dek and tag("p", dek, class_="dek"),
        tag("dl", pairs, class_="facts"),
        tag("aside", aside, class_="warnings") if warnings else None,
    )


def cards_section(title: str, cards: Sequence[Markup], note: str) -> Markup:
    """A section of cards, the first ones open and the others folded away."""
    rest = cards[OPEN_SUBJECTS:]
    more = folded(f"{len(rest)} more professions", rest) if rest else None
    return section(title, cards[:OPEN_SUBJECTS], more, note=note)


def card(subject: str, facts: str, grid: Markup) -> Markup:
    """The pictures of a profession under its name."""
    return tag("article", tag("h3", subject or "all", tag("small", facts)), grid, class_="card")


def _deviations(results: Results, subject: str, names: Sequence[thumbnails.Attribute]) -> str:
    facts = []
    for attribute in names:
        found = results.find("deviation_ratio", attribute=attribute.name, subject=subject)
        if found:
            numbers = " → ".join(map(glossary.value_text, found))
            facts.append(f"{glossary.readable(attribute.name)} deviation {numbers}")
    return " · ".join(facts)


def _making(results: Results) -> Markup:
    parts = {
        "Pictures": flat(results.made),
        "Scores": flat(results.scored),
        "Versions and hardware": flat(results.environment),
    }
    infos = [
        glossary.metric(name) for name in dict.fromkeys(m.metric for m in results.measurements)
    ]
    return section(
        "How it was made",
        tag("h3", "What the metrics mean"),
        definitions({info.label: info.definition for info in infos if info.definition}),
        (fragment(tag("h3", name), definitions(pairs)) for name, pairs in parts.items() if pairs),
        tag(
            "p",
            "Intervals have 95 % confidence. Shares, and the deviation ratios that follow from"
            " them, have Wilson's intervals; means and distances have bootstrap intervals. Where"
            " all professions have one deviation ratio, their own intervals are combined. A number"
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
