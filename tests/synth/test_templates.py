"""The templates as data: how many, how different, what each must and must not hold, and how they are drawn."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from renderkit import EVEN, group, recipe, render
from scipy.stats import chisquare

from ipt_jax.core.errors import UserError
from synth.format.wire import wire_pair
from synth.render.layout import PLACEHOLDER, Fragment, fill, fill_words, pair_values
from synth.render.templates import FORMATS, LAYOUTS, DocumentStyle, Draws, OptionStyle, load_templates

TEMPLATES = load_templates()
WANTED = {
    "free": ["answer", "question"],
    "free_cot": ["answer", "question", "rationale"],
    "choice": ["answer", "options", "question"],
    "choice_cot": ["answer", "options", "question", "rationale"],
}
AT_LEAST = {"free": 30, "free_cot": 20, "choice": 20, "choice_cot": 20}


def plain(template: str) -> str:
    """What stays when case, spaces and marks are taken away: two templates that differ in these alone are one."""
    return re.sub(r"[^a-z{}]+", " ", template.lower()).strip()


def all_lists() -> Iterator[tuple[str, list[str]]]:
    yield from TEMPLATES.patterns.items()
    for name in FORMATS:
        yield f"turns of {name}", [turn.ask + turn.reply for turn in TEMPLATES.turns[name]]
    for layout in LAYOUTS:
        frame = TEMPLATES.frames[layout]
        yield f"openings of {layout}", frame.openings
        if any(frame.bridges):
            yield f"bridges of {layout}", frame.bridges


@pytest.mark.parametrize("name", FORMATS)
def test_there_are_many_and_no_two_are_alike(name: str) -> None:
    patterns = TEMPLATES.patterns[name]
    assert len(set(patterns)) == len(patterns)
    assert len({plain(pattern) for pattern in patterns}) >= AT_LEAST[name]


def test_no_list_says_the_same_twice() -> None:
    for name, templates in all_lists():
        assert len(set(templates)) == len(templates), name
        if "openings" in name or "bridges" in name:
            doubled = [key for key, n in Counter(map(plain, templates)).items() if n > 1]
            assert not doubled, (name, doubled)


@pytest.mark.parametrize("name", FORMATS)
def test_a_pattern_shows_each_part_once_and_asks_before_it_answers(name: str) -> None:
    both = [(turn.ask, turn.reply) for turn in TEMPLATES.turns[name]]
    for pattern in [*TEMPLATES.patterns[name], *(ask + "\n" + reply for ask, reply in both)]:
        parts = PLACEHOLDER.findall(pattern)
        assert sorted(parts) == WANTED[name], pattern
        assert parts[-1] == "answer", f"{pattern!r} makes something else the target"
        assert not re.search(r"\}[?.!]", pattern), f"{pattern!r} adds a mark where the pair brings its own"
        assert not re.search(r"\b(above|below|preceding|following text)\b", pattern), f"{pattern!r} names a place"
        assert "options" not in parts or re.search(r"(^|\n)\{options\}(\n|$)", pattern), f"{pattern!r}: own lines"
    for ask, reply in both:
        assert {"question", "options"} & set(parts) <= set(PLACEHOLDER.findall(ask))
        assert "{answer}" in reply


def test_a_frame_shows_its_text_once() -> None:
    for layout in LAYOUTS:
        frame = TEMPLATES.frames[layout]
        allowed = {"text", "asker", "replier"} if layout == "dialogue" else {"text"}
        for opening in frame.openings:
            assert PLACEHOLDER.findall(opening).count("text") == 1
            assert set(PLACEHOLDER.findall(opening)) <= allowed
        assert len(frame.openings) >= 12
        assert all("{text}" not in bridge for bridge in frame.bridges)
        if layout == "few_shot":
            assert all("{number}" in example and test and "{" not in test for example, test in frame.shots)
    assert all("option" in PLACEHOLDER.findall(style.mark) for style in TEMPLATES.options)


WORDS = st.text(st.characters(codec="utf-8"))


@given(WORDS, WORDS)
@settings(max_examples=100)
def test_fill_is_one_pass(question: str, answer: str) -> None:
    filled = fill_words("<{question}|{answer}>", {"question": question, "answer": answer})
    assert filled == f"<{question}|{answer}>"
    pieces = fill("{answer}{question}", {"question": [Fragment(question)], "answer": [Fragment(answer)]})
    assert [piece.words for piece in pieces] == [answer, question]


# ---- draws


def test_draws_do_not_share_a_stream() -> None:
    """The released code restarts one stream for every choice: of 7,900 combinations 1,738 occur."""
    free, choice = (TEMPLATES.patterns[name] for name in ("free", "choice"))
    draws = [Draws(0, f"group {i}", 0) for i in range(12_000)]
    seen = Counter((one.pick("pattern free", free), one.pick("pattern choice", choice)) for one in draws)
    assert len(seen) == len(free) * len(choice)
    assert chisquare([*seen.values()]).pvalue > 1e-4
    looks = [DocumentStyle(one, EVEN, TEMPLATES) for one in draws[:4000]]
    for pair in (
        Counter((document_style.layout, document_style.separator) for document_style in looks),
        Counter((document_style.layout, document_style.opening == "{text}") for document_style in looks),
        Counter((document_style.opening == "{text}", document_style.separator) for document_style in looks),
    ):
        assert chisquare([*pair.values()]).pvalue > 1e-4
    assert {document_style.layout for document_style in looks if document_style.opening == "{text}"} == set(LAYOUTS)


def test_layout_shares() -> None:
    shares = {"text_first": 0.6, "questions_first": 0.1, "dialogue": 0.1, "numbered": 0.1, "few_shot": 0.1}
    drawn = Counter(DocumentStyle(Draws(1, str(i), 0), recipe().layouts.weights, TEMPLATES).layout for i in range(5000))
    assert chisquare([drawn[name] for name in shares], [5000 * share for share in shares.values()]).pvalue > 1e-4
    only = {
        DocumentStyle(Draws(1, str(i), 0), recipe(layouts={"dialogue": 2}).layouts.weights, TEMPLATES).layout
        for i in range(50)
    }
    assert only == {"dialogue"}


@pytest.mark.parametrize("place", [0, 1])
def test_gold_option_is_anywhere(place: int) -> None:
    """The released code shuffles the first choice of every text by one constant permutation."""
    where = Counter(Draws(0, f"g{i}", 0).order(f"options {place} Where?", 4).index(1) for i in range(4000))
    assert sorted(where) == [0, 1, 2, 3]
    assert chisquare([*where.values()]).pvalue > 1e-4
    orders = Counter(tuple(Draws(0, f"g{i}", 0).order(f"options {place} Where?", 3)) for i in range(3000))
    assert len(orders) == 6
    assert chisquare([*orders.values()]).pvalue > 1e-4


# ---- options


def test_option_styles_literal() -> None:
    pair = wire_pair("Where is it?", "Rome", ["Oslo", "Rome", "Bern"])
    letters = OptionStyle(labels="upper", mark="{label}. {option}", between="\n", answer="{label}")
    bullets = OptionStyle(labels="none", mark="- {option}", between="\n", answer="{option}")
    assert pair_values(pair, letters, [2, 1, 0]) == {
        "question": "Where is it?",
        "options": "A. Bern\nB. Rome\nC. Oslo",
        "answer": "B",
    }
    assert pair_values(pair, bullets, [1, 0, 2])["options"] == "- Rome\n- Oslo\n- Bern"
    assert pair_values(pair, bullets, [1, 0, 2])["answer"] == "Rome"


@pytest.mark.parametrize("style", TEMPLATES.options)
@pytest.mark.parametrize("order", [[0, 1, 2], [1, 2, 0], [2, 0, 1]])
def test_answer_names_the_gold_option_alone(style: OptionStyle, order: list[int]) -> None:
    parts = pair_values(wire_pair("Q?", "rome", ["oslo", "rome", "kyiv"]), style, order)
    lines = re.split(r" (?=\()" if style.between == " " else re.escape(style.between), parts["options"])
    assert [parts["answer"] in line for line in lines] == [i == 1 for i in order]


def test_the_last_of_26_options_is_z() -> None:
    pair = wire_pair("Q?", "o25", [f"o{i}" for i in range(26)])
    letters = OptionStyle(labels="upper", mark="{label}. {option}", between="\n", answer="{label}")
    assert pair_values(pair, letters, range(26))["answer"] == "Z"


def test_files_of_a_folder_replace_the_shipped_ones(tmp_path: Path) -> None:
    (tmp_path / "free.yaml").write_text('- "{question}|{answer}"\n')
    one = group("g", [[wire_pair("Why?", "Rain")]])
    [document] = render(one, templates=str(tmp_path), layouts={"text_first": 1})
    assert document.text.endswith("Why?|Rain")
    own, shipped = load_templates(str(tmp_path)), load_templates()
    assert own.patterns["free"] == ["{question}|{answer}"] and own.patterns["choice"] == shipped.patterns["choice"]
    assert own.digest != shipped.digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("free.yaml", '- "{question}"', r"free.yaml: pattern '{question}' must contain {answer}, {question} once each"),
        ("free.yaml", '- "{answer} {question}"', "the question before the answer"),
        ("free.yaml", "[]", "free has no pattern"),
        ("free.yaml", "a: [", "while parsing"),
        ("choice.yaml", "just text", "Expected `array`, got `str`"),
        ("layouts.yaml", "{bare: 0.5, separators: []}", "layout dialogue is missing"),
        ("turns.yaml", "{}", "'free'"),
        ("fre.yaml", "[]", "unknown file fre.yaml; name the files free.yaml"),
        ("notes.txt", "", "no template file"),
    ],
)
def test_invalid_folders_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_templates(str(tmp_path))
