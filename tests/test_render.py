"""Rendering: the released code's defects as acceptance tests, determinism, templates, the filter, resume."""

from __future__ import annotations

import copy
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from ipt_jax.corpus.records import Document, GroupText, Pair, Parent, SynthGroup, encode
from ipt_jax.corpus.settings import UserError, check_settings
from ipt_jax.corpus.shards import Output, read_documents, read_manifest
from synth.layout import FORMATS, PLACEHOLDER, Draws, OptionStyle, draw_look, fill, lay_out, load_templates, shown_parts
from synth.parse import reject
from synth.prompt import wire_pair
from synth.render import RenderSettings, render_group, run_render

EVEN = {"text_first": 1.0, "questions_first": 1.0, "dialogue": 1.0, "numbered": 1.0}
PAIRS = [
    wire_pair("Who built the hall?", "Ann"),
    wire_pair("Where is it?", "Rome", ["Oslo", "Rome", "Bern"]),
    wire_pair("How many rooms?", "4", rationale="Two and two."),
    wire_pair("Which is old?", "the hall", ["the hall", "the barn"], "The barn is new."),
]


def group(name: str, pairs: list[list[Pair]], texts: list[str] | None = None) -> SynthGroup:
    texts = texts or [f"Text {i} of {name}." for i in range(len(pairs))]
    members = [
        GroupText(f"{name}-{i}", 3, 3 + len(text), text, f"src{i}", some, i, 90, 0, 30, "stop")
        for i, (text, some) in enumerate(zip(texts, pairs, strict=True))
    ]
    return SynthGroup(name, members, "tiny", "w" * 64, {"temperature": 0.0}, "f" * 64)


def recipe(**fields: object) -> RenderSettings:
    return check_settings(RenderSettings, {"groups": "groups", "output": "output", **fields}, where="test")


def render(one: SynthGroup, **fields: object) -> list[Document]:
    return render_group(one, recipe(**fields), Counter(), Counter())


def write_groups(path: Path, shards: list[list[SynthGroup]]) -> Path:
    with Output(path, stage="synth", identity={"seed": 0}, shard_name="groups") as out:
        for index, groups in enumerate(shards):
            out.seal(index, len(shards), [encode(one) for one in groups])
        out.finish()
    return path


def test_one_document_with_parents_and_every_part() -> None:
    one = group("g", [PAIRS, [wire_pair("Why?", "Because of rain")]])
    [document] = render(one)
    assert (document.id, document.kind, document.source) == ("g", "augmented", "src0+src1")
    assert document.parents == [Parent("g-0", 3, 3 + 12), Parent("g-1", 3, 3 + 12)]
    assert [segment.control for segment in document.segments] == [None]
    for part in ("Text 0 of g.", "Who built the hall?", "Ann", "Two and two.", "Text 1 of g.", "Because of rain"):
        assert document.text.count(part) == 1
    assert "<QUE>" not in document.text


def test_no_pair_left_leaves_raw_texts_and_no_empty_document() -> None:
    counts, dropped = Counter(), Counter()
    one = group("g", [[reject(PAIRS[0], "duplicate_question")], []], texts=["First.\n", "Second."])
    documents = render_group(one, recipe(), counts, dropped)
    assert [(doc.id, doc.kind, doc.text) for doc in documents] == [
        ("g.raw0", "raw", "First.\n"),
        ("g.raw1", "raw", "Second."),
    ]
    assert documents[0].parents == [Parent("g-0", 3, 10)]
    assert (counts["no_pair_left"], dropped["duplicate_question"]) == (1, 1)


def test_blank_text_makes_no_document() -> None:
    dropped: Counter[str] = Counter()
    assert render_group(group("g", [[]], texts=[" \n"]), recipe(), Counter(), dropped) == []
    assert dropped == {"blank_text": 1}


@pytest.mark.parametrize("layout", list(EVEN))
def test_text_without_pairs_stays_in_its_place(layout: str) -> None:
    one = group("g", [[PAIRS[0]], [], [wire_pair("Why?", "Rain")]])
    [document] = render(one, layouts={layout: 1})
    places = [document.text.index(f"Text {i} of g.") for i in range(3)]
    assert places == sorted(places)
    assert document.text.index("Who built") < places[1] < document.text.index("Why?")


def test_equal_inputs_equal_documents_and_inputs_unchanged() -> None:
    one = group("g", [PAIRS, PAIRS[:1]])
    before = copy.deepcopy(one)
    first = render(one, layouts=EVEN)
    assert [render(one, layouts=EVEN) for _ in range(3)] == [first] * 3
    assert one == before
    others = {render(one, layouts=EVEN, seed=seed)[0].text for seed in range(20)}
    epochs = {render(one, layouts=EVEN, epoch=epoch)[0].text for epoch in range(20)}
    assert len(others) > 15
    assert len(epochs) > 15
    assert render(one, epoch=2)[0].id == "g.2"


