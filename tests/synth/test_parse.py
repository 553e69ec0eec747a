"""The parser: literal completions, every reason once, and the properties that no string breaks."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.records import Pair, Reason, decode
from synth.format.parser import REASONS, gold_option, parse_completion, question_key, rejected
from synth.format.wire import END_TAG, final_answer, pair_text, pairs_text, question_stem, wire_pair
from synth.groups import count_verdicts, rejection_counts

CUE = "\nLet's think step by step."
THEREFORE = "\nTherefore, the answer is "


def reasons(text: str, finished: bool = True) -> list[str | None]:
    return [pair.reason for pair in parse_completion(text, finished)]


def test_golden_parse() -> None:
    text = (
        "<QUE> Who built it? <ANS> Ann </END>\n\n"
        "<QUE> Where?\nOptions:\n- Rome\n- Oslo <ANS> Oslo. </END>\n\n"
        f"<QUE> How many?{CUE} <ANS> Two and two.{THEREFORE}4 </END>\n\n"
        f"<QUE> Which?\nOptions:\n- a\n- b{CUE} <ANS> Not a.{THEREFORE}b </END>\n\n"
        "<QUE> Cut off"
    )
    assert parse_completion(text, finished=False) == [
        Pair("Who built it?", "Ann"),
        Pair("Where?\nOptions:\n- Rome\n- Oslo", "Oslo.", "choice", ["Rome", "Oslo"]),
        Pair(f"How many?{CUE}", f"Two and two.{THEREFORE}4", "free_cot", rationale="Two and two."),
        Pair(f"Which?\nOptions:\n- a\n- b{CUE}", f"Not a.{THEREFORE}b", "choice_cot", ["a", "b"], "Not a."),
        Pair("<QUE> Cut off", "", verdict="rejected", reason="truncated"),
    ]


REJECTED = [
    ("<QUE> Who? <ANS> An", "unclosed"),
    ("Thank you for asking.", "leftover_text"),
    ("Sure! <QUE> Who? <ANS> Ann </END>", "leftover_text"),
    ("Who? <ANS> Ann </END>", "no_question"),
    ("</END>", "no_question"),
    ("<QUE> Who? </END>", "no_answer"),
    ("<ANS> Ann <QUE> Who? </END>", "leftover_text"),
    ("<QUE> Who? <ANS> Ann <ANS> Bo </END>", "two_answers"),
    ("<QUE> Who? <QUE> Where? <ANS> Ann </END>", "nested_tag"),
    ("<QUE> Who? <ANS> Ann <CON> more </CON> </END>", "nested_tag"),
    ("<QUE> <ANS> Ann </END>", "empty_question"),
    ("<QUE>\nOptions:\n- a\n- b <ANS> a </END>", "empty_question"),
    (f"<QUE>{CUE} <ANS> It is.{THEREFORE}a </END>", "empty_question"),
    ("<QUE> Who? <ANS> </END>", "empty_answer"),
    (f"<QUE> Who?{CUE} <ANS> Ann </END>", "cot_malformed"),
    (f"<QUE> Who? <ANS> It says so.{THEREFORE}Ann </END>", "cot_malformed"),
    (f"<QUE> Who?{CUE} <ANS> It says so.{THEREFORE} </END>", "cot_malformed"),
    (f"<QUE> Who?{CUE} <ANS> {THEREFORE}Ann </END>", "cot_malformed"),
    (f"<QUE> Who?{CUE} Please. <ANS> It says so.{THEREFORE}Ann </END>", "cot_malformed"),
    (f"<QUE> Who?{CUE} <ANS> a{THEREFORE}b{THEREFORE}c </END>", "cot_malformed"),
    ("<QUE> Who?\nOptions: Ann, Bo <ANS> Ann </END>", "options_malformed"),
    ("<QUE> Who?\nOptions:\n- Ann <ANS> Ann </END>", "options_malformed"),
    ("<QUE> Who?\nOptions:\n- Ann\n- Ann <ANS> Ann </END>", "options_malformed"),
    ("<QUE> Who?\nOptions:\n- Ann\n- <ANS> Ann </END>", "options_malformed"),
    ("<QUE> Who?\nOptions:\n- Ann\n- \nBo <ANS> Ann </END>", "options_malformed"),
    ("<QUE> Who?\nOptions:\n- Ann\nor\n- Bo <ANS> Ann </END>", "options_malformed"),
    ("<QUE> Who?\nOptions:" + "".join(f"\n- {i}" for i in range(27)) + " <ANS> 3 </END>", "too_many_options"),
    ("<QUE> Who?\nOptions:\n- Ann\n- Bo <ANS> Cy </END>", "answer_not_in_options"),
    ("<QUE> Who?\nOptions:\n- Ann\n- Bo <ANS> A </END>", "answer_not_in_options"),
]


@pytest.mark.parametrize(("text", "reason"), REJECTED)
def test_rejected(text: str, reason: str) -> None:
    assert reasons(text) == [reason]


def test_every_reason_is_reached_and_listed() -> None:
    assert {reason for _, reason in REJECTED} | {"truncated", "duplicate_question"} == set(REASONS)
    assert set(REASONS) | {"contaminated"} == set(get_args(Reason))


def test_counts_of_pairs() -> None:
    pairs = [Pair("a", "b"), rejected("no_answer", "c"), rejected("no_answer", "d")]
    counts = count_verdicts(pairs)
    assert counts == {"pairs": 1, "rejected.no_answer": 2}
    assert rejection_counts(counts) == {"no_answer": 2}
    assert [(pair.accepted, pair.rejection) for pair in pairs[:2]] == [(True, None), (False, "no_answer")]
    assert Pair("e", "", verdict="rejected").rejection == "rejected"  # as another program may write it


def test_unknown_reason_is_refused() -> None:
    stored = msgspec.msgpack.encode({"question": "q", "answer": "", "verdict": "rejected", "reason": "<b>"})
    with pytest.raises(UserError, match="record is not a Pair: Invalid enum value '<b>'"):
        decode(stored, Pair)


def test_rejected_keeps_its_strings() -> None:
    [broken] = parse_completion("<QUE> Who? <ANS> Ann <ANS> Bo </END>", True)
    assert (broken.question, broken.answer) == ("<QUE> Who? <ANS> Ann <ANS> Bo", "")
    [foreign] = parse_completion("<QUE> Who?\nOptions:\n- Ann\n- Bo <ANS> Cy </END>", True)
    assert (foreign.question, foreign.answer) == ("Who?\nOptions:\n- Ann\n- Bo", "Cy")
    assert (foreign.format, foreign.options) == ("choice", ["Ann", "Bo"])


def test_duplicates() -> None:
    text = "<QUE> Who  was it? <ANS> Ann </END><QUE> who was IT? <ANS> Bo </END><QUE> Who was he? <ANS> Bo </END>"
    assert reasons(text) == [None, "duplicate_question", None]
    shuffled = "<QUE> Who?\nOptions:\n- a\n- b <ANS> a </END><QUE> Who?\nOptions:\n- b\n- a <ANS> a </END>"
    assert reasons(shuffled) == [None, "duplicate_question"]
    other_options = "<QUE> Who?\nOptions:\n- a\n- b <ANS> a </END><QUE> Who?\nOptions:\n- a\n- c <ANS> a </END>"
    assert reasons(other_options) == [None, None]


def test_a_rejected_question_may_be_asked_again() -> None:
    assert reasons("<QUE> Who? <ANS> </END><QUE> Who? <ANS> Ann </END>") == ["empty_answer", None]


@pytest.mark.parametrize(
    ("answer", "options", "gold"),
    [
        ("b", ["a", "b"], 1),
        ("b.", ["a", "b"], 1),
        ("b", ["a", "b."], 1),
        ("b.", ["b", "b."], 1),
        ("b..", ["b", "a"], None),
    ],
)
def test_gold_option(answer: str, options: list[str], gold: int | None) -> None:
    assert gold_option(Pair("Q?", answer, "choice", options)) == gold


TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)
TAGGED = st.lists(
    st.sampled_from(
        ["<QUE>", "<ANS>", "</END>", "<CON>", "</CON>", CUE, THEREFORE, "\nOptions:", "\n- ", "a", "b.", " ", "\n"]
    )
    | TEXTS,
    max_size=40,
).map("".join)


@given(TAGGED | st.text(), st.booleans())
@settings(max_examples=500)
def test_total_and_aligned_with_closing_tags(text: str, finished: bool) -> None:
    pairs = parse_completion(text, finished)
    *pieces, tail = text.split(END_TAG)
    assert len(pairs) == len(pieces) + bool(tail.strip())
    for pair in pairs:
        assert (pair.reason is None) == pair.accepted
        assert pair.reason is None or pair.reason in REASONS
    accepted = [pair for pair in pairs if pair.accepted]
    assert len({question_key(pair) for pair in accepted}) == len(accepted)
    assert all(question_stem(pair).strip() and final_answer(pair) for pair in accepted)
    assert parse_completion(pairs_text(accepted), True) == accepted


WORDS = st.text("abcdefg hij?.,'äß你", min_size=1, max_size=30).map(str.strip).filter(bool)


@given(WORDS, st.lists(WORDS, min_size=2, max_size=26, unique=True), st.none() | WORDS, st.booleans(), st.data())
@settings(max_examples=200)
def test_wire_pairs_are_read_back(
    question: str, options: list[str], rationale: str | None, choice: bool, data: st.DataObject
) -> None:
    answer = data.draw(st.sampled_from(options))
    pair = wire_pair(question, answer, options if choice else None, rationale)
    assert parse_completion(pair_text(pair), True) == [pair]
    if choice:
        assert pair.options[gold_option(pair) or 0] == answer
