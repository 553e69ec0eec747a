"""Rendering: the documents of a group, the released code's defects as acceptance tests, the filter, the stage."""

from __future__ import annotations

import copy
import re
from collections import Counter
from pathlib import Path

import pytest
from renderkit import EVEN, PAIRS, group, recipe, render
from synthkit import damage_shard

from ipt_jax.core.errors import UserError
from ipt_jax.core.stage import Output
from ipt_jax.corpus.records import Pair, Parent, SynthGroup, encode
from ipt_jax.corpus.shards import read_documents, read_manifest
from synth.format.parser import reject
from synth.format.wire import wire_pair
from synth.render.documents import Renderer
from synth.render.layout import closed_book
from synth.render.run import run_render
from synth.render.templates import load_templates

SHOTS = load_templates().frames["few_shot"].shots
TEST_ITEM = re.compile("^(?:" + "|".join(re.escape(test) for _, test in SHOTS) + ")$", re.MULTILINE)


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
    documents = Renderer(recipe(), counts, dropped).documents(one)
    assert [(doc.id, doc.kind, doc.text) for doc in documents] == [
        ("g.raw0", "raw", "First.\n"),
        ("g.raw1", "raw", "Second."),
    ]
    assert documents[0].parents == [Parent("g-0", 3, 10)]
    assert (counts["no_pair_left"], dropped["duplicate_question"]) == (1, 1)


def test_blank_text_makes_no_document() -> None:
    dropped: Counter[str] = Counter()
    assert Renderer(recipe(), Counter(), dropped).documents(group("g", [[]], texts=[" \n"])) == []
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


# ---- one-shot and few-shot


def few(name: str, pairs: list[list[Pair]]) -> str:
    [document] = render(group(name, pairs), layouts={"few_shot": 1})
    assert document.meta["layout"] == "few_shot"
    return document.text


def headings(text: str) -> list[str]:
    """Examples by their number, and the test item, in the order of the text."""
    for example, test in SHOTS:
        pattern = re.escape(example).replace(re.escape("{number}"), r"(\d+)")
        found = re.findall(rf"^(?:{pattern}|({re.escape(test)}))$", text, re.MULTILINE)
        if found:
            return [number or "test" for number, _ in found]
    return []


def test_few_shot_of_three_texts_ends_in_a_test_text() -> None:
    for i in range(20):
        text = few(f"g{i}", [PAIRS[:2], [PAIRS[2]], [wire_pair("Why?", "Rain")]])
        assert headings(text) == ["1", "2", "test"]
        last = TEST_ITEM.split(text)[-1]
        assert f"Text 2 of g{i}." in last and "Why?" in last
        assert "How many rooms?" not in last


def test_few_shot_of_one_text_ends_in_a_test_pair() -> None:
    for i in range(20):
        text = few(f"g{i}", [PAIRS])
        assert headings(text) == ["1", "2", "3", "test"]
        last = TEST_ITEM.split(text)[-1]
        assert "Which is old?" in last
        assert "How many rooms?" not in last
        assert text.index(f"Text 0 of g{i}.") < text.index("Who built")


def test_few_shot_without_an_example_is_text_first_and_counted_so() -> None:
    counts: Counter[str] = Counter()
    [document] = Renderer(recipe(layouts={"few_shot": 1}), counts, Counter()).documents(group("g", [[PAIRS[0]], []]))
    assert document.meta["layout"] == "text_first"
    assert counts["layout.text_first"] == 1


def test_one_shot_gives_each_text_its_own_document() -> None:
    one = group("g", [PAIRS, [], [wire_pair("Why?", "Rain")]])
    documents = render(one, one_shot=1)
    assert [(doc.id, doc.kind) for doc in documents] == [
        ("g.shot0", "augmented"),
        ("g.shot2", "augmented"),
        ("g.raw1", "raw"),
    ]
    assert [doc.parents for doc in documents] == [[Parent(f"g-{place}", 3, 15)] for place in (0, 2, 1)]
    assert "Why?" not in documents[0].text
    assert [doc.id for doc in render(one, one_shot=1, epoch=3)] == ["g.shot0.3", "g.shot2.3", "g.raw1"]


def test_one_shot_is_drawn_apart_from_the_layout() -> None:
    counts: Counter[str] = Counter()
    seen = Counter()
    for i in range(2000):
        renderer = Renderer(recipe(layouts=EVEN, one_shot=0.25), counts, Counter())
        documents = renderer.documents(group(f"g{i}", [PAIRS[:2], PAIRS[:2]]))
        seen.update((len(documents), document.meta["layout"]) for document in documents)
    assert 0.22 < counts["one_shot"] / counts["with_pairs"] < 0.28
    assert set(seen) == {(n, layout) for n in (1, 2) for layout in EVEN}


