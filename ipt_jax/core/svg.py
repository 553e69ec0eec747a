"""Charts as inline SVG: lines, bars, counts.

Line charts as inline SVG: several runs over one x axis, with axes, ticks and a read-out under the pointer.

The thick line is smoothed (a centred mean), the thin one is as logged. Long runs are thinned to
POINTS a line, each the mean of its neighbours; nothing is thinned before it is smoothed. Values that are not finite
break the line. The read-out needs no script: each x bin carries its own label, which CSS shows on hover.

Bars as inline SVG: evaluation results with error bars, and shares that add up to one.

Both are horizontal, a row a bar with its label above it, so that long names need no turned text and a phone shows
them whole.

Counts as inline SVG: horizontal bars for names, columns for numbers.

Every chart says its numbers in words to a screen reader, and under the pointer to everybody else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ipt_jax.core.html import Markup, tag

PLOT_WIDTH, PLOT_HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 30, 44
POINTS = 400
BINS = 60


@dataclass(frozen=True)
class Line:
    name: str
    colour: int  # index into the page's run colours
    points: list[tuple[float, float]]  # x ascending


@dataclass(frozen=True)
class Scale:
    """Data to pixels, linearly."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def line_chart(
    lines: list[Line], *, title: str, x_label: str, y_label: str, smooth: bool, zero: bool = False
) -> Markup:
    """One SVG. `zero` starts the y axis at 0; `smooth` draws the smoothed line over the logged one."""
    drawn = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    assert drawn, "a chart needs a finite point"
    smoothed = {line.name: smooth_points(line.points) if smooth else line.points for line in drawn}
    x_scale, y_scale = _scales(drawn, smoothed, zero)
    children = [
        _axes(x_scale, y_scale, x_label, y_label),
        *(_path(thin(line.points), x_scale, y_scale, line.colour, "logged") for line in drawn if smooth),
        *(_path(thin(smoothed[line.name]), x_scale, y_scale, line.colour, "line") for line in drawn),
        _readout(drawn, smoothed, x_scale, y_scale),
    ]
    return tag(
        "svg",
        *children,
        viewBox=f"0 0 {PLOT_WIDTH} {PLOT_HEIGHT}",
        role="img",
        class_="chart",
        aria_label=_describe(title, drawn, smoothed),
    )


def smooth_points(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean over a fiftieth of the line around each point, so that a falling loss is not shown too high.

    The window shrinks evenly towards the start, where a curve is steep; at the end it keeps what lies behind it.
    """
    half = len(points) // 100
    counts, sums = [0], [0.0]
    for _, y in points:
        counts.append(counts[-1] + math.isfinite(y))
        sums.append(sums[-1] + (y if math.isfinite(y) else 0.0))
    result = []
    for i, (x, y) in enumerate(points):
        low, high = i - min(half, i), min(i + min(half, i), len(points) - 1) + 1
        count = counts[high] - counts[low]
        result.append((x, (sums[high] - sums[low]) / count if math.isfinite(y) else math.nan))
    return result


def thin(points: list[tuple[float, float]], limit: int = POINTS) -> list[tuple[float, float]]:
    """At most `limit` points, each the mean of a run of neighbours; the first and the last point stay."""
    if len(points) <= limit:
        return points
    inner = points[1:-1]
    count = limit - 2
    groups = [inner[i * len(inner) // count : (i + 1) * len(inner) // count] for i in range(count)]
    means = [
        (math.fsum(x for x, _ in group) / len(group), math.fsum(y for _, y in group) / len(group)) for group in groups
    ]
    return [points[0], *means, points[-1]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside [low, high], about `count` of them: ticks(0, 97) = [0, 20, 40, 60, 80]."""
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float, digits: int = 3) -> str:
    """`1.2M`, `950k`, `0.25`, `3e-4`, in at most `digits` digits: for ticks and read-outs."""
    size = abs(value)
    if size < 1e-12:
        return "0"
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= limit * 0.9995:
            return f"{value / limit:.{digits}g}{unit}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{digits}g}"


def tick_labels(values: list[float]) -> list[str]:
    """As short as tells the ticks apart: a narrow range around 2 needs 2.0005, not 2 five times."""
    for digits in range(3, 12):
        labels = [short(value, digits) for value in values]
        if len(set(labels)) == len(labels):
            break
    return labels


