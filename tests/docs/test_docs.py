"""README, docs, CONTRIBUTING and CHANGELOG: width, links, index, named files and the order of the log.

Tables, code blocks and lines that hold one link may exceed the width. Words are checked in test_wording.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from extras import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
WIDTH = 100


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    """The text without fenced blocks; their lines stay, empty, so that line numbers hold."""
    return re.sub(r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)


def too_wide(text: str) -> list[str]:
    lines = without_code(text).splitlines()
    return [line for line in lines if len(line) > WIDTH and not re.match(r"\||    |\s*(- )?<?\S+>?$", line)]


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", without_code(text))


def test_the_checks_find_what_they_look_for() -> None:
    assert too_wide("x " * 60) and not too_wide("| " + "x " * 60) and not too_wide("```\n" + "x " * 60 + "\n```")
    assert not too_wide("- https://example.org/" + "x" * 100)
    assert links("[a](b.md#c) [d](https://e) [f]( g)") == ["b.md", "https://e"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_lines_fit_the_width(path: Path) -> None:
    assert too_wide(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_relative_links_resolve(path: Path) -> None:
    targets = [target for target in links(path.read_text(encoding="utf-8")) if not target.startswith("http")]
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_the_index_names_every_page_once() -> None:
    index = DOCS / "index.md"
    linked = [(DOCS / target).resolve() for target in links(index.read_text(encoding="utf-8"))]
    assert sorted(path for path in linked if path.is_relative_to(DOCS)) == [page for page in PAGES if page != index]


@pytest.mark.parametrize("path", [path for path in FILES if path != DOCS / "log.md"], ids=name_of)
def test_files_that_pages_name_exist(path: Path) -> None:
    named = re.findall(r"`((?:ipt_jax|synth|tests|benchmarks|launch|examples)/[\w./-]+\.\w+)`", path.read_text("utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_log_is_newest_first() -> None:
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d) · ", (DOCS / "log.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(dates) > 20 and dates == sorted(dates, reverse=True)