def test_detached_pairs_are_documents_without_their_text() -> None:
    counts: Counter[str] = Counter()
    one = group("g", [PAIRS[:2], [wire_pair("Why?", "Rain")]])
    documents = Renderer(recipe(detached=1), counts, Counter()).documents(one)
    assert [(doc.id, doc.kind, doc.meta["layout"]) for doc in documents[:3]] == [
        ("g.pair0.0", "augmented", "detached"),
        ("g.pair0.1", "augmented", "detached"),
        ("g.pair1.0", "augmented", "detached"),
    ]
    assert [(doc.id, doc.kind, doc.text) for doc in documents[3:]] == [
        ("g.raw0", "raw", "Text 0 of g."),
        ("g.raw1", "raw", "Text 1 of g."),
    ]
    assert [doc.parents for doc in documents[:3]] == [[Parent(f"g-{place}", 3, 15)] for place in (0, 0, 1)]
    assert (counts["pairs"], counts["detached"], counts["with_pairs"], counts["no_pair_left"]) == (3, 3, 1, 0)
    last = documents[2]
    assert "Text 1" not in last.text and set(last.meta["spans"]) == {"question", "answer"}
    [[_, pair, start, end]] = last.meta["spans"]["answer"]
    assert (pair, last.text[start:end]) == (0, "Rain")


def test_detached_is_a_share_of_pairs_and_keeps_each_pair_once() -> None:
    counts: Counter[str] = Counter()
    for number in range(500):
        one = group(f"g{number}", [[wire_pair(f"Asks {n}?", f"Says {n}") for n in range(4)]])
        documents = Renderer(recipe(layouts=EVEN, detached=0.3), counts, Counter()).documents(one)
        joined = "\n".join(document.text for document in documents)
        assert all(joined.count(f"Says {n}") == 1 for n in range(4)) and joined.count("Text 0") == 1
    assert counts["pairs"] == 2000 and 540 < counts["detached"] < 660


def test_detached_patterns_do_not_refer_to_a_text() -> None:
    for name in ("free", "free_cot", "choice", "choice_cot"):
        patterns = closed_book(load_templates().patterns[name])
        assert len(patterns) >= 20 and not [one for one in patterns if "text" in one.lower()]


# ---- the released code's defects, as far as they could be ours; draws and options stand in test_templates.py


def test_no_group_leaves_anything_behind_for_the_next() -> None:
    """The released code prints later groups with an earlier one's speakers and drops their closing words."""
    groups = [group(f"g{i}", [PAIRS, PAIRS[:1]]) for i in range(60)]
    together = [render(one, layouts=EVEN) for one in groups]
    assert [render(one, layouts=EVEN) for one in reversed(groups)] == together[::-1]
    speakers = {name for pair in load_templates().frames["dialogue"].speakers for name in pair}
    for [document] in together:
        if document.meta["layout"] != "dialogue":
            assert not any(f"{name}:" in document.text or f"[{name}]" in document.text for name in speakers)


def test_more_than_26_options_are_counted_and_not_cut() -> None:
    many = [f"option {i}" for i in range(27)]
    dropped: Counter[str] = Counter()
    documents = Renderer(recipe(), Counter(), dropped).documents(
        group("g", [[wire_pair("Q?", many[3], many), PAIRS[0]]])
    )
    assert dropped == {"too_many_options": 1}
    assert "option" not in documents[0].text


def test_more_than_26_questions_are_all_numbered() -> None:
    many = [wire_pair(f"Why is room {i} cold?", f"reason {i}") for i in range(40)]
    [document] = render(group("g", [many]), layouts={"numbered": 1})
    assert all(f"Why is room {i} cold?" in document.text and f"reason {i}" in document.text for i in range(40))
    assert document.text.count("40") == 2


def test_an_answer_with_a_closing_period_still_names_its_option() -> None:
    pair = wire_pair("Where?", "Rome.", ["Oslo", "Rome"], "Ann went there.")
    for i in range(30):
        [document] = render(group(f"g{i}", [[pair]]))
        [[_, _, start, end]] = document.meta["spans"]["answer"]
        assert document.text[start:end] in ("A", "B", "Rome", "(A)", "(B)", "a", "b") or document.text[
            start:end
        ].endswith("Rome")


def test_every_document_answers_all_of_its_questions_and_shows_all_options() -> None:
    """The released patterns drop the answer now and then, make the question the target, or hide the options."""
    for i in range(200):
        [document] = render(group(f"g{i}", [PAIRS]), layouts=EVEN)
        spans = document.meta["spans"]
        assert len(spans["question"]) == len(spans["answer"]) == 4
        assert len(spans["options"]) == 2
        for question, answer in zip(spans["question"], spans["answer"], strict=True):
            assert question[:2] == answer[:2] and question[3] <= answer[2]


