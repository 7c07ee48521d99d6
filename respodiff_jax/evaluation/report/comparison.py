"""Several evaluations on one page: their results, and the settings that differ."""

import os
import pathlib
import warnings
from collections.abc import Iterable, Mapping, Sequence

from respodiff_jax.errors import UserError
from respodiff_jax.evaluation.report import evaluation, glossary, sections, thumbnails
from respodiff_jax.evaluation.report.markup import (
    Markup,
    flat,
    folded,
    fragment,
    page,
    section,
    table,
    tag,
)
from respodiff_jax.evaluation.results import Measurement, Results, load_results
from respodiff_jax.storage import local_path, write_whole

PHONE_COLUMNS = 3  # cells side by side in a row of numbers

# Settings that may differ while numbers stay comparable.
_EXPECTED_TO_DIFFER = ("adapter:", "date", "seconds")

Runs = Mapping[str, Results]  # by name


def compare(folders: Sequence[str | os.PathLike], out: str | os.PathLike) -> pathlib.Path:
    """Writes a self-contained page that puts evaluations side by side.

    Args:
      folders: two or more folders that `evaluate` wrote, in the order to show.
      out: the HTML file to write; its folder is created.

    Returns:
      The file's path.

    Raises:
      UserError: if there are fewer than two folders, one has no readable results, or the file
        cannot be written.
    """
    if len(folders) < 2:
        raise UserError(f"a comparison of {len(folders)} evaluation(s), expected two or more")
    path = local_path(out, "page")
    paths = dict(zip(_names(folders), map(pathlib.Path, folders), strict=True))
    runs = {name: load_results(path) for name, path in paths.items()}
    parts = [_metrics(runs), _table(runs), _pictures(runs, paths), _differences(runs)]
    title = f"Comparison: {', '.join(runs)}"
    html = page(title, _header(runs), tag("main", parts))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, html)
    except OSError as error:
        raise UserError(f"`out` {path} cannot be written: {error}") from error
    return path


def _names(folders: Sequence[str | os.PathLike]) -> list[str]:
    """The shortest endings of the paths that are all different."""
    parts = [pathlib.Path(folder).resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"the same evaluation is given twice: {', '.join(map(str, folders))}")


def _quantities(runs: Runs) -> list[dict[str, dict[str, Measurement]]]:
    """Each quantity by run and set of pictures; a run that did not measure it is absent."""
    together: dict[tuple, dict[str, dict[str, Measurement]]] = {}
    for name, results in runs.items():
        for pair in glossary.overall(results.measurements):
            m = next(iter(pair.values()))
            key = (m.part, m.metric, m.attribute, m.judge, m.version)
            together.setdefault(key, {})[name] = pair
    return list(together.values())


def _first(quantity: Mapping[str, Mapping[str, Measurement]]) -> Measurement:
    return next(iter(next(iter(quantity.values())).values()))


def _header(runs: Runs) -> Markup:
    facts = {name: _evaluated(r) for name, r in runs.items()}
    notes: dict[str, list[str]] = {}
    for name, r in runs.items():
        for text in r.warnings:
            notes.setdefault(text, []).append(name)
    title = f"{len(runs)} evaluations side by side"
    texts = [f"{', '.join(names)}: {text}" for text, names in notes.items()]
    return evaluation.header(title, "", facts, texts)


def _evaluated(results: Results) -> str:
    """What was evaluated, in words."""
    name = evaluation.model_name(results)
    if not results.made.get("model"):
        return f"pictures in {name}"
    return f"{', '.join(evaluation.concepts(results)) or 'no adapter'} on {name}"


def _metrics(runs: Runs) -> Markup:
    charts = [
        sections.own_scale(quantity, glossary.label(_first(quantity)))
        for quantity in _quantities(runs)
    ]
    return section(
        "Results",
        (tag("div", chart, class_="chart") for chart in charts),
        note="Dots have 95 % intervals; those of the base model are hollow. Each metric has its own"
        " scale, which does not start at zero.",
    )


def _table(runs: Runs) -> Markup:
    rows = []
    for quantity in _quantities(runs):
        sets = [s for s in glossary.PICTURE_SETS if any(s in pair for pair in quantity.values())]
        for s in sets:
            found = [quantity.get(name, {}).get(s) for name in runs]
            cells = [
                sections.metric_name(_first(quantity), s),
                map(sections.measured, found, runs),
            ]
            rows.append(tag("tr", cells))
    head = tag("tr", (tag("th", name, scope="col") for name in ("metric", *runs)))
    return section("The numbers", table("The numbers", head, rows, columns=PHONE_COLUMNS))


def _pictures(runs: Runs, paths: Mapping[str, pathlib.Path]) -> Markup | None:
    rows = {name: _own_rows(paths[name]) for name in runs}
    found = {name: thumbnails.by_subject(rows[name]) for name in runs}
    if not all(found.values()):
        return None
    first = next(iter(runs))
    shared = [s for s in found[first] if all(s in by_subject for by_subject in found.values())]
    attributes = evaluation.marked(runs[first], rows[first])
    columns = thumbnails.columns_for(len(shared), len(runs) + 1)
    cards = []
    for subject in shared[: thumbnails.MAX_PICTURES // (columns * (len(runs) + 1))]:
        lines = [("base", paths[first], found[first][subject].get("base", []))]
        for name in runs:
            sets = found[name][subject]
            lines.append((name, paths[name], sets.get("adapted") or sets.get("given", [])))
        lines = [line for line in lines if line[2]]
        if grid := lines and thumbnails.grid(lines, attributes, columns):
            cards.append(evaluation.card(subject, "", grid))
    if not cards:
        return None
    same = _same_seeds(found.values())
    noise = "the same noise" if same else "different noise, because their seeds differ"
    return evaluation.cards_section(
        "The same professions",
        cards,
        f"The base pictures are those of {first}. Pictures one above the other started from"
        f" {noise}.",
    )


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


def _differences(runs: Runs) -> Markup:
    settings = {name: flat({**r.made, **r.scored, **r.environment}) for name, r in runs.items()}
    keys = dict.fromkeys(key for found in settings.values() for key in found)
    differing = {
        key: [found.get(key, "–") for found in settings.values()]
        for key in keys
        if len({found.get(key) for found in settings.values()}) > 1
    }
    expected = {k: v for k, v in differing.items() if k.startswith(_EXPECTED_TO_DIFFER)}
    doubtful = {k: v for k, v in differing.items() if k not in expected}
    head = tag("tr", (tag("th", name, scope="col") for name in ("setting", *runs)))

    def listed(pairs: Mapping[str, Sequence[str]]) -> Markup:
        rows = (
            tag("tr", tag("th", k, scope="row"), (tag("td", v, class_="text") for v in values))
            for k, values in pairs.items()
        )
        return table("Settings", head, rows)

    return section(
        "Settings that differ",
        fragment(
            tag("p", "These may change the numbers, apart from the adapters:"),
            listed(doubtful),
        )
        if doubtful
        else tag("p", "Model, settings, judges and versions are the same."),
        folded("Adapters and dates", listed(expected)) if expected else None,
    )