def _scales(lines: list[Line], smoothed: dict[str, list[tuple[float, float]]], zero: bool) -> tuple[Scale, Scale]:
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for points in (line.points, smoothed[line.name]) for _, y in points if math.isfinite(y)]
    low, high = (0.0 if zero else min(ys)), max(ys)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    x_low, x_high = min(xs), max(xs)
    if x_low < 0.1 * x_high:
        x_low = 0.0
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    return (
        Scale(x_low, x_high, LEFT, PLOT_WIDTH - RIGHT),
        Scale(0.0 if zero else low - margin, high + margin, PLOT_HEIGHT - BOTTOM, TOP),
    )


def _axes(x: Scale, y: Scale, x_label: str, y_label: str) -> Markup:
    left, right, bottom = x.start, x.stop, y.start
    parts = []
    values = ticks(y.low, y.high)
    for value, label in zip(values, tick_labels(values), strict=True):
        at = y(value)
        parts.append(tag("line", class_="grid", x1=left, x2=right, y1=at, y2=at))
        parts.append(tag("text", label, class_="tick", x=left - 7, y=at + 4, text_anchor="end"))
    values = ticks(x.low, x.high)
    for value, label in zip(values, tick_labels(values), strict=True):
        at = x(value)
        parts.append(tag("line", class_="mark", x1=at, x2=at, y1=bottom, y2=bottom + 4))
        parts.append(tag("text", label, class_="tick", x=at, y=bottom + 18, text_anchor="middle"))
    parts.append(tag("line", class_="axis", x1=left, x2=right, y1=bottom, y2=bottom))
    parts.append(tag("text", x_label, class_="label", x=(left + right) / 2, y=PLOT_HEIGHT - 6, text_anchor="middle"))
    parts.append(tag("text", y_label, class_="label corner", x=2, y=16))
    return tag("g", *parts)


def _path(points: list[tuple[float, float]], x: Scale, y: Scale, colour: int, kind: str) -> Markup:
    commands, pen = [], "M"
    for at, value in points:
        if math.isfinite(value):
            commands.append(f"{pen}{x(at):.1f} {y(value):.1f}")
            pen = "L"
        else:
            pen = "M"
    if len(commands) == 1:
        commands.append("h0.1")  # a single point is drawn as a dot by the round line cap
    return tag("path", d="".join(commands), class_=f"{kind} c{colour}")


def _readout(lines: list[Line], smoothed: dict[str, list[tuple[float, float]]], x: Scale, y: Scale) -> Markup:
    """Invisible columns over the plot; the one under the pointer shows its x and every line's value there."""
    thinned = {line.name: thin(smoothed[line.name]) for line in lines}
    width = (x.stop - x.start) / BINS
    columns = []
    for i in range(BINS):
        low, high = (x.low + (x.high - x.low) * j / BINS for j in (i, i + 1))
        values = [(line, found) for line in lines if (found := _nearest(thinned[line.name], low, high))]
        if values:
            area = tag("rect", x=x.start + i * width, y=TOP, width=width, height=y.start - TOP)
            columns.append(tag("g", area, *_reading(values, x, y), class_="bin"))
    return tag("g", *columns)


def _reading(values: list[tuple[Line, tuple[float, float]]], x: Scale, y: Scale) -> list[Markup]:
    at = values[0][1][0]
    words = f"{short(at)}: " + ", ".join(f"{line.name} {short(value)}" for line, (_, value) in values)
    named = len(words) <= 56  # wider than the chart: the colours alone say whose value it is, the title names them
    spans = [
        tag("tspan", f"{line.name} {short(value)}" if named else short(value), class_=f"c{line.colour}", dx=8)
        for line, (_, value) in values
    ]
    return [
        tag("line", x1=x(at), x2=x(at), y1=TOP, y2=y.start, class_="show"),
        *(tag("circle", cx=x(p[0]), cy=y(p[1]), r=3.5, class_=f"show c{line.colour}") for line, p in values),
        tag("text", short(at), *spans, class_="show words", x=PLOT_WIDTH - RIGHT, y=16, text_anchor="end"),
        tag("title", words),
    ]