def test_a_question_without_an_answer_is_not_shown() -> None:
    dropped: Counter[str] = Counter()
    odd = [Pair("Why?", " "), Pair(" ", "Rain"), PAIRS[0]]
    [document] = Renderer(recipe(), Counter(), dropped).documents(group("g", [odd]))
    assert dropped == {"empty_answer": 1, "empty_question": 1}
    assert "Why" not in document.text


# ---- filter and stage


def test_filter_counts_and_leaves_neighbours_alone() -> None:
    """A pair that is filtered out does not change how the others look."""
    scored = [copy.copy(pair) for pair in PAIRS]
    for pair, score in zip(scored, (0.1, 0.9, 0.9, 0.9), strict=True):
        pair.scores = {"grounded": score}
    dropped: Counter[str] = Counter()
    filtered = Renderer(recipe(keep="grounded > 0.5"), Counter(), dropped).documents(group("g", [scored]))
    assert dropped == {"keep": 1}
    assert filtered[0].text == render(group("g", [scored[1:]]))[0].text
    assert [pair for _, pair, *_ in filtered[0].meta["spans"]["question"]] == [1, 2, 3], "places in the record"


def test_pairs_without_parsed_parts_are_read_from_the_wire() -> None:
    """Other programs may write the strings alone."""
    bare = [Pair(pair.question, pair.answer, pair.format) for pair in PAIRS]
    assert render(group("g", [bare])) == render(group("g", [PAIRS]))
    broken = Pair("Where?\nOptions:\n- Rome\n- Oslo", "Bern", "choice")
    dropped: Counter[str] = Counter()
    assert Renderer(recipe(), Counter(), dropped).documents(group("g", [[broken]]))[0].kind == "raw"
    assert dropped == {"answer_not_in_options": 1}


def test_stage_writes_a_shard_for_each_and_each_group_alone_renders_equal(tmp_path: Path) -> None:
    shards = [[group(f"a{i}", [PAIRS, []]) for i in range(5)], [], [group("b", [[reject(PAIRS[0], "no_answer")]])]]
    write_groups(tmp_path / "groups", shards)
    given_recipe = recipe(groups=str(tmp_path / "groups"), output=str(tmp_path / "out"), layouts=EVEN)
    result = run_render(given_recipe)
    documents = list(read_documents(tmp_path / "out"))
    assert documents == [doc for shard in shards for one in shard for doc in render(one, layouts=EVEN)]
    assert [entry.records for entry in read_manifest(tmp_path / "out", "render").shards] == [5, 0, 1]
    assert sum(entry["asked"] for entry in result["shares"].values()) == 1
    assert result["shares"]["text_first"] == {"asked": 0.2, "got": result["layouts"].get("text_first", 0) / 5}
    assert result["one_shot"] == {"asked": 0, "got": 0}
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
    damage_shard(tmp_path / "out", 0)
    assert run_render(recipe(**fields)) == first
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.array_record")} == whole
    with pytest.raises(UserError, match="made with seed=0, now 1"):
        run_render(recipe(**fields, seed=1))


def test_a_filter_that_leaves_no_pair_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scored = wire_pair("Who?", "Ann")
    scored.scores["grounded"] = 1.0
    where = str(write_groups(tmp_path / "groups", [[group("a", [[scored]])]]))
    run_render(recipe(groups=where, output=str(tmp_path / "some"), keep="grounded >= 1"))
    assert "no pair was kept" not in capsys.readouterr().err
    result = run_render(recipe(groups=where, output=str(tmp_path / "none"), keep="grounded >= 2"))
    assert result["pairs"] == 0
    assert "synth render: no pair was kept (dropped: keep 1); all documents are raw texts\n" in capsys.readouterr().err


def test_mistakes(tmp_path: Path) -> None:
    where = str(write_groups(tmp_path / "groups", [[group("a", [[PAIRS[0]]])]]))
    fields = {"groups": where, "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match="no pair has the score grounded; scores here: well_formed"):
        run_render(recipe(**fields, keep="grounded > 0.5"))
    with pytest.raises(UserError, match="holds no groups"):
        run_render(recipe(groups=str(write_groups(tmp_path / "none", [[]])), output=str(tmp_path / "out")))
    with pytest.raises(UserError, match="did you mean 'layouts.dialogue'"):
        recipe(layouts={"dialog": 1})
    with pytest.raises(UserError, match="every share is 0"):
        recipe(layouts={"dialogue": 0})
    with pytest.raises(UserError, match="sum of the shares is too large for a number; use smaller shares"):
        recipe(layouts={"dialogue": 1e308, "text_first": 1e308})
    run_render(recipe(**fields))
    with pytest.raises(UserError, match="'render' wrote no groups"):
        run_render(recipe(groups=str(tmp_path / "out"), output=str(tmp_path / "again")))