def test_draws_do_not_share_a_stream() -> None:
    """The released code restarts one stream for every choice: of 7,900 combinations 1,738 occur."""
    looks = [draw_look(Draws(0, f"group {i}", 0), EVEN) for i in range(6000)]
    patterns = load_templates().patterns
    seen = Counter((look.patterns["free"], look.patterns["choice"]) for look in looks)
    assert len(seen) == len(patterns["free"]) * len(patterns["choice"])
    assert chisquare([*seen.values()]).pvalue > 1e-4
    layouts = Counter((look.layout, look.separator) for look in looks)
    assert len(layouts) == 4 * len(load_templates().layouts.separators)
    assert chisquare([*layouts.values()]).pvalue > 1e-4


def test_layout_shares() -> None:
    shares = {"text_first": 0.7, "questions_first": 0.1, "dialogue": 0.1, "numbered": 0.1}
    drawn = Counter(draw_look(Draws(1, str(i), 0), recipe().layouts.weights).layout for i in range(5000))
    assert chisquare([drawn[name] for name in shares], [5000 * share for share in shares.values()]).pvalue > 1e-4
    only = {draw_look(Draws(1, str(i), 0), recipe(layouts={"dialogue": 2}).layouts.weights).layout for i in range(50)}
    assert only == {"dialogue"}


@pytest.mark.parametrize("place", [0, 1])
def test_gold_option_is_anywhere(place: int) -> None:
    """The released code shuffles the first choice of every text by one constant permutation."""
    options = ["Oslo", "Rome", "Bern", "Kyiv"]
    where = Counter(Draws(0, f"g{i}", 0).order(f"options {place} Where?", 4).index(1) for i in range(4000))
    assert len(where) == len(options)
    assert chisquare([*where.values()]).pvalue > 1e-4


def test_option_styles_literal() -> None:
    pair = wire_pair("Where is it?", "Rome", ["Oslo", "Rome", "Bern"])
    letters = OptionStyle(labels="upper", mark="{label}. {option}", between="\n", answer="{label}")
    bullets = OptionStyle(labels="none", mark="- {option}", between="\n", answer="{option}")
    assert shown_parts(pair, letters, [2, 1, 0]) == {
        "question": "Where is it?",
        "options": "A. Bern\nB. Rome\nC. Oslo",
        "answer": "B",
        "rationale": "",
    }
    assert shown_parts(pair, bullets, [1, 0, 2])["options"] == "- Rome\n- Oslo\n- Bern"
    assert shown_parts(pair, bullets, [1, 0, 2])["answer"] == "Rome"


@pytest.mark.parametrize("style", load_templates().options)
@pytest.mark.parametrize("order", [[0, 1, 2], [1, 2, 0], [2, 0, 1]])
def test_answer_names_the_gold_option_alone(style: OptionStyle, order: list[int]) -> None:
    parts = shown_parts(wire_pair("Q?", "rome", ["oslo", "rome", "kyiv"]), style, order)
    lines = re.split(r" (?=\()" if style.between == " " else re.escape(style.between), parts["options"])
    assert [parts["answer"] in line for line in lines] == [i == 1 for i in order]


@pytest.mark.parametrize("layout", list(EVEN))
def test_placeholders_in_a_text_stay(layout: str) -> None:
    """The released code's chained replacing corrupts a question that holds '{answer}'."""
    odd = wire_pair("What does {answer} mean, {question}?", "{text} and {option}", ["{text} and {option}", "{label}"])
    for i in range(20):
        [document] = render(group(f"g{i}", [[odd]], texts=["A {question} {pairs} text."]), layouts={layout: 1})
        assert "What does {answer} mean, {question}?" in document.text
        assert "{text} and {option}" in document.text
        assert "A {question} {pairs} text." in document.text
        assert document.text.count("{") in (7, 9), "the answer is a label or the option text"


def test_one_look_for_all_texts_of_a_group() -> None:
    for i in range(20):
        draws = Draws(0, f"g{i}", 0)
        look = draw_look(draws, EVEN)
        first, second = (lay_out("T", [PAIRS[0]], look, [[]]) for _ in range(2))
        assert first == second
        [document] = render(group(f"g{i}", [[PAIRS[0]], [PAIRS[0]]], texts=["T", "T"]), layouts=EVEN)
        assert document.text == first + look.separator + first


