"""Several evaluations on one page: what they show together, and the settings that differ."""

import functools
import operator
import pathlib
import warnings
from collections.abc import Iterable, Mapping, Sequence

from respodiff_jax.errors import UserError
from respodiff_jax.evaluation.report import evaluation, glossary, sections, thumbnails
from respodiff_jax.evaluation.report.findings import Finding, headline
from respodiff_jax.evaluation.report.markup import (
    Markup,
    Section,
    breakable,
    folded,
    fragment,
    page,
    section,
    table,
    tag,
)
from respodiff_jax.evaluation.report.sections import Pair
from respodiff_jax.evaluation.results import Measurement, Results, load_results
from respodiff_jax.storage import PathLike, local_path, write_whole

PHONE_COLUMNS = 2  # cells side by side in a row of numbers

# Settings that may differ while numbers stay comparable.
_EXPECTED_TO_DIFFER = ("adapter:", "date", "seconds")

Runs = Mapping[str, Results]  # by name


def compare(
    folders: Sequence[PathLike],
    out: PathLike,
    names: Sequence[str] | None = None,
) -> pathlib.Path:
    """Writes a self-contained page that puts evaluations side by side, with what it finds.

    Args:
      folders: two or more folders that `evaluate` wrote, in the order to show.
      out: the HTML file to write; its folder is created.
      names: what the page calls each evaluation; None is the parts of the paths that differ.

    Returns:
      The file's path.

    Raises:
      UserError: if there are fewer than two folders, the names are not one for each, a folder has
        no readable results, or the file cannot be written.
    """
    if len(folders) < 2:
        raise UserError(f"a comparison of {len(folders)} evaluation(s), expected two or more")
    path = local_path(out, "page")
    names = _distinct(folders) if names is None else _checked(names, len(folders))
    paths = dict(zip(names, map(pathlib.Path, folders), strict=True))
    runs = {name: load_results(path) for name, path in paths.items()}
    findings, differing = _findings(runs), _differing(runs)
    pictures, shown = _pictures(runs, paths)
    parts = [
        _table(findings, runs),
        _charts(findings),
        pictures,
        _differences(differing, runs),
        sections.meanings(finding.first for finding in findings),
    ]
    title = f"Comparison: {', '.join(runs)}"
    html = page(title, _header(findings, runs, differing), parts, shown)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, html)
    except OSError as error:
        raise UserError(f"`out` {path} cannot be written: {error}") from error
    return path


def _checked(names: Sequence[str], count: int) -> list[str]:
    names = [name.strip() for name in names]
    if len(names) != count or len({*names, ""}) != count + 1:
        raise UserError(
            f"`names` are {names!r:.200}, expected {count} different ones: one for each evaluation,"
            " in their order"
        )
    return names


