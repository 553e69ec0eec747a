"""HTML and SVG as nested calls: `tag("p", "5 < 6", class_="note")`.

Every string that is not already Markup is escaped, in text and in attributes, so that a question, a file name or a
config value can never become part of the page. `None` children and attributes vanish; `class_` loses its underscore
and other underscores become hyphens (`stroke_width`). `whole_page` puts a body into the frame that all pages share:
one look, and a content policy under which nothing is loaded and no script runs but the page's own.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from html import escape
from pathlib import Path
from string import Template

HERE = Path(__file__).parent
# control characters and lone surrogates are legal in records and illegal in HTML
ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
VOID = {"br", "hr", "meta", "input", "line", "rect", "circle", "path", "polyline"}


class Markup(str):
    """Text that is already safe HTML."""

    __slots__ = ()


Child = str | int | float | Markup | None


def safe(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    return escape(ILLEGAL.sub("\ufffd", str(child)))


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


def whole_page(title: str, body: Iterable[Child], *, style: Path | None = None, script: Path | None = None) -> str:
    """A self-contained page. `style` adds to the common one; the policy names `script` by its hash."""
    template = Template((HERE / "page.html").read_text(encoding="utf-8"))
    styles = [path.read_text(encoding="utf-8") for path in (HERE / "page.css", style) if path]
    code = script.read_text(encoding="utf-8") if script else ""
    checksum = b64encode(sha256(code.encode()).digest()).decode()
    return template.substitute(
        title=safe(title),
        style="".join(styles),
        body=join(body),
        allowed=f"; script-src 'sha256-{checksum}'" if code else "",
        script=f"<script>{code}</script>\n" if code else "",
    )