def test_templates_are_whole() -> None:
    templates = load_templates()
    wanted = {"free": ["question"], "free_cot": ["question", "rationale"], "choice": ["options", "question"]}
    wanted["choice_cot"] = ["options", "question", "rationale"]
    for name in FORMATS:
        patterns = templates.patterns[name]
        assert len(set(patterns)) == len(patterns) >= 12
        for pattern in [*patterns, *(turn.ask + turn.reply for turn in templates.turns[name])]:
            assert sorted(PLACEHOLDER.findall(pattern)) == sorted(["answer", *wanted[name]])
            assert not re.search(r"\}[?.!]", pattern), f"{pattern!r} adds a mark where the pair brings its own"
    for layout in EVEN:
        frame = getattr(templates.layouts, layout)
        assert all(PLACEHOLDER.findall(opening).count("text") == 1 for opening in frame.openings)
        assert len(set(frame.openings)) == len(frame.openings) >= 8
    assert all("option" in PLACEHOLDER.findall(style.mark) for style in templates.options)


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))
@settings(max_examples=100)
def test_fill_is_one_pass(question: str, answer: str) -> None:
    filled = fill("<{question}|{answer}>", {"question": question, "answer": answer})
    assert filled == f"<{question}|{answer}>"


def test_filter_counts_and_leaves_neighbours_alone() -> None:
    """A pair that is filtered out does not change how the others look."""
    scored = [copy.copy(pair) for pair in PAIRS]
    for pair, score in zip(scored, (0.1, 0.9, 0.9, 0.9), strict=True):
        pair.scores = {"grounded": score}
    dropped: Counter[str] = Counter()
    filtered = render_group(group("g", [scored]), recipe(keep="grounded > 0.5"), Counter(), dropped)
    assert dropped == {"keep": 1}
    assert filtered[0].text == render(group("g", [scored[1:]]))[0].text


def test_pairs_without_parsed_parts_are_read_from_the_wire() -> None:
    """Other programs may write the strings alone."""
    bare = [Pair(pair.question, pair.answer, pair.format) for pair in PAIRS]
    assert render(group("g", [bare])) == render(group("g", [PAIRS]))
    broken = Pair("Where?\nOptions:\n- Rome\n- Oslo", "Bern", "choice")
    dropped: Counter[str] = Counter()
    assert render_group(group("g", [[broken]]), recipe(), Counter(), dropped)[0].kind == "raw"
    assert dropped == {"answer_not_in_options": 1}


def test_stage_writes_a_shard_for_each_and_each_group_alone_renders_equal(tmp_path: Path) -> None:
    shards = [[group(f"a{i}", [PAIRS, []]) for i in range(5)], [], [group("b", [[reject(PAIRS[0], "no_answer")]])]]
    write_groups(tmp_path / "groups", shards)
    given_recipe = recipe(groups=str(tmp_path / "groups"), output=str(tmp_path / "out"), layouts=EVEN)
    result = run_render(given_recipe)
    documents = list(read_documents(tmp_path / "out"))
    assert documents == [doc for shard in shards for one in shard for doc in render(one, layouts=EVEN)]
    assert [entry.records for entry in read_manifest(tmp_path / "out", "render").shards] == [5, 0, 1]
    assert result["layouts"] == dict(sorted(Counter(doc.meta["layout"] for doc in documents[:5]).items()))
    assert {key: result[key] for key in ("documents", "tokens", "pairs", "no_pair_left", "dropped")} == {
        "documents": 6,
        "tokens": None,
        "pairs": 20,
        "no_pair_left": 1,
        "dropped": {"no_answer": 1},
    }


def test_stage_goes_on_and_refuses_other_settings(tmp_path: Path) -> None:
    write_groups(tmp_path / "groups", [[group("a", [PAIRS])], [group("b", [PAIRS])]])
    fields = {"groups": str(tmp_path / "groups"), "output": str(tmp_path / "out")}
    first = run_render(recipe(**fields))
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.array_record")}
    (tmp_path / "out" / "documents-00001-of-00002.array_record").unlink()
    assert run_render(recipe(**fields)) == first
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.array_record")} == whole
    with pytest.raises(UserError, match="made with seed=0, now 1"):
        run_render(recipe(**fields, seed=1))


def test_mistakes(tmp_path: Path) -> None:
    where = str(write_groups(tmp_path / "groups", [[group("a", [[PAIRS[0]]])]]))
    fields = {"groups": where, "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match="no pair has the score grounded; known here: well_formed"):
        run_render(recipe(**fields, keep="grounded > 0.5"))
    with pytest.raises(UserError, match="holds no groups"):
        run_render(recipe(groups=str(write_groups(tmp_path / "none", [[]])), output=str(tmp_path / "out")))
    with pytest.raises(UserError, match="did you mean 'dialogue'"):
        recipe(layouts={"dialog": 1})
    with pytest.raises(UserError, match="every share is 0"):
        recipe(layouts={"dialogue": 0})
    run_render(recipe(**fields))
    with pytest.raises(UserError, match="'render' wrote no groups"):
        run_render(recipe(groups=str(tmp_path / "out"), output=str(tmp_path / "again")))
