"""Reading groups back, and showing them: what stands in a record is shown as it stands, in the terminal and in HTML."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import synth
from ipt_jax.core.errors import UserError
from ipt_jax.core.stage import Output
from ipt_jax.corpus.records import Document, GroupText, Pair, Segment, SynthGroup, encode
from synth.format.parser import parse_completion, reject
from synth.format.wire import wire_pair
from synth.inspect.html_page import html_page
from synth.inspect.run import run_inspect
from synth.inspect.statistics import GroupStatistics

OWN_TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "section", "article", "div"}
OWN_TAGS |= {
    "main",
    "header",
    "footer",
    "h4",
    "span",
    "b",
    "mark",
    "sup",
    "ol",
    "li",
    "script",
    "form",
    "label",
    "select",
}
OWN_TAGS |= {"select", "option", "input", "button", "output", "svg", "g", "text", "rect", "line", "details", "summary"}
OWN_TAGS |= {"dl", "dt", "dd"}
TEXT = "Ann built the [red]hall[/red] in Rome. <script>alert(1)</script> & more."


def make_group(name: str, pairs: list[Pair], text: str = TEXT) -> SynthGroup:
    member = GroupText(f"raw-{name}", 10, 10 + len(text), text, "tales", pairs, 1, 1234, 1024, 56, "stop")
    return SynthGroup(name, [member], "tiny", "abcdef" * 11, {"temperature": 0.0}, "f" * 64)


def write(path: Path, records: list[bytes]) -> Path:
    with Output(path, stage="synth", identity={}, shard_name="groups") as out:
        out.seal(0, 1, records)
        out.finish()
    return path


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    pairs = [
        wire_pair("Who built it?", "Ann"),
        wire_pair("Where?", "Rome", ["Oslo", "Rome"]),
        reject(Pair("<b>Why?</b>", "None"), "duplicate_question"),
        *parse_completion("<QUE> cut o", finished=False),
    ]
    pairs[0].scores = {"grounded": 0.75}
    return write(tmp_path / "groups", [encode(make_group(name, pairs)) for name in ("g0", "g1", "g2")])


def test_read_groups(groups: Path) -> None:
    assert [group.id for group in synth.read_groups(groups)] == ["g0", "g1", "g2"]
    assert next(iter(synth.read_groups(groups))).texts[0].pairs[1].options == ["Oslo", "Rome"]


def test_other_records_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "documents", [encode(Document("d", "s", "raw", [Segment("T")]))])
    with pytest.raises(UserError, match="wrote no groups; set it to the output of synth run"):
        list(synth.read_groups(path))


def test_terminal_shows_everything_as_it_stands(groups: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, view = run_inspect(groups, None, limit=2, sample=9, rejected=True)
    assert view
    view()
    shown = capsys.readouterr().out
    assert figures == {
        "groups": 3,
        "shown": 2,
        "texts": 2,
        "pairs": 4,
        "formats": {"choice": 2, "free": 2},
        "rejected": {"duplicate_question": 2, "truncated": 2},
        "output": None,
    }
    for part in ("group g0", "raw-g1 [10–", "[red]hall[/red]", "1,234 tokens", "1,024 cached", "Who built it?"):
        assert part in shown
    for part in ("abcdefabcdef", "temperature=0.0", "grounded 0.75", "duplicate", "truncated", "tales"):
        assert part in shown
    assert "g2" not in shown


def test_rejected_pairs_can_be_left_out(groups: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, view = run_inspect(groups, None, limit=1, sample=9, rejected=False)
    assert view
    view()
    assert "truncated" not in capsys.readouterr().out


class Page(HTMLParser):
    """Collects tags and text, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_whole_and_escaped(groups: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "page.html"
    figures, view = run_inspect(groups, output, limit=3, sample=9, rejected=True)
    assert view is None
    page = Page(output.read_text(encoding="utf-8"))
    assert capsys.readouterr().out == ""
    assert figures["output"] == str(output)
    assert page.links == []
    assert set(page.tags) <= OWN_TAGS
    for part in (
        "<script>alert(1)</script> & more.",
        "<b>Why?</b>",
        "refused: duplicate question",
        "grounded 0.75",
        "raw-g2",
    ):
        assert part in page.text
    assert page.tags.count("mark") == 6
    assert page.tags.count("section") == 3


PAIRS = st.builds(Pair, question=st.text(max_size=20), answer=st.text(max_size=8))


@given(st.text(alphabet="<>&\"'aAbB ​İ\n", max_size=60), st.lists(PAIRS, max_size=3))
@settings(max_examples=100)
def test_any_text_keeps_the_page_whole(text: str, pairs: list[Pair]) -> None:
    one = make_group("<g>", pairs, text)
    stats = GroupStatistics(total=1)
    stats.add(one)
    page = Page(html_page([one], stats, True))
    assert page.tags.count("article") == page.tags.count("section") == 1
    assert set(page.tags) <= OWN_TAGS


def test_a_contaminated_text_is_named() -> None:
    one = make_group("g", [])
    stats = GroupStatistics(total=1)
    stats.add(one)
    words = "contaminated: it makes no document"
    assert words not in Page(html_page([one], stats, True)).text
    one.meta = {"contaminated_texts": [0]}
    assert words in Page(html_page([one], stats, True)).text


def test_mistakes(groups: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        run_inspect(tmp_path / "absent", None, 1, 9, True)
    with pytest.raises(UserError, match="holds no groups"):
        run_inspect(write(tmp_path / "none", []), None, 1, 9, True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run_inspect(groups, tmp_path / "file" / "page.html", 1, 9, True)
