"""HTML and SVG as nested calls: `tag("p", "5 < 6", class_="note")`.

Every string that is not already Markup is escaped, in text and in attributes, so that a question, a file name or a
config value can never become part of the page. `None` children and attributes vanish; `class_` loses its underscore
and other underscores become hyphens (`stroke_width`).
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = {"br", "hr", "meta", "line", "rect", "circle", "path", "polyline"}


class Markup(str):
    """Text that is already safe HTML."""

    __slots__ = ()


Child = str | int | float | Markup | None


def safe(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    # control characters are legal in records and illegal in HTML
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(child)))


def join(children: Iterable[Child]) -> Markup:
    return Markup("".join(safe(child) for child in children))


def tag(name: str, *children: Child, **attributes: Child) -> Markup:
    opening = name + "".join(
        f' {key.rstrip("_").replace("_", "-")}="{safe(format_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID and not children:
        return Markup(f"<{opening}/>")
    return Markup(f"<{opening}>{join(children)}</{name}>")


def format_number(value: Child) -> Child:
    """Coordinates at a tenth of a unit: a page with thousands of points stays small."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value
