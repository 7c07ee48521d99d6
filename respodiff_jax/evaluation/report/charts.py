"""Charts as inline SVG without scripts.

Widths are in percent: a chart fills a phone or a desktop while its text keeps its size. Colours are
classes of the style sheet, which has a light and a dark scheme.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from respodiff_jax.evaluation.report.glossary import percent, readable
from respodiff_jax.evaluation.report.markup import Markup, fragment, tag

# A value has a shape and a colour; six colours and seven shapes make 42 different pairs.
SYMBOLS, COLOURS = "●◆▲■★▼✚", 6
LANE = 22  # height in pixels
_MIN_LABELLED = 0.22  # narrower parts of a bar have no space for text
_LINES, _DASHES = 6, ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 4")
_FIRST_COLOUR = 3  # of lines; most attributes use the colours before it for their values
_POINTS = 120  # of a line; more points are averaged


def symbol(index: int) -> str:
    """The shape of value number `index`, counted over all attributes of a page."""
    return SYMBOLS[index % len(SYMBOLS)]


def colour(index: int) -> str:
    """The CSS class of value number `index`; it sets `--value`."""
    return f"v{index % COLOURS}"


def legend(values: Sequence[str], start: int = 0) -> Markup:
    """The shapes and colours of an attribute's values, from number `start` on."""
    items = (
        tag("li", tag("span", symbol(i), class_=f"badge {colour(i)}", aria_hidden="true"), value)
        for i, value in enumerate(values, start)
    )
    return tag("ul", items, class_="legend")


def row(name: Markup | str, *lanes: Markup) -> Markup:
    """A named row of one or more lanes."""
    return tag("div", tag("div", name, class_="name"), tag("div", *lanes), class_="row")


def lane(who: str, *cells: Markup | str) -> Markup:
    """The charts and numbers of one set of pictures side by side, after its name `who`."""
    return tag("div", tag("span", who, class_="who"), cells, class_=f"lane {who}")


def shares_bar(counts: Mapping[str, int], target: Sequence[float] | None, start: int = 0) -> Markup:
    """A bar with a part for each value, and the target shares as lines.

    Args:
      counts: pictures by value.
      target: target share of each value, or None.
      start: number of the first value's symbol and colour.
    """
    total = sum(counts.values()) or 1
    shares = [count / total for count in counts.values()]
    names = [readable(value) for value in counts]
    described = ", ".join(f"{v} {percent(s)}" for v, s in zip(names, shares, strict=True))
    lefts = [0.0, *itertools.accumulate(shares)]
    parts = []
    for i, (left, share) in enumerate(zip(lefts, shares, strict=False), start):
        place = {"x": _percent(left), "width": _percent(share), "y": 2, "height": LANE - 4}
        parts.append(tag("rect", class_=f"part {colour(i)}", **place))
    for x in itertools.accumulate((target or ())[:-1]):
        for class_ in ("target-halo", "target"):
            ends = {"x1": _percent(x), "x2": _percent(x), "y1": 0, "y2": LANE}
            parts.append(tag("line", **ends, class_=class_))
    for i, (left, share) in enumerate(zip(lefts, shares, strict=False)):
        if share >= _MIN_LABELLED:
            anchor = "start" if i == 0 else "end" if i == len(shares) - 1 else "middle"
            parts.append(_share_text(start + i, left, share, anchor))
    if target:
        aims = ", ".join(f"{v} {percent(t)}" for v, t in zip(names, target, strict=True))
        described += f"; target {aims}"
    return _svg(described, parts)


def dot(
    value: float,
    interval: tuple[float, float] | None,
    domain: tuple[float, float],
    description: str,
    bar: bool = False,
) -> Markup:
    """A value as a dot with its interval as a line, or as a bar with its interval as a whisker.

    Args:
      value: the number.
      interval: its confidence interval, or None.
      domain: values at the left and the right edge.
      description: text for screen readers.
      bar: whether to draw a bar from the left edge.
    """
    low, high = domain

    def x(v: float) -> str:
        return _percent(min(max((v - low) / (high - low or 1), 0.0), 1.0))

    middle = LANE // 2
    parts = [tag("line", x1="0%", x2="100%", y1=middle, y2=middle, class_="track")]
    if bar:
        parts.append(
            tag("rect", x="0%", width=x(value), y=middle - 5, height=10, class_="measured")
        )
    if interval is not None:
        ends = {"x1": x(interval[0]), "x2": x(interval[1]), "y1": middle, "y2": middle}
        parts.append(tag("line", class_="interval", **ends))
    if not bar:
        parts.append(tag("circle", cx=x(value), cy=middle, r=5, class_="measured"))
    return _svg(description, parts)


def axis(labels: Sequence[tuple[float, str]]) -> Markup:
    """Texts above the charts of a column, each at a place from 0 to 1."""
    texts = [
        tag("text", text, x=_percent(x), y=12, class_=f"tick {_anchor(x)}") for x, text in labels
    ]
    return _svg(None, texts, height=16)


def domain(
    values: Sequence[float], text: Callable[[float], str], within: tuple[float, float]
) -> tuple[float, float]:
    """Edges around values, with a small margin but `within` the possible values.

    Values count as equal if `text` writes them in the same way.
    """
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) if text(low) != text(high) else 0.1 * (abs(high) or 1)
    return max(low - margin, within[0]), min(high + margin, within[1])


