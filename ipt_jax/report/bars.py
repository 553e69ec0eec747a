"""Bars as inline SVG: evaluation results with error bars, and shares that add up to one.

Both are horizontal, a row a bar with its label above it, so that long names need no turned text and a phone shows
them whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ipt_jax.corpus.markup import Markup, tag
from ipt_jax.report.curves import ticks

WIDTH = 460
ROW = 38  # the run's name and score, the bar below them, a gap
BAR = 10


@dataclass(frozen=True)
class Bar:
    name: str
    colour: int
    value: float  # 0 to 1
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Part:
    name: str
    kind: str  # names its colour
    share: float
    words: str  # what the pointer shows


def score_bars(title: str, bars: Sequence[Bar], *, chance: float | None) -> Markup:
    """Scores between 0 and 1 in percent, one bar a run, whiskers of one standard error, a dashed line at chance."""
    start, stop, top = 0.0, float(WIDTH), 4.0
    bottom = top + ROW * len(bars)
    high = _ceiling(bars)
    parts = []
    for value in ticks(0, high * 100, 4):
        at = start + value / (high * 100) * (stop - start)
        parts.append(tag("line", class_="grid", x1=at, x2=at, y1=top - 4, y2=bottom))
        parts.append(tag("text", f"{value:g}%", class_="tick", x=at, y=bottom + 15, text_anchor=_anchor(value, high)))
    for i, bar in enumerate(bars):
        parts.append(_score_bar(bar, top + i * ROW, (stop - start) / high))
    if chance is not None and chance <= high:
        at = start + chance / high * (stop - start)
        dashed = tag("line", class_="chance", x1=at, x2=at, y1=top - 4, y2=bottom)
        parts.append(tag("g", dashed, tag("title", f"chance {chance:.1%}")))
    words = "; ".join(f"{bar.name} {score(bar.value, bar.stderr)}" for bar in bars)
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {WIDTH} {bottom + 20:.0f}",
        role="img",
        class_="chart",
        aria_label=f"{title}: {words}",
    )


def score(value: float, stderr: float | None) -> str:
    """`61.2 ± 1.3 %`."""
    return f"{100 * value:.1f} %" if stderr is None else f"{100 * value:.1f} ± {100 * stderr:.1f} %"


def share_bar(title: str, parts: Sequence[Part]) -> Markup:
    """One stacked bar of shares that add up to 1; a part wide enough carries its percentage."""
    height, at = 30.0, 0.0
    drawn = []
    for part in parts:
        width = part.share * WIDTH
        box = tag("rect", x=at, y=0, width=max(width - 1, 0.5), height=height, class_=f"k-{part.kind}")
        inside = width > 40
        text = tag("text", f"{part.share:.0%}", x=at + width / 2, y=20, text_anchor="middle", class_="inside")
        drawn.append(tag("g", box, text if inside else None, tag("title", part.words)))
        at += width
    words = "; ".join(part.words for part in parts)
    return tag(
        "svg",
        *drawn,
        viewBox=f"0 0 {WIDTH} {height:.0f}",
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
        tag("text", said, x=WIDTH, y=y + 12, text_anchor="end", class_="value"),
        tag("rect", x=0, y=top, width=max(length, 0.5), height=BAR, rx=2, class_=f"bar c{bar.colour}"),
    ]
    if bar.stderr:
        low, high = max(0.0, bar.value - bar.stderr) * unit, min(1.0, bar.value + bar.stderr) * unit
        parts.append(tag("path", d=_whisker(low, high, top + BAR / 2), class_="whisker"))
    return tag("g", *parts, tag("title", f"{bar.name}: {said} of {bar.n:,} questions"))


def _whisker(low: float, high: float, y: float) -> str:
    return f"M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 4:.1f}v8M{high:.1f} {y - 4:.1f}v8"
