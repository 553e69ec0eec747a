"""Counts as inline SVG: horizontal bars for names, columns for numbers.

Every chart says its numbers in words to a screen reader, and under the pointer to everybody else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ipt_jax.corpus.markup import Markup, tag

WIDTH = 330
ROW = 30  # a name and its count, the bar below them, a gap
BAR = 7
HEIGHT, FOOT = 130, 22  # of columns, and of the labels below them
NAME = 32  # characters of a name that fit
GAP = 2


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
            tag("text", name if len(name) <= NAME else name[: NAME - 1] + "…", x=0, y=y + 12, class_="name"),
            tag("text", f"{count:,} · {count / total:.1%}", x=WIDTH, y=y + 12, text_anchor="end", class_="value"),
            tag("rect", x=0, y=y + 17, width=max(count / most * WIDTH, 1.0), height=BAR, rx=2, class_=f"bar {colour}"),
            tag("title", f"{name}: {count:,} ({count / total:.1%})"),
        )
        for y, (name, count) in ((ROW * place, row) for place, row in enumerate(counts))
    ]
    return chart(title, rows, ROW * len(counts), [f"{name} {count:,}" for name, count in counts])


def column_chart(title: str, columns: Sequence[Column], *, colour: str) -> Markup:
    """A column a number or range of numbers, as many labels below as fit."""
    most, total = max(column.count for column in columns), sum(column.count for column in columns)
    width = WIDTH / len(columns)
    step = 1 + (len(columns) * max(len(column.label) for column in columns) * 8) // WIDTH
    drawn = [tag("line", class_="axis", x1=0, x2=WIDTH, y1=HEIGHT, y2=HEIGHT)]
    for place, column in enumerate(columns):
        height = column.count / most * (HEIGHT - 14)
        at = place * width
        bar = dict(x=at + GAP / 2, y=HEIGHT - height, width=max(width - GAP, 1.0), height=height)
        label = tag("text", column.label, class_="tick", x=at + width / 2, y=HEIGHT + 16, text_anchor="middle")
        drawn.append(
            tag(
                "g",
                tag("rect", x=at, y=0, width=width, height=HEIGHT, class_="reach"),
                tag("rect", **bar, rx=1.5, class_=f"bar {colour}"),
                label if place % step == 0 else None,
                tag("title", f"{column.words}: {column.count:,} ({column.count / total:.1%})"),
            )
        )
    return chart(title, drawn, HEIGHT + FOOT, [f"{column.words} {column.count:,}" for column in columns])


def chart(title: str, parts: Sequence[Markup], height: float, words: Sequence[str]) -> Markup:
    label = f"{title}: {'; '.join(words)}"
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height:.0f}", role="img", class_="chart", aria_label=label)
