"""Charts as inline SVG: lines over one x axis, scores, intervals, shares, and counts as bars or columns.

Each chart states its numbers in its label, for a screen reader, and under the pointer, without a script. Values that
are not finite break a line. Long lines are thinned to POINTS points, each the mean of its neighbours, after smoothing.
Bars are horizontal, with the name above, so that a phone shows long names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ipt_jax.core.html import Markup, draw

PLOT_WIDTH, PLOT_HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 30, 44
POINTS = 400
BINS = 60
SCORE_ROW = 38  # a name and its score, the bar below them, a gap
COUNTS_WIDTH = 330

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    name: str
    colour: int  # index into the page's run colours
    points: list[Point]  # x ascending


@dataclass(frozen=True)
class Bar:
    name: str
    colour: int
    value: float  # 0 to 1
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Interval:
    name: str
    colour: int
    value: float
    low: float
    high: float
    points: list[float]  # single values, such as those of seeds
    words: str


@dataclass(frozen=True)
class Dot:
    name: str
    colour: int
    x: float  # positive
    y: float
    words: str


@dataclass(frozen=True)
class Column:
    label: str  # below the column, where there is room
    words: str  # what it counts
    count: int


@dataclass(frozen=True)
class Scale:
    """Data to pixels, linearly."""

    low: float
    high: float
    start: float
    stop: float
    count: int = 5  # of ticks, about

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(pixel, label) of round numbers."""
        values = ticks(self.low, self.high, self.count)
        return list(zip(map(self, values), tick_labels(values), strict=True))


@dataclass(frozen=True)
class LogScale(Scale):
    """Logarithms of data to pixels, linearly: `low`, `high` and what it is called with are powers of ten."""

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(pixel, label) of 1, 2 and 5 times each power of ten."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        values = [m * 10.0**power for power in powers for m in (1, 2, 5)]
        inside = [value for value in values if self.low <= math.log10(value) <= self.high]
        return [(self(math.log10(value)), short(value)) for value in inside]


def trend_chart(
    dots: Sequence[Dot], trend: Sequence[tuple[float, float, float, float]], *, title: str, x_label: str, y_label: str
) -> Markup:
    """Dots over a logarithmic x axis, and a line with its interval: (x, middle, low, high) of `trend`, x ascending."""
    xs = [math.log10(dot.x) for dot in dots]
    ys = [dot.y for dot in dots] + [value for _, *values in trend for value in values]
    margin = (max(ys) - min(ys)) * 0.08 or 1.0
    x = LogScale(min(xs) - 0.15, max(xs) + 0.15, LEFT, PLOT_WIDTH - RIGHT)
    y = Scale(min(ys) - margin, max(ys) + margin, PLOT_HEIGHT - BOTTOM, TOP)
    lines = [[(math.log10(at), values[place]) for at, *values in trend] for place in range(3)]
    return draw(
        "line_chart",
        label=_label(title, [f"{dot.name} {dot.words}" for dot in dots]),
        width=PLOT_WIDTH,
        height=PLOT_HEIGHT,
        x=x,
        y=y,
        x_label=x_label,
        y_label=y_label,
        paths=[
            (style, 7, _path(line, x, y))
            for style, line in zip(("line", "logged", "logged"), lines, strict=True)
            if line
        ],
        bins=[],
        dots=[(x(at), y(dot.y), dot) for at, dot in zip(xs, dots, strict=True)],
    )


