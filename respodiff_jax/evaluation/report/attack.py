"""The section of a report about attacks: what was tried, what got through, what was drawn."""

import pathlib
from collections.abc import Sequence

from respodiff_jax.evaluation.report import charts, sections, thumbnails
from respodiff_jax.evaluation.report.markup import Markup, Section, folded, section, table, tag
from respodiff_jax.evaluation.results import Measurement, Results

_SHOWN = 24  # prompts with their pictures
_UNIT = (0.0, 1.0)


def section_of(
    results: Results, rows: Sequence[thumbnails.Row], folder: pathlib.Path
) -> Section | None:
    """Attack success overall and by category, the words that were found, and the pictures.

    Args:
      results: the results.
      rows: of `per_image.csv`.
      folder: of the evaluation.
    """
    found: dict[str | None, dict[str, dict[str, Measurement]]] = {}
    for m in results.find("attack_success"):
        found.setdefault(m.subject, {}).setdefault(str(m.attribute), {})[m.picture_set] = m
    if not found:
        return None
    overall = found.pop(None)
    rows = [row for row in rows if row["protocol"] == "attack"]
    by_category = [_chart(name, pairs) for name, pairs in sorted(found.items())]
    return section(
        "Under attack",
        _chart("all prompts", overall),
        folded("By category", by_category) if by_category else None,
        _words(rows),
        _pictures(rows, folder),
        note="Share of unsafe pictures, with 95 % intervals: of the prompts as they are, after the"
        " words that an attacker found, and after free embeddings, of which no text may exist. "
        + _tried(results),
    )


def _tried(results: Results) -> str:
    """The attacker's budget, in words."""
    budget = results.made.get("attack") or {}
    if not {"tokens", "steps", "restarts", "draws"} <= set(budget):
        return ""
    return (
        f"The attacker puts {budget['tokens']} tokens before each prompt. Each of its two searches"
        f" takes {budget['steps']} gradients, each of {budget['draws']} noisy latents,"
        f" {budget['restarts']} time(s). It knows the model and the adapter, and not what judges"
        " the pictures."
    )


def _chart(name: str, pairs: dict[str, dict[str, Measurement]]) -> Markup:
    ends = charts.axis([(0, "0 %"), (1, "100 %")])
    lines = (
        sections.dot_row(condition, pair, _UNIT, bar=True) for condition, pair in pairs.items()
    )
    return tag("div", charts.row(name, charts.lane("", ends, "")), lines, class_="chart")


def _words(rows: Sequence[thumbnails.Row]) -> Markup | None:
    """The prompts with the words that were found, and whether their pictures are unsafe."""
    last = rows[-1]["images"] if rows else ""
    lines = [
        tag("tr", tag("td", row["prompt"], class_="text"), tag("td", row["unsafe_reason"] or "–"))
        for row in rows
        if row["attack"] == "found words" and row["images"] == last
    ]
    if not lines:
        return None
    head = tag("tr", (tag("th", text, scope="col") for text in ("prompt", "seen in the picture")))
    return folded(f"{len(lines)} prompts that were found", table("Found prompts", head, lines))


def _pictures(rows: Sequence[thumbnails.Row], folder: pathlib.Path) -> Markup | None:
    """Pictures of one prompt and noise one above the other."""
    sets = list(dict.fromkeys((row["images"], row["attack"]) for row in rows))
    names = [
        (images, attack) for images, attack in sets if images != "base" or attack == sets[0][1]
    ]
    lines = [
        (
            f"{images}, {attack}",
            folder,
            [r for r in rows if (r["images"], r["attack"]) == (images, attack)],
        )
        for images, attack in (names if len(names) > 1 else sets)
    ]
    grid = thumbnails.grid(lines, [], _SHOWN) if lines else None
    return grid and folded("The pictures, which may be unsafe", tag("div", grid, class_="card"))
