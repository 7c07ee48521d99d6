"""`report.html`: one self-contained page with an evaluation's numbers, charts and pictures."""

import datetime
import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from respodiff_jax.errors import UserError
from respodiff_jax.evaluation.report import attack, glossary, sections, thumbnails
from respodiff_jax.evaluation.report.markup import (
    Markup,
    Section,
    folded,
    link,
    page,
    section,
    subject_anchor,
    tag,
)
from respodiff_jax.evaluation.report.sections import Pair
from respodiff_jax.evaluation.report.thumbnails import Attribute
from respodiff_jax.evaluation.results import (
    PER_IMAGE_FILE,
    PICTURE_SETS,
    Results,
    load_per_image,
    load_results,
)
from respodiff_jax.storage import PathLike, write_whole

REPORT_FILE = "report.html"
OPEN_SUBJECTS = 4
_COLUMNS = {"file", "protocol", "images", "prompt", "subject"}


def write_report(folder: PathLike, workdir: PathLike | None = None) -> pathlib.Path:
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
    pictures, shown = _pictures(results, rows, folder)
    parts = [
        pictures,
        *(
            sections.fairness(results, a.name, a.values, i == 0, a.start, shown)
            for i, a in enumerate(attributes(results))
        ),
        sections.metrics_table(results),
        sections.intent(results),
        sections.curves(results),
        sections.safety(results),
        attack.section_of(results, rows, folder),
        sections.quality(results),
        sections.training(results, workdir),
        sections.how_made(results),
        sections.meanings(results.measurements),
    ]
    title = ", ".join(concepts(results)) or model_name(results)
    path = folder / REPORT_FILE
    write_whole(path, page(f"RespoDiff evaluation: {title}", _header(results), parts, shown))
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


def attributes(results: Results) -> list[Attribute]:
    """The attributes with a deviation ratio; the adapter's groups come first."""
    found: dict[str, tuple[str, ...]] = {}
    for m in results.find("deviation_ratio"):
        if m.attribute and m.counts:
            found.setdefault(m.attribute, tuple(m.counts))
    groups = _adapter(results).get("groups", ())
    ordered = sorted(found.items(), key=lambda item: item[0] not in groups)
    starts = itertools.accumulate((len(values) for _, values in ordered), initial=0)
    return [Attribute(*item, start) for item, start in zip(ordered, starts, strict=False)]


def marked(results: Results, rows: Sequence[thumbnails.Row]) -> list[Attribute]:
    """The attributes to mark on pictures: those with a column in `per_image.csv`."""
    columns = rows[0] if rows else ()
    return [attribute for attribute in attributes(results) if attribute.name in columns]


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
    pairs = by_importance(results, glossary.overall(results.measurements))
    if results.made.get("model"):
        facts = {"model": model_name(results), "adapter": ", ".join(concepts(results)) or "none"}
    else:
        facts = {"folder": model_name(results)}
    facts |= {"pictures": f"{_count(results):,}", "date": _day(results)}
    dek = " ".join(
        [part for p in pairs[:1] for part in (glossary.certainty(p), forced(results, p)) if part]
        + [f"{glossary.sentence(p, interval=True)}." for p in pairs[1:4]]
    )
    title = glossary.sentence(pairs[0]) if pairs else "Nothing was measured"
    return header(title, dek, facts, [text[:1].upper() + text[1:] for text in results.warnings])


def forced(results: Results, pair: Pair) -> str:
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


def by_importance(results: Results, pairs: Iterable[Pair]) -> list[Pair]:
    """Quantities in order: first what the results' adapter is for, last its costs."""
    order = list(glossary.HEADLINES)
    if _adapter(results).get("safe") and not _adapter(results).get("groups"):
        order.sort(key=lambda name: not name.startswith(("unsafe", "attack")))
    names = [attribute.name for attribute in attributes(results)]

    def rank(pair: Pair) -> tuple[int, int]:
        m = next(iter(pair.values()))
        return tuple(
            known.index(x) if x in known else len(known)
            for known, x in ((order, m.metric), (names, m.attribute))
        )

    return sorted(pairs, key=rank)


def _pictures(
    results: Results, rows: Sequence[thumbnails.Row], folder: pathlib.Path
) -> tuple[Section | None, list[str]]:
    """The pictures, and whose they are."""
    by_subject = thumbnails.by_subject(rows)
    if not by_subject:
        return None, []
    marks = marked(results, rows)
    sets = [name for name in PICTURE_SETS if any(name in found for found in by_subject.values())]
    columns = thumbnails.columns_for(len(by_subject), len(sets))
    limit = thumbnails.MAX_PICTURES // (columns * len(sets))
    cards = {}
    for subject, found in list(by_subject.items())[:limit]:
        lines = [(name, folder, found.get(name, [])) for name in sets]
        if grid := thumbnails.grid(lines, marks, columns):
            cards[subject] = card(subject, _deviations(results, subject, marks), grid)
    if not cards:
        return section("Pictures", tag("p", "The pictures are not in this folder.")), []
    note = "The first pictures of each profession, not chosen by hand."
    if len(sets) > 1:
        note += " Pictures one above the other started from the same noise."
    if marks:
        note += " Below each is what the classifier saw."
    if left_out := len(by_subject) - len(cards):
        note += f" {left_out} professions are not shown."
    title = "Before and after" if len(sets) > 1 else "Pictures"
    return cards_section(title, cards.values(), note, results), list(cards)


def header(
    title: Any,
    dek: Any,
    facts: Mapping[Any, str],
    warnings: Sequence[str],
    kicker: str = "evaluation",
) -> Markup:
    """The head of a page: a title, a text, facts, and what a reader should know first."""
    pairs = (tag("div", tag("dt", name), tag("dd", text)) for name, text in facts.items())
    items = (tag("li", text) for text in warnings)
    aside = tag("h2", "Before you believe the numbers"), tag("ul", items)
    return tag(
        "header",
        tag("p", f"RespoDiff {kicker}", class_="kicker"),
        tag("h1", title),
        dek and tag("div", dek, class_="dek"),
        tag("dl", pairs, class_="facts"),
        tag("aside", aside, class_="warnings") if warnings else None,
    )


def cards_section(title: str, cards: Iterable[Markup], note: str, results: Results) -> Section:
    """A section of cards, the first ones open and the others folded away.

    The note ends with what the results' suite says of its pictures.
    """
    cards = list(cards)
    rest = cards[OPEN_SUBJECTS:]
    more = folded(f"{len(rest)} more professions", rest) if rest else None
    note = " ".join(
        filter(
            None, (note, "Click a picture to see it large.", str(results.scored.get("note", "")))
        )
    )
    return section(title, cards[:OPEN_SUBJECTS], more, note=note)


def card(subject: str, facts: str, grid: Markup) -> Markup:
    """The pictures of a profession under its name, which links to itself."""
    name = link(subject or "all", subject_anchor(subject))
    heading = tag("h3", name, tag("small", facts))
    return tag("article", heading, grid, class_="card", id=subject_anchor(subject))


def _deviations(results: Results, subject: str, marks: Sequence[Attribute]) -> str:
    facts = []
    for attribute in marks:
        found = results.find("deviation_ratio", attribute=attribute.name, subject=subject)
        if found:
            numbers = " → ".join(map(glossary.value_text, found))
            facts.append(f"{glossary.readable(attribute.name)} deviation {numbers}")
    return " · ".join(facts)