def _nearest(points: list[tuple[float, float]], low: float, high: float) -> tuple[float, float] | None:
    """The finite point nearest to the middle of [low, high], if one lies inside."""
    inside = [point for point in points if low <= point[0] <= high and math.isfinite(point[1])]
    return min(inside, key=lambda point: abs(point[0] - (low + high) / 2), default=None)


def _describe(title: str, lines: list[Line], smoothed: dict[str, list[tuple[float, float]]]) -> str:
    parts = []
    for line in lines:
        values = [y for _, y in smoothed[line.name] if math.isfinite(y)]
        parts.append(f"{line.name} goes from {short(values[0])} to {short(values[-1])}")
    return f"{title}: {'; '.join(parts)}"


SCORES_WIDTH = 460
SCORES_ROW = 38  # the run's name and score, the bar below them, a gap
SCORES_BAR = 10


@dataclass(frozen=True)
class Bar:
    name: str
    colour: int
    value: float  # 0 to 1
    stderr: float | None
    n: int


@dataclass(frozen=True)
class BarSegment:
    name: str
    kind: str  # names its colour
    share: float
    words: str  # what the pointer shows


def score_bars(title: str, bars: Sequence[Bar], *, chance: float | None) -> Markup:
    """Scores between 0 and 1 in percent, one bar a run, whiskers of one standard error, a dashed line at chance."""
    start, stop, top = 0.0, float(SCORES_WIDTH), 4.0
    bottom = top + SCORES_ROW * len(bars)
    high = _ceiling(bars)
    parts = []
    for value in ticks(0, high * 100, 4):
        at = start + value / (high * 100) * (stop - start)
        parts.append(tag("line", class_="grid", x1=at, x2=at, y1=top - 4, y2=bottom))
        parts.append(tag("text", f"{value:g}%", class_="tick", x=at, y=bottom + 15, text_anchor=_anchor(value, high)))
    for i, bar in enumerate(bars):
        parts.append(_score_bar(bar, top + i * SCORES_ROW, (stop - start) / high))
    if chance is not None and chance <= high:
        at = start + chance / high * (stop - start)
        dashed = tag("line", class_="chance", x1=at, x2=at, y1=top - 4, y2=bottom)
        parts.append(tag("g", dashed, tag("title", f"chance {chance:.1%}")))
    words = "; ".join(f"{bar.name} {score(bar.value, bar.stderr)}" for bar in bars)
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {SCORES_WIDTH} {bottom + 20:.0f}",
        role="img",
        class_="chart",
        aria_label=f"{title}: {words}",
    )


def score(value: float, stderr: float | None) -> str:
    """`61.2 ± 1.3 %`."""
    return f"{100 * value:.1f} %" if stderr is None else f"{100 * value:.1f} ± {100 * stderr:.1f} %"


def share_bar(title: str, parts: Sequence[BarSegment]) -> Markup:
    """One stacked bar of shares that add up to 1; a part wide enough carries its percentage."""
    height, at = 30.0, 0.0
    drawn = []
    for part in parts:
        width = part.share * SCORES_WIDTH
        box = tag("rect", x=at, y=0, width=max(width - 1, 0.5), height=height, class_=f"k-{part.kind}")
        inside = width > 40
        text = tag("text", f"{part.share:.0%}", x=at + width / 2, y=20, text_anchor="middle", class_="inside")
        drawn.append(tag("g", box, text if inside else None, tag("title", part.words)))
        at += width
    words = "; ".join(part.words for part in parts)
    return tag(
        "svg",
        *drawn,
        viewBox=f"0 0 {SCORES_WIDTH} {height:.0f}",
        role="img",
        class_="chart share",
        aria_label=f"{title}: {words}",
    )


def _ceiling(bars: Sequence[Bar]) -> float:
    """The axis ends at the next tenth above the longest whisker, at 100% at most."""
    longest = max(bar.value + (bar.stderr or 0) for bar in bars)
    return min(1.0, max(0.1, (int(longest * 10) + 1) / 10))


def _anchor(value: float, high: float) -> str:
    if value == 0:
        return "start"
    return "end" if value >= 99.5 * high else "middle"