def line_chart(
    lines: list[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    smooth: bool = True,
    zero: bool = False,
    thin_lines: Sequence[Line] = (),
) -> Markup:
    """Lines with axes and a read-out under the pointer. `zero` starts the y axis at 0.

    `smooth` draws a thick smoothed line over the thin logged one. `thin_lines` are drawn thin, without a read-out.
    """
    drawn = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    assert drawn, "a chart needs a finite point"
    smoothed = [Line(one.name, one.colour, smooth_points(one.points) if smooth else one.points) for one in drawn]
    x, y = _scales([*drawn, *smoothed, *thin_lines], zero)
    ends = []
    for line in smoothed:
        values = [value for _, value in line.points if math.isfinite(value)]
        ends.append(f"{line.name} goes from {short(values[0])} to {short(values[-1])}")
    thinned = [Line(line.name, line.colour, thin(line.points)) for line in smoothed]
    return draw(
        "line_chart",
        label=_label(title, ends),
        width=PLOT_WIDTH,
        height=PLOT_HEIGHT,
        x=x,
        y=y,
        x_label=x_label,
        y_label=y_label,
        paths=[
            ("logged", one.colour, _path(thin(one.points), x, y)) for one in [*thin_lines, *(drawn if smooth else ())]
        ]
        + [("line", line.colour, _path(line.points, x, y)) for line in thinned],
        bins=_bins(thinned, x, y),
    )


def smooth_points(points: list[Point]) -> list[Point]:
    """Mean over a fiftieth of the line around each point, so that a falling loss is not shown too high.

    The window shrinks evenly towards the start, where a curve is steep; at the end it keeps the points before.
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


def thin(points: list[Point], limit: int = POINTS) -> list[Point]:
    """At most `limit` points, each the mean of a run of neighbours. Keeps the first and the last point."""
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
    """The shortest labels that differ: a narrow range around 2 needs 2.0005, not 2 five times."""
    for digits in range(3, 12):
        labels = [short(value, digits) for value in values]
        if len(set(labels)) == len(labels):
            break
    return labels


def _label(title: str, words: Sequence[str]) -> str:
    return f"{title}: {'; '.join(words)}"


def _scales(lines: list[Line], zero: bool) -> tuple[Scale, Scale]:
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points if math.isfinite(y)]
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


def _path(points: list[Point], x: Scale, y: Scale) -> str:
    commands, pen = [], "M"
    for at, value in points:
        if math.isfinite(value):
            commands.append(f"{pen}{x(at):.1f} {y(value):.1f}")
            pen = "L"
        else:
            pen = "M"
    if len(commands) == 1:
        commands.append("h0.1")  # a single point is drawn as a dot by the round line cap
    return "".join(commands)


def _bins(lines: list[Line], x: Scale, y: Scale) -> list[dict[str, object]]:
    """Invisible columns over the plot. The one under the pointer shows its x and each line's value there."""
    width = (x.stop - x.start) / BINS
    bins: list[dict[str, object]] = []
    for i in range(BINS):
        low, high = (x.low + (x.high - x.low) * j / BINS for j in (i, i + 1))
        found = [(line, point) for line in lines if (point := _nearest(line.points, low, high))]
        if not found:
            continue
        at = found[0][1][0]
        words = [f"{line.name} {short(value)}" for line, (_, value) in found]
        title = f"{short(at)}: {', '.join(words)}"
        if len(title) > 56:  # wider than the chart: the colour names the line, the title spells it out
            words = [short(value) for _, (_, value) in found]
        dots = [
            {"x": x(point[0]), "y": y(point[1]), "colour": line.colour, "words": shown}
            for (line, point), shown in zip(found, words, strict=True)
        ]
        left = x.start + i * width
        bins.append({"left": left, "width": width, "x": x(at), "at": short(at), "dots": dots, "words": title})
    return bins


def _nearest(points: list[Point], low: float, high: float) -> Point | None:
    """The finite point in [low, high] that is nearest to the middle."""
    inside = [point for point in points if low <= point[0] <= high and math.isfinite(point[1])]
    return min(inside, key=lambda point: abs(point[0] - (low + high) / 2), default=None)


def score(value: float, stderr: float | None) -> str:
    """`61.2 ± 1.3 %`."""
    return f"{100 * value:.1f} %" if stderr is None else f"{100 * value:.1f} ± {100 * stderr:.1f} %"


def score_bars(title: str, bars: Sequence[Bar], *, chance: float | None) -> Markup:
    """Scores in percent, one bar per run, with whiskers of one standard error and a dashed line at chance.

    The axis ends at the next tenth above the longest whisker, at 100% at most.
    """
    longest = max(bar.value + (bar.stderr or 0) for bar in bars)
    high = min(1.0, max(0.1, (int(longest * 10) + 1) / 10))
    x = Scale(0, high * 100, 0, PLOT_WIDTH, count=4)
    rows = []
    for place, bar in enumerate(bars):
        y = 4 + place * SCORE_ROW
        whisker = ""
        if bar.stderr:
            left, right = x(100 * max(0.0, bar.value - bar.stderr)), x(100 * min(1.0, bar.value + bar.stderr))
            whisker = f"M{left:.1f} {y + 22:.1f}H{right:.1f}M{left:.1f} {y + 18:.1f}v8M{right:.1f} {y + 18:.1f}v8"
        rows.append((y, bar, score(bar.value, bar.stderr), max(x(100 * bar.value), 0.5), whisker))
    return draw(
        "score_bars",
        label=_label(title, [f"{bar.name} {score(bar.value, bar.stderr)}" for bar in bars]),
        x=x,
        bottom=4 + SCORE_ROW * len(bars),
        bars=rows,
        chance=chance,
        chance_at=x(100 * chance) if chance is not None and chance <= high else None,
    )


def interval_chart(title: str, intervals: Sequence[Interval]) -> Markup:
    """Values as dots with their intervals and single points, over one axis with a line at zero."""
    ends = [0.0, *(end for one in intervals for end in (one.low, one.high, *one.points))]
    margin = (max(ends) - min(ends)) * 0.03 or 1.0
    x = Scale(min(ends) - margin, max(ends) + margin, 0, PLOT_WIDTH)
    rows = []
    for place, one in enumerate(intervals):
        y, low, high = 4 + place * SCORE_ROW, x(one.low), x(one.high)
        whisker = f"M{low:.1f} {y + 22:.1f}H{high:.1f}M{low:.1f} {y + 18:.1f}v8M{high:.1f} {y + 18:.1f}v8"
        rows.append((y, one, x(one.value), whisker, [x(point) for point in one.points]))
    label = _label(title, [f"{one.name} {one.words}" for one in intervals])
    return draw("interval_chart", label=label, x=x, bottom=4 + SCORE_ROW * len(rows), rows=rows)


def share_bar(title: str, segments: Sequence[tuple[str, float, str]]) -> Markup:
    """A stacked bar of (style, share, words). The shares add up to 1. A wide segment shows its percentage."""
    ends = list(accumulate((share * PLOT_WIDTH for _, share, _ in segments), initial=0.0))
    label = _label(title, [words for *_, words in segments])
    return draw("share_bar", label=label, width=PLOT_WIDTH, segments=list(zip(ends, segments, strict=False)))


def bar_chart(title: str, counts: Sequence[tuple[str, int]], *, colour: str, total: int) -> Markup:
    """Per name its count, its share of `total`, and a bar whose length is relative to the largest count."""
    return draw(
        "bar_chart",
        label=_label(title, [f"{name} {count:,}" for name, count in counts]),
        width=COUNTS_WIDTH,
        counts=counts,
        most=max(count for _, count in counts),
        total=total,
        colour=colour,
    )


def column_chart(title: str, columns: Sequence[Column], *, colour: str) -> Markup:
    """One column per number or range of numbers, with as many labels below as fit."""
    letters = len(columns) * max(len(column.label) for column in columns)
    return draw(
        "column_chart",
        label=_label(title, [f"{column.words} {column.count:,}" for column in columns]),
        width=COUNTS_WIDTH,
        columns=columns,
        most=max(column.count for column in columns),
        total=sum(column.count for column in columns),
        step=1 + letters * 8 // COUNTS_WIDTH,  # columns per label
        colour=colour,
    )