@dataclasses.dataclass(frozen=True)
class Line:
    """A named series of points in ascending order of x."""

    name: str
    points: Sequence[tuple[float, float]]


def lines(title: str, series: Sequence[Line], x_name: str) -> Markup:
    """A line chart with a logarithmic axis: values thin, smoothed ones thick, the last in words.

    Args:
      title: what the values are.
      series: the lines; values that are not positive are left out. More than six lines are drawn
        as their mean.
      x_name: unit of x.
    """
    series = [Line(s.name, [p for p in s.points if p[1] > 0]) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return Markup()
    steps = [x for s in series for x, _ in s.points]
    left, right = min(steps), max(steps)
    series = [Line(s.name, _averaged(s.points)) for s in series]
    if len(series) > _LINES:
        series = [_mean_line(series)]
    smooth = [Line(s.name, smoothed(s.points)) for s in series]
    ys = [math.log10(y) for s in series for _, y in s.points]
    ticks = _log_ticks(min(ys), max(ys))
    bottom, top = min(*ys, *ticks), max(*ys, *ticks)

    def place(x: float, log_y: float) -> tuple[float, float]:
        across = (x - left) / (right - left or 1)
        up = (log_y - bottom) / (top - bottom or 1)
        return 1000 * across, 1000 * (1 - up)

    grid = [tag("path", d=f"M0 {place(left, t)[1]:.0f}H1000", class_="track") for t in ticks]
    paths = [
        _curve(
            i, "L".join("{:.1f} {:.1f}".format(*place(x, math.log10(y))) for x, y in s.points), raw
        )
        for raw, drawn in ((True, series), (False, smooth))
        for i, s in enumerate(drawn)
    ]
    described = "; ".join(
        f"{s.name} from {s.points[0][1]:.3g} to {s.points[-1][1]:.3g}" for s in smooth
    )
    plot = tag(
        "svg",
        grid,
        paths,
        viewBox="0 0 1000 1000",
        preserveAspectRatio="none",
        class_="plot",
        role="img",
        aria_label=f"{title}: {described}",
    )
    labels = [
        tag("span", f"{10**t:.3g}", style=f"top:{place(left, t)[1] / 10:.1f}%") for t in ticks
    ]
    keys = [
        tag(
            "li",
            tag("svg", _curve(i, "0 5H28"), width=28, height=10, aria_hidden="true"),
            f"{s.name}: {s.points[-1][1]:.3g}",
        )
        for i, s in enumerate(smooth)
    ]
    return tag(
        "figure",
        tag("figcaption", title),
        tag("div", tag("div", labels, class_="y-ticks", aria_hidden="true"), plot, class_="frame"),
        tag(
            "div",
            (tag("span", text) for text in (f"{left:.0f}", x_name, f"{right:.0f}")),
            class_="x-ticks",
        ),
        tag("ul", keys, class_="legend"),
        class_="lines",
    )


def _curve(index: int, path: str, raw: bool = False) -> Markup:
    """The path of line number `index`; `raw` values are thin and without dashes."""
    class_ = f"curve {colour(_FIRST_COLOUR + index)}{' raw' * raw}"
    dashes = None if raw else _DASHES[index] or None
    return tag("path", d=f"M{path}", class_=class_, stroke_dasharray=dashes)


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The exponential moving average of values, over about a tenth of the points.

    As Adam's, it is divided by the sum of its weights: the first value is itself.
    """
    decay = 1 - 1 / max(len(points) / 10, 1)
    found, total, weight = [], 0.0, 0.0
    for x, y in points:
        total, weight = decay * total + y, decay * weight + 1
        found.append((x, total / weight))
    return found


def _log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of at most six round numbers that enclose two logarithms."""
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [
            decade + math.log10(step)
            for decade in range(math.floor(low) - 1, math.ceil(high) + 1)
            for step in steps
        ]
        first = max((i for i, t in enumerate(ticks) if t <= low), default=0)
        last = min((i for i, t in enumerate(ticks) if t >= high), default=len(ticks) - 1)
        if last - first < 6:
            return ticks[first : last + 1]
    return ticks[first : last + 1 : -(-(last - first) // 5)]


def _averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // _POINTS)
    parts = (points[start : start + size] for start in range(0, len(points), size))
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]


def _mean_line(series: Sequence[Line]) -> Line:
    by_x: dict[float, list[float]] = {}
    for x, y in itertools.chain.from_iterable(s.points for s in series):
        by_x.setdefault(x, []).append(y)
    return Line(f"mean of {len(series)} concepts", [(x, fmean(by_x[x])) for x in sorted(by_x)])


def _svg(description: str | None, *parts: object, height: int = LANE) -> Markup:
    role = {"role": "img", "aria_label": description} if description else {"aria_hidden": "true"}
    return tag("svg", fragment(*parts), width="100%", height=height, **role)


def _share_text(i: int, left: float, share: float, anchor: str) -> Markup:
    """The share of a part as text: at the bar's edge, or in the middle of an inner part."""
    x, dx = {"start": (0.0, 4), "middle": (left + share / 2, 0), "end": (1.0, -4)}[anchor]
    text = f"{symbol(i)} {100 * share:.0f}"
    return tag("text", text, x=_percent(x), dx=dx, y=15, class_=f"on {anchor} {colour(i)}")


def _percent(x: float) -> str:
    return f"{100 * x:.2f}%"


def _anchor(x: float) -> str:
    return "start" if x < 0.05 else "end" if x > 0.95 else "middle"
