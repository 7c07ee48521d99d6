"""HTML and SVG by plain functions; text is escaped unless it is already `Markup`."""

import html
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

_STYLE = pathlib.Path(__file__).parent / "report.css"
_VOID = {"img", "meta", "wbr"}


class Markup(str):
    """Text that is HTML; joining or formatting it gives plain text, which will be escaped."""


class Section(Markup):
    """A section of a page, which a list of contents names by its `title`."""

    title: str


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element of HTML or SVG.

    Args:
      name: name of the element.
      *children: `Markup` stays as it is; other values become escaped text; iterables are taken one
        by one; None and False are left out.
      **attributes: values are escaped; None and False leave the attribute out, True gives it no
        value. `class_` is class, and an underscore is a hyphen.
    """
    written = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            written.append(key)
        elif value is not None and value is not False:
            written.append(f'{key}="{html.escape(str(value))}"')
    opening = f"<{' '.join(written)}>"
    if name in _VOID:
        return Markup(opening)
    return Markup(f"{opening}{fragment(*children)}</{name}>")


def fragment(*children: Any) -> Markup:
    """Elements and texts one after another; for children see `tag`."""
    return Markup("".join(map(_child, children)))


def _child(child: Any) -> str:
    if child is None or child is False:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, Iterable) and not isinstance(child, str):
        return fragment(*child)
    return html.escape(str(child), quote=False)


def page(
    title: str, header: Markup, sections: Iterable[Section | None], subjects: Iterable[str] = ()
) -> str:
    """A complete document in the report's style: header, contents and sections.

    Args:
      title: name in the browser.
      header: above the contents.
      sections: in their order; None is left out.
      subjects: whose pictures the contents link to.
    """
    sections = list(sections)
    body = header, contents(sections, subjects), tag("main", sections)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(_STYLE.read_text(encoding="utf-8"))),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def section(title: str, *content: Any, note: Any = None) -> Section:
    """A section of a page with a title, which is also its anchor."""
    inner = tag("h2", title), note and tag("p", note, class_="note"), content
    made = Section(tag("section", inner, id=anchor(title)))
    made.title = title
    return made


def contents(sections: Iterable[Section | None], subjects: Iterable[str] = ()) -> Markup:
    """Links to the sections, and to the pictures of the subjects."""
    links = (tag("li", link(s.title, anchor(s.title))) for s in sections if s)
    others = (tag("li", link(name, subject_anchor(name))) for name in subjects)
    lists = [tag("ul", items) for items in map(fragment, (links, others)) if items]
    return tag("nav", lists, aria_label="Contents")


def anchor(*words: str) -> str:
    """The id of an element that is known by these words."""
    return re.sub(r"\W+", "-", " ".join(words).lower()).strip("-")


def subject_anchor(subject: str) -> str:
    """The id of the pictures of a profession."""
    return anchor("pictures of", subject)


def link(text: Any, target: str) -> Markup:
    """A link to the element of this page with an id."""
    return tag("a", text, href=f"#{target}")


def breakable(text: str) -> Markup:
    """A text whose words may go on in the next line after `/` and `_`, and nowhere else."""
    return Markup(re.sub("([/_])", r"\1<wbr>", html.escape(text, quote=False)))


def folded(summary: str, *content: Any) -> Markup:
    """Content that opens on a click."""
    return tag("details", tag("summary", summary), content)


def table(name: str, head: Markup, rows: Iterable[Markup], columns: int | None = None) -> Markup:
    """A table that scrolls sideways if it is wider than the page.

    Args:
      name: its contents, for screen readers.
      head: its heading rows.
      rows: its rows.
      columns: number of cells side by side on a phone, where each row becomes a block and the cells
        are named by their `data-label`; with None the table scrolls there too.
    """
    phone = {} if columns is None else {"class_": "blocks", "style": f"--columns:{columns}"}
    body = tag("table", tag("thead", head), tag("tbody", rows), **phone)
    return tag("div", body, class_="scroll", tabindex=0, role="region", aria_label=name)


def definitions(pairs: Mapping[str, str]) -> Markup:
    """A list of definitions: name -> text."""
    return tag("dl", ((tag("dt", name), tag("dd", text)) for name, text in pairs.items()))


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as names and texts: `{"a": {"b_c": [1, 2]}}` becomes `{"a: b c": "1, 2"}`.

    Empty ones are left out.
    """
    found: dict[str, str] = {}
    for key, value in content.items():
        name = prefix + str(key).replace("_", " ")
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}: ")
        elif value not in (None, "", [], ()):
            found[name] = _text(value)
    return found


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        plain = all(isinstance(v, str | int | float) for v in value)
        return ", ".join(map(str, value)) if plain else json.dumps(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