def _distinct(folders: Sequence[PathLike]) -> list[str]:
    """The paths without the folders that all begin with, and those that all end with."""
    parts = [pathlib.Path(folder).resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise UserError(f"the same evaluation is given twice: {', '.join(map(str, folders))}")
    for _ in range(2):
        least = min(map(len, parts)) - 1  # a name has at least one part
        common = [len(set(level)) == 1 for level in zip(*parts, strict=False)][:least]
        shared = [*common, False].index(False)
        parts = [part[shared:][::-1] for part in parts]
    return ["/".join(part) for part in parts]


def _findings(runs: Runs) -> list[Finding]:
    """The findings on all metrics, the most important first."""
    together: dict[tuple, dict[str, Pair]] = {}
    for name, results in runs.items():
        for pair in evaluation.by_importance(results, glossary.overall(results.measurements)):
            m = next(iter(pair.values()))
            key = (m.part, m.metric, m.attribute, m.judge, m.version)
            together.setdefault(key, {})[name] = pair
    return [Finding.of(quantity) for quantity in together.values()]


def _header(findings: Sequence[Finding], runs: Runs, differing: Mapping) -> Markup:
    facts = {breakable(name): _evaluated(r) for name, r in runs.items()}
    notes: dict[str, list[str]] = {}
    for name, r in runs.items():
        for text in r.warnings:
            notes.setdefault(text, []).append(name)
    texts = [f"{', '.join(names)}: {text}" for text, names in notes.items()]
    if doubtful := [setting for setting in differing if not _is_expected(setting)]:
        more = f" and {len(doubtful) - 3} more" if len(doubtful) > 3 else ""
        texts.insert(0, f"The evaluations differ in {', '.join(doubtful[:3])}{more}.")
    found = [finding for finding in findings if finding.is_headline]
    names = [glossary.named(finding.first) for finding in found]
    items = (
        tag("li", tag("b", f"{name[:1].upper()}{name[1:]}. "), breakable(finding.text))
        for name, finding in zip(names, found, strict=True)
    )
    title, texts = breakable(headline(found)), list(map(breakable, texts))
    return evaluation.header(title, tag("ul", items), facts, texts, kicker="comparison")


def _evaluated(results: Results) -> str:
    """What was evaluated, in words."""
    name = evaluation.model_name(results)
    if not results.made.get("model"):
        return f"pictures in {name}"
    return f"{', '.join(evaluation.concepts(results)) or 'no adapter'} on {name}"


def _charts(findings: Sequence[Finding]) -> Section:
    charts = (sections.own_scale(f.quantity, glossary.label(f.first)) for f in findings)
    return section(
        "Charts",
        (tag("div", chart, class_="chart") for chart in charts),
        note="Dots have 95 % intervals; those of the base model are hollow. Each metric has its own"
        " scale, which does not start at zero.",
    )


def _table(findings: Sequence[Finding], runs: Runs) -> Section:
    rows = []
    for finding in findings:
        found = dict(finding.ranked)
        cells = (_cell(finding.quantity.get(name, {}), found.get(name), name) for name in runs)
        text = tag("td", breakable(finding.text), class_="text", data_label="finding")
        rows.append(tag("tr", sections.metric_name(finding.first), cells, text))
    names = ("metric", *map(breakable, runs))
    head = tag(
        "tr",
        (tag("th", name, scope="col") for name in names),
        tag("th", "finding", scope="col", class_="text"),
    )
    return section(
        "The numbers",
        table("The numbers", head, rows, columns=PHONE_COLUMNS),
        note="Each number has its 95 % interval. Below are the base model's number and the change"
        " from it.",
    )


def _cell(pair: Pair, m: Measurement | None, name: str) -> Markup:
    """A run's number, and where it has both sets of pictures, the base model's and the change."""
    change = glossary.change(pair)
    more = change and fragment(
        tag("small", f"base {glossary.value_text(pair['base'])}"),
        tag(
            "small",
            f"change {change[0]} ",
            change[1] and tag("span", f"({change[1]})"),
            class_="more",
        ),
    )
    return sections.measured(m, name, more)


def _pictures(runs: Runs, paths: Mapping[str, pathlib.Path]) -> tuple[Section | None, list[str]]:
    """The pictures of professions that all runs have, and these professions."""
    rows = {name: _own_rows(paths[name]) for name in runs}
    found = {name: thumbnails.by_subject(rows[name]) for name in runs}
    first = next(iter(runs))
    shared = [s for s in found[first] if all(s in by_subject for by_subject in found.values())]
    attributes = evaluation.marked(runs[first], rows[first])
    columns = thumbnails.columns_for(len(shared), len(runs) + 1)
    cards = {}
    for subject in shared[: thumbnails.MAX_PICTURES // (columns * (len(runs) + 1))]:
        lines = [("base", paths[first], found[first][subject].get("base", []))]
        for name in runs:
            sets = found[name][subject]
            lines.append((name, paths[name], sets.get("adapted") or sets.get("given", [])))
        lines = [line for line in lines if line[2]]
        if grid := lines and thumbnails.grid(lines, attributes, columns):
            cards[subject] = evaluation.card(subject, "", grid)
    if not cards:
        return None, []
    same = _same_seeds(found.values())
    noise = "the same noise" if same else "different noise, because their seeds differ"
    note = f"The base pictures are those of {first}. Pictures one above the other started from"
    title, note = "The same professions", f"{note} {noise}."
    return evaluation.cards_section(title, cards.values(), note, runs[first]), list(cards)


def _own_rows(folder: pathlib.Path) -> list[dict[str, str]]:
    """The lines of `per_image.csv` whose pictures are in the folder.

    The page is for others, and a table may come from others: it must not show their readers any
    file that it names. A warning tells what is left out.
    """
    rows = evaluation.read_rows(folder)
    own = [row for row in rows if _is_inside(folder, row["file"])]
    if outside := len(rows) - len(own):
        first = next(row["file"] for row in rows if row not in own)
        warnings.warn(
            f"{outside} pictures of {folder} are outside that folder and are not shown, the first"
            f" is {first:.100}; copy them into it to show them",
            stacklevel=2,
        )
    return own


def _is_inside(folder: pathlib.Path, name: str) -> bool:
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # a name that no file can have
        return False


def _same_seeds(by_run: Iterable[thumbnails.BySubject]) -> bool:
    """Whether pictures at the same place of a profession have the same seed in all runs."""
    seeds: dict[tuple[str, int], str] = {}
    return all(
        seeds.setdefault((subject, place), row.get("seed", "")) == row.get("seed", "")
        for by_subject in by_run
        for subject, sets in by_subject.items()
        for pictures in sets.values()
        for place, row in enumerate(pictures)
    )


def _differing(runs: Runs) -> dict[str, list[str]]:
    """The settings that are not the same in all runs, with their values."""
    settings = [
        functools.reduce(operator.or_, sections.settings(r).values()) for r in runs.values()
    ]
    values = {key: [found.get(key, "–") for found in settings] for s in settings for key in s}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def _is_expected(setting: str) -> bool:
    return setting.startswith(_EXPECTED_TO_DIFFER)


def _differences(differing: Mapping[str, Sequence[str]], runs: Runs) -> Section:
    names = ("setting", *map(breakable, runs))
    head = tag("tr", (tag("th", name, scope="col") for name in names))

    def listed(expected: bool) -> Markup | None:
        rows = [
            tag("tr", tag("th", k, scope="row"), (tag("td", v, class_="text") for v in values))
            for k, values in differing.items()
            if _is_expected(k) == expected
        ]
        return table("Settings", head, rows) if rows else None

    doubtful, expected = listed(False), listed(True)
    none = "Model, settings, judges and versions are the same."
    return section(
        "Settings that differ",
        tag("p", "These may change the numbers, apart from the adapters:" if doubtful else none),
        doubtful,
        expected and folded("Adapters and dates", expected),
    )
