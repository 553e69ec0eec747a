"""HTML pages and SVG charts from Jinja2 templates.

Guarantees: every value is escaped in text and in attributes, unless a template made it; a page is one file that loads
nothing, and its content policy allows no script but the page's own. A line of a template that is indented continues
the line above, so pages hold no indentation.
"""

from __future__ import annotations

import functools
import html
import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import write_whole, writing

HERE = Path(__file__).parent
# control characters and lone surrogates are legal in records and illegal in HTML
ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def safe(value: Any) -> Markup:
    """A value as HTML: escaped unless it is Markup; None is empty; floats, which are coordinates, have one decimal."""
    if isinstance(value, Markup):
        return value
    if isinstance(value, float):
        value = f"{value:.1f}".removesuffix(".0")
    return Markup("" if value is None else html.escape(ILLEGAL.sub("\ufffd", str(value))))


@functools.cache
def environment() -> Environment:
    """Templates by path; those of this package by name."""
    return Environment(
        autoescape=True,
        finalize=safe,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        loader=FunctionLoader(lambda name: re.sub(r"\n +", "", (HERE / name).read_text(encoding="utf-8"))),
    )


def draw(macro: str, **values: Any) -> Markup:
    """The output of a macro of charts.html.j2."""
    module: Any = environment().get_template("charts.html.j2").module
    return getattr(module, macro)(**values)


def render_page(template: Path, **values: Any) -> str:
    """A complete page. The template extends page.html.j2. Files NAME.css and NAME.js beside it are style and script."""
    name = template.name.removesuffix(".html.j2")
    styles = [HERE / "page.css", template.with_name(f"{name}.css")]
    script = template.with_name(f"{name}.js")
    code = script.read_text(encoding="utf-8") if script.exists() else ""
    return (
        environment()
        .get_template(str(template))
        .render(
            style=Markup("".join(path.read_text(encoding="utf-8") for path in styles if path.exists())),
            script=Markup(code),
            checksum=b64encode(sha256(code.encode()).digest()).decode(),
            **values,
        )
    )


def write_page(output: Path, page: str) -> int:
    """Writes the page atomically; returns its bytes. Raises UserError for a directory or an unwritable path."""
    if output.is_dir():
        raise UserError(f"output {output}: is a directory; give the path of a file, such as {output / 'page.html'}")
    data = page.encode()
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, data)
    return len(data)
