"""Adapters of conversations. The last earlier turns are part of a question, so that it can be read by itself.

Q: Who came?
A: Ann
Q: When?
"""

import re
from collections.abc import Iterable
from typing import Any

from synth.collect.extractive import table_text
from synth.collect.fields import (
    Adapter,
    ContextPairs,
    Misfit,
    QuestionAnswer,
    Row,
    answers_of,
    as_text,
    as_texts,
    context_of,
    get,
    question_of,
)

HISTORY = 3  # earlier turns of a question
NOT_IN_TEXT = "CANNOTANSWER"  # also the last word of each context of QuAC and DoQA
Turn = tuple[str | None, Any]  # question and answer


def turn_pairs(turns: Iterable[tuple[Any, Any]], unknown: Iterable[str] = ()) -> list[QuestionAnswer | Misfit]:
    """The pairs of a conversation. A turn without an answer is neither a pair nor part of later questions."""
    earlier: list[tuple[str, str]] = []
    pairs: list[QuestionAnswer | Misfit] = []
    for asked, given in turns:
        try:
            question = question_of({"question": asked}, "question")
            answer = answers_of({"answer": given}, "answer")[0]
            if answer.casefold() in unknown:
                raise Misfit("unanswerable")
        except Misfit as misfit:
            pairs.append(misfit)
            continue
        history = [f"Q: {one}\nA: {reply}\n" for one, reply in earlier[-HISTORY:]]
        pairs.append(QuestionAnswer("".join([*history, f"Q: {question}" if history else question]), answer))
        earlier.append((question, answer))
    return pairs


def same_length(questions: Any, *answers: Any) -> list[tuple[Any, ...]]:
    """Questions with what is listed beside them. Raises Misfit for other types and lengths."""
    if not isinstance(questions, list):
        raise Misfit("missing_question", "questions")
    if any(not isinstance(one, list) or len(one) != len(questions) for one in answers):
        raise Misfit("turns_differ", "as many answers as questions")
    return list(zip(questions, *answers, strict=True))


def read_coqa(row: Row) -> list[ContextPairs]:
    turns = same_length(get(row, "questions.input_text|questions"), get(row, "answers.input_text|answers"))
    return [ContextPairs(context_of(row, "story"), turn_pairs(turns, unknown=["unknown"]))]


def read_quac(row: Row) -> list[ContextPairs]:
    """The answer is the original one, else the first text of `answers`."""
    questions, answers = get(row, "questions"), get(row, "orig_answers.texts|answers.texts")
    return [ContextPairs(quac_context(row), turn_pairs(same_length(questions, answers)))]


def quac_context(row: Row) -> str:
    return context_of(row, "context").removesuffix(NOT_IN_TEXT).rstrip()


def read_doqa(rows: list[Row]) -> list[ContextPairs]:
    """The turns of one conversation, a row each."""
    turns = [(row.get("question"), get(row, "orig_answer.text|answers.text")) for row in rows]
    return [ContextPairs(quac_context(rows[0]), turn_pairs(turns))]


def doqa_key(row: Row) -> tuple[str, ...]:
    """The conversation: the id without the number of its turn, else background and context."""
    numbered = re.fullmatch(r"(.+)_q#\d+", as_text(row.get("id")) or "")
    return (numbered[1] if numbered else as_text(get(row, "background")) or "", context_of(row, "context"))


def read_topiocqa(rows: list[Row]) -> list[ContextPairs]:
    """A conversation over several topics. The context is the evidence of all its answers, each once."""
    rows = sorted(rows, key=lambda row: turn_number(row))
    evidence = [text for row in rows for text in as_texts(get(row, "Rationale"), "context")]
    known = dict.fromkeys(text for text in evidence if text and text.casefold() != "unanswerable")
    turns = [(row.get("Question"), row.get("Answer")) for row in rows]
    return [ContextPairs("\n".join(known), turn_pairs(turns))]


def turn_number(row: Row) -> float:
    text = as_text(row.get("Turn_no")) or ""
    return float(text) if re.fullmatch(r"\d{1,9}", text) else 0.0


def topiocqa_key(row: Row) -> str:
    if (key := as_text(row.get("Conversation_no"))) is None:
        raise Misfit("missing_conversation", "Conversation_no")
    if get(row, "Rationale") is None:
        raise Misfit("missing_context", "Rationale")
    return key


def read_convfinqa(row: Row) -> list[ContextPairs]:
    """A conversation, or one turn of it, over a table between two texts."""
    parts = [context_of(row, "pre_text", optional=True), table_text(get(row, "table") or [])]
    context = "\n\n".join(filter(None, [*parts, context_of(row, "post_text", optional=True)]))
    questions = get(row, "annotation.cur_dial|cur_dial")
    listed = get(row, "annotation.exe_ans_list|exe_ans_list")
    if questions is None:
        turns = same_length(get(row, "annotation.dialogue_break|dialogue_break"), listed)
        return [ContextPairs(context, turn_pairs(turns))]
    if not isinstance(questions, list) or not questions:
        raise Misfit("missing_question", "cur_dial, annotation.dialogue_break")
    answers = listed[: len(questions) - 1] if isinstance(listed, list) else []
    before = list(zip(questions, answers, strict=False))
    last = (questions[-1], get(row, "annotation.exe_ans|exe_ans"))
    return [ContextPairs(context, turn_pairs([*before, last])[-1:])]


CONVERSATION: dict[str, Adapter] = {
    "coqa": Adapter(read_coqa),
    "quac": Adapter(read_quac),
    "doqa": Adapter(read_doqa, doqa_key),
    "topiocqa": Adapter(read_topiocqa, topiocqa_key),
    "convfinqa": Adapter(read_convfinqa),
}
