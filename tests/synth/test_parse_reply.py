"""Answers of chat models: three forms, what is removed around the pairs, and a reason for every loss."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipt_jax.corpus.records import Pair
from synth.format.parser import REASONS, parse_completion
from synth.format.reply import read_reply
from synth.format.wire import pairs_text

ANN, OSLO = Pair("Who?", "Ann"), Pair("Where?\nOptions:\n- Rome\n- Oslo", "Oslo", "choice", ["Rome", "Oslo"])
TAGS = "<QUE> Who? <ANS> Ann </END>\n\n<QUE> Where?\nOptions:\n- Rome\n- Oslo <ANS> Oslo </END>"
JSON = '[{"question": "Who?", "answer": "Ann"}, {"question": "Where?", "options": ["Rome", "Oslo"], "answer": "Oslo"}]'
LINES = "Q: Who?\nA: Ann\n\nQ: Where?\nOptions:\n- Rome\n- Oslo\nA: Oslo"


def read(text: str, finished: bool = True) -> tuple[list[Pair], dict[str, int]]:
    pairs, removed = read_reply(text, finished)
    return pairs, dict(removed)


@pytest.mark.parametrize("answer", [TAGS, JSON, LINES])
def test_three_forms_give_the_same_pairs(answer: str) -> None:
    assert read(answer) == ([ANN, OSLO], {})


@pytest.mark.parametrize("answer", [TAGS, JSON, LINES])
@pytest.mark.parametrize(
    ("around", "removed"),
    [
        ("<think>Let me see. <QUE> no <ANS> no </END></think>\n{}", {"thinking": 1}),
        ("I should find names.\n</think>\n\n{}", {"thinking": 1}),  # the chat template opened the block
        ("<reasoning>hm</reasoning><think>hm</think>{}", {"thinking": 2}),
        ("```json\n{}\n```", {"code_fences": 1}),
        ("<think>\n</think>\n\n```\n{}\n```\n", {"thinking": 1, "code_fences": 1}),
        ("Sure! Here are the pairs:\n\n{}", {"remarks": 1}),
    ],
)
def test_what_surrounds_pairs_is_removed_and_counted(answer: str, around: str, removed: dict[str, int]) -> None:
    assert read(around.replace("{}", answer)) == ([ANN, OSLO], removed)


def test_numbers_are_no_remarks_and_missing_closings_are_added() -> None:
    assert read("1. <QUE> Who? <ANS> Ann </END>\n2. <QUE> When? <ANS> Now") == (
        [ANN, Pair("When?", "Now")],
        {"missing_closings": 1},
    )
    assert read(f"{TAGS}\n\nI hope this helps!") == ([ANN, OSLO], {"remarks": 1})


@pytest.mark.parametrize(
    ("answer", "question"),
    [
        ("<QUE> Who? <ANS> Ann </END>\n\n<QUE> Where did An", "<QUE> Where did An"),
        ('{"pairs": [{"question": "Who?", "answer": "Ann"}, {"question": "Where d', '{"question": "Where d'),
        ("Q: Who?\nA: Ann\n\nQ: Where d", "Where d"),
    ],
)
def test_a_cut_answer_keeps_its_complete_pairs(answer: str, question: str) -> None:
    pairs, _ = read(answer, finished=False)
    assert pairs[0] == ANN
    assert [pair.reason for pair in pairs] == [None, "truncated"]
    assert question in pairs[1].question


def test_answers_cut_inside_the_thinking_are_truncated() -> None:
    assert [(pair.reason, pair.question) for pair in read("<think>The text says", finished=False)[0]] == [
        ("truncated", "")
    ]
    assert read("<think>The text says") == ([], {"thinking": 1})


@pytest.mark.parametrize(
    ("answer", "reasons"),
    [
        ("I cannot do that.", ["leftover_text"]),
        ("", []),
        ("{broken", ["unclosed"]),
        ('[{"question": "Who?"}]', ["empty_answer"]),
        ('[{"question": "Who?", "answer": ["a"]}]', ["empty_answer"]),
        ('{"question": "Who?", "answer": "a </END> b"}', ["nested_tag"]),
        ('{"question": "Which?", "options": ["a", "b"], "answer": "c"}', ["answer_not_in_options"]),
        ("Q: Who?\nQ: Where?\nA: Here", ["no_answer", None]),
        ("Q: Who?\nA: Ann\nA: Bo", ["two_answers"]),
        ("<QUE> Who? </END>", ["no_answer"]),
        ("<QUE> Who? <ANS> Ann </END><QUE> who? <ANS> Bo </END>", [None, "duplicate_question"]),
    ],
)
def test_every_loss_has_a_reason(answer: str, reasons: list[str | None]) -> None:
    assert [pair.reason for pair in read(answer)[0]] == reasons


@pytest.mark.parametrize(
    "answer",
    [
        '{"Question": "Where?", "choices": {"A": "Rome", "B": "Oslo"}, "correct_answer": "B"}',
        '{"q": "Where?", "options": ["A) Rome", "B) Oslo"], "a": "B) Oslo"}',
        '{"question": "Where?", "options": ["Rome", "Oslo"], "answer": 1}',
        '{"question": "Where?", "options": ["Rome", "Oslo"], "answer": "b."}',
        "**Question 1:** Where?\nA) Rome\nB) Oslo\n**Answer:** B",
        "1. Q: Where?\n- Rome\n- Oslo\nAnswer: Oslo",
    ],
)
def test_options_and_their_answers_in_usual_spellings(answer: str) -> None:
    assert read(answer)[0] == [OSLO]


def test_numbers_flags_and_reasons_of_json() -> None:
    pairs, _ = read(
        '[{"question": "How many?", "answer": 3}, {"question": "Red?", "answer": true, "rationale": "It is."}]'
    )
    assert [pair.answer for pair in pairs] == ["3", "It is.\nTherefore, the answer is yes"]
    assert pairs[1].rationale == "It is."


PARTS = st.lists(
    st.sampled_from(
        [
            "<QUE>",
            "<ANS>",
            "</END>",
            "<think>",
            "</think>",
            "```",
            "{",
            "}",
            "[",
            '"question":',
            '"answer":',
            '"a"',
            ",",
        ]
        + ["\nQ: ", "\nA: ", "\nOptions:", "\n- ", "A) ", "x", " ", "\n", "\nLet's think step by step."]
    )
    | st.text(max_size=10),
    max_size=30,
).map("".join)


@given(PARTS, st.booleans())
@settings(max_examples=300)
def test_no_string_raises_and_accepted_pairs_are_read_back(text: str, finished: bool) -> None:
    pairs, removed = read_reply(text, finished)
    accepted = [pair for pair in pairs if pair.accepted]
    assert all(pair.reason in REASONS for pair in pairs if not pair.accepted)
    assert all(count > 0 for count in removed.values())
    assert parse_completion(pairs_text(accepted), True) == accepted