def _score_bar(bar: Bar, y: float, unit: float) -> Markup:
    length, top = bar.value * unit, y + 17
    said = score(bar.value, bar.stderr)
    parts = [
        tag("text", bar.name, x=0, y=y + 12, class_="name"),
        tag("text", said, x=SCORES_WIDTH, y=y + 12, text_anchor="end", class_="value"),
        tag("rect", x=0, y=top, width=max(length, 0.5), height=SCORES_BAR, rx=2, class_=f"bar c{bar.colour}"),
    ]
    if bar.stderr:
        low, high = max(0.0, bar.value - bar.stderr) * unit, min(1.0, bar.value + bar.stderr) * unit
        parts.append(tag("path", d=_whisker(low, high, top + SCORES_BAR / 2), class_="whisker"))
    return tag("g", *parts, tag("title", f"{bar.name}: {said} of {bar.n:,} questions"))


def _whisker(low: float, high: float, y: float) -> str:
    return f"M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 4:.1f}v8M{high:.1f} {y - 4:.1f}v8"


COUNTS_WIDTH = 330
COUNTS_ROW = 30  # a name and its count, the bar below them, a gap
COUNTS_BAR = 7
COLUMNS_HEIGHT, COLUMNS_FOOT = 130, 22  # of columns, and of the labels below them
NAME_LETTERS = 32  # characters of a name that fit
COLUMNS_GAP = 2


@dataclass(frozen=True)
class Column:
    label: str  # under the column, for every few
    words: str  # what it counts
    count: int


def bar_chart(title: str, counts: Sequence[tuple[str, int]], *, colour: str, total: int) -> Markup:
    """A row a name: its count, its share of `total`, a bar as long as its part of the largest."""
    most = max(count for _, count in counts)
    rows = [
        tag(
            "g",
            tag(
                "text",
                name if len(name) <= NAME_LETTERS else name[: NAME_LETTERS - 1] + "…",
                x=0,
                y=y + 12,
                class_="name",
            ),
            tag(
                "text", f"{count:,} · {count / total:.1%}", x=COUNTS_WIDTH, y=y + 12, text_anchor="end", class_="value"
            ),
            tag(
                "rect",
                x=0,
                y=y + 17,
                width=max(count / most * COUNTS_WIDTH, 1.0),
                height=COUNTS_BAR,
                rx=2,
                class_=f"bar {colour}",
            ),
            tag("title", f"{name}: {count:,} ({count / total:.1%})"),
        )
        for y, (name, count) in ((COUNTS_ROW * place, row) for place, row in enumerate(counts))
    ]
    return chart(title, rows, COUNTS_ROW * len(counts), [f"{name} {count:,}" for name, count in counts])


def column_chart(title: str, columns: Sequence[Column], *, colour: str) -> Markup:
    """A column a number or range of numbers, as many labels below as fit."""
    most, total = max(column.count for column in columns), sum(column.count for column in columns)
    width = COUNTS_WIDTH / len(columns)
    step = 1 + (len(columns) * max(len(column.label) for column in columns) * 8) // COUNTS_WIDTH
    drawn = [tag("line", class_="axis", x1=0, x2=COUNTS_WIDTH, y1=COLUMNS_HEIGHT, y2=COLUMNS_HEIGHT)]
    for place, column in enumerate(columns):
        height = column.count / most * (COLUMNS_HEIGHT - 14)
        at = place * width
        bar = dict(
            x=at + COLUMNS_GAP / 2, y=COLUMNS_HEIGHT - height, width=max(width - COLUMNS_GAP, 1.0), height=height
        )
        label = tag("text", column.label, class_="tick", x=at + width / 2, y=COLUMNS_HEIGHT + 16, text_anchor="middle")
        drawn.append(
            tag(
                "g",
                tag("rect", x=at, y=0, width=width, height=COLUMNS_HEIGHT, class_="reach"),
                tag("rect", **bar, rx=1.5, class_=f"bar {colour}"),
                label if place % step == 0 else None,
                tag("title", f"{column.words}: {column.count:,} ({column.count / total:.1%})"),
            )
        )
    return chart(
        title, drawn, COLUMNS_HEIGHT + COLUMNS_FOOT, [f"{column.words} {column.count:,}" for column in columns]
    )


def chart(title: str, parts: Sequence[Markup], height: float, words: Sequence[str]) -> Markup:
    label = f"{title}: {'; '.join(words)}"
    return tag("svg", *parts, viewBox=f"0 0 {COUNTS_WIDTH} {height:.0f}", role="img", class_="chart", aria_label=label)
