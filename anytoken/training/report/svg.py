"""Charts as SVG: no script, no network; one file suits light and dark, in a page of its own or in another's.

Styles name elements as well as classes, so that they affect nothing else on a page.

A chart is a group of WIDTH x HEIGHT; ``board`` lays groups out in one file with the colors,
``flowing`` does so in a page.
"""

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 290, 180
TINY = 1e-300  # a range below this has no ticks of its own
LEFT, RIGHT, TOP, BOTTOM = 44, 18, 24, 20  # margins of the plot inside a chart
STYLE = """
text{font:11px system-ui,sans-serif;fill:#333}text.title{font-weight:600}line.grid{stroke:#e2e2e2}
.line{fill:none;stroke-width:1.6}.line.main{stroke:#2563eb}rect.cell{fill:#2563eb}
.line.dots{stroke:#c2410c}circle.dot{fill:#c2410c}.line.reference{stroke:#8a8a8a;stroke-dasharray:4 3}
@media(prefers-color-scheme:dark){text{fill:#d0d0d0}line.grid{stroke:#383838}.line.main{stroke:#7aa7ff}
rect.cell{fill:#7aa7ff}.line.dots{stroke:#fb923c}circle.dot{fill:#fb923c}}
"""
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A curve: ``main`` is drawn whole, ``dots`` with its points marked, ``reference`` dashed and grey."""

    points: Sequence[Point]
    kind: str = "main"


def board(charts: Sequence[str], columns: int = 3) -> str:
    """Lay charts out in rows; one SVG element."""
    columns = max(1, min(columns, len(charts)))
    rows = math.ceil(len(charts) / columns)
    placed = "".join(
        f'<g transform="translate({WIDTH * (n % columns)} {HEIGHT * (n // columns)})">{chart}</g>'
        for n, chart in enumerate(charts)
    )
    size = WIDTH * columns, HEIGHT * rows
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" '
        f'style="max-width:100%;height:auto"><style>{STYLE}</style>{placed}</svg>'
    )


def flowing(charts: Sequence[str]) -> str:
    """Charts side by side in a page, wrapped to its width."""
    each = "".join(board([chart]) for chart in charts)
    return f'<div style="display:flex;flex-wrap:wrap">{each}</div>'


def line_chart(title: str, lines: Sequence[Line]) -> str:
    """Curves over steps on common axes; points that are not finite are left out."""
    shown = [
        Line([point for point in line.points if all(map(math.isfinite, point))], line.kind) for line in lines
    ]
    points = [point for line in shown for point in line.points]
    parts = [_title(title)]
    if not points:
        return "".join([*parts, f'<text x="{LEFT}" y="{HEIGHT / 2}">nothing yet</text>'])
    x_ticks, y_ticks = _ticks([x for x, _ in points], 3), _ticks([y for _, y in points], 4)
    x_of = _scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks:
        parts.append(
            f'<text x="{x_of(tick):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{_number(tick)}</text>'
        )
    for line in sorted(shown, key=lambda one: one.kind != "reference"):
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="line {line.kind}" points="{path}"/>')
        if line.kind == "dots":
            parts += [
                f'<circle class="dot" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.6"/>' for x, y in line.points
            ]
    return "".join(parts)


def heat_map(title: str, rows: Sequence[Sequence[float]]) -> str:
    """Shares of experts (columns) in layers (rows), the first layer on top; full color is twice an even share."""
    parts = [_title(title)]
    wide, high = (WIDTH - LEFT - RIGHT) / len(rows[0]), (HEIGHT - TOP - BOTTOM) / len(rows)
    for layer, shares in enumerate(rows):
        y = TOP + layer * high
        parts.append(f'<text x="{LEFT - 5}" y="{y + high / 2 + 4:.1f}" text-anchor="end">{layer}</text>')
        for expert, share in enumerate(shares):
            opacity = min(1.0, share * len(shares) / 2)
            parts.append(
                f'<rect class="cell" x="{LEFT + expert * wide:.1f}" y="{y:.1f}" width="{wide - 1:.1f}" '
                f'height="{high - 1:.1f}" fill-opacity="{opacity:.3f}">'
                f"<title>layer {layer}, expert {expert}: {100 * share:.1f} %</title></rect>"
            )
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">expert 0 … {len(rows[0]) - 1}</text>')
    return "".join(parts)


def thin(points: Sequence[Point], count: int = 200) -> list[Point]:
    """At most ``count`` points, each the mean of its neighbours."""
    if len(points) <= count:
        return list(points)
    edges = [round(n * len(points) / count) for n in range(count + 1)]
    bins = [points[start:stop] for start, stop in itertools.pairwise(edges)]
    return [(sum(x for x, _ in one) / len(one), sum(y for _, y in one) / len(one)) for one in bins]


def _title(text: str) -> str:
    return f'<text class="title" x="{LEFT}" y="14">{html.escape(text)}</text>'


def _scale(low: float, high: float, start: float, stop: float):  # type: ignore[no-untyped-def]
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _ticks(values: Sequence[float], wanted: int) -> list[float]:
    """Round numbers around the values, about ``wanted`` + 1 of them."""
    low, high = min(values), max(values)
    if high - low < TINY:
        margin = (abs(low) if abs(low) > TINY else 1.0) / 2
        low, high = low - margin, high + margin
    rough = (high - low) / wanted
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * one for one in (1, 2, 2.5, 5, 10) if magnitude * one >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:,.6g}k"
    return f"{value:,.6g}"  # enough to tell the ticks of a narrow range apart
