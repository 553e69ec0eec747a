"""Parses pairs from completions of a synthesizer. Every rejected pair has a reason.

Guaranteed: no string raises; record i ends at the i-th `</END>` of the text, and text after the last `</END>` is a last
record unless blank; an accepted pair written by `pair_text` is read back unchanged. A rejected pair keeps its text, in
`question` if question and answer cannot be separated.
Not guaranteed: that an answer is true or grounded (`synth verify` scores that).
"""

import re

import msgspec

from ipt_jax.corpus.records import Pair, Reason
from synth.format.wire import (
    ANSWER_CUE,
    ANSWER_TAG,
    COT_CUE,
    END_TAG,
    OPTION_MARK,
    OPTIONS_CUE,
    QUESTION_TAG,
    final_answer,
    pair_format,
    question_stem,
)

REASONS: dict[str, str] = {
    "truncated": "the token limit ended the text before </END>",
    "unclosed": "the model stopped by itself inside a pair, without </END>",
    "leftover_text": "text outside of a pair: before <QUE>, or behind the last </END> with no tag in it",
    "no_question": "no <QUE> before </END>",
    "no_answer": "no <ANS> before </END>",
    "two_answers": "more than one <ANS>",
    "nested_tag": "a second <QUE>, or a <CON> tag, inside of a pair",
    "empty_question": "nothing between <QUE> and <ANS>, or nothing but options or the reasoning cue",
    "empty_answer": "nothing between <ANS> and </END>",
    "duplicate_question": "same question and options as an accepted pair of this text, but for case, space and order",
    "cot_malformed": "the reasoning cue and the line 'Therefore, the answer is': one without the other, twice or empty",
    "options_malformed": "'Options:' not followed by two or more different lines '- option'",
    "too_many_options": "more than 26 options",
    "answer_not_in_options": "the answer is none of the options (one closing period aside)",
}
MAX_OPTIONS = 26
CONTEXT_TAG = re.compile(r"</?CON>")


def parse_completion(text: str, finished: bool) -> list[Pair]:
    """The pairs of one completion, accepted and rejected, in order. `finished`: it ended with EOS."""
    *records, tail = text.split(END_TAG)
    pairs = without_duplicates([read_pair(record) for record in records])
    if tail.strip():
        has_tag = QUESTION_TAG in tail or ANSWER_TAG in tail
        reason: Reason = "truncated" if not finished else "unclosed" if has_tag else "leftover_text"
        pairs.append(rejected(reason, tail.strip()))
    return pairs


def without_duplicates(pairs: list[Pair]) -> list[Pair]:
    """The pairs, with later accepted ones of the same question rejected."""
    seen: set[tuple[str, ...]] = set()
    found = []
    for pair in pairs:
        key = question_key(pair)
        found.append(reject(pair, "duplicate_question") if pair.accepted and key in seen else pair)
        if pair.accepted:
            seen.add(key)
    return found


def read_pair(record: str) -> Pair:
    """The pair in the text between two closing tags."""
    if reason := tag_fault(record):
        return rejected(reason, record.strip())
    question, _, answer = record.partition(QUESTION_TAG)[2].partition(ANSWER_TAG)
    question, answer = question.strip(), answer.strip()
    return read_format(question, answer) if answer else rejected("empty_answer", question)


def tag_fault(record: str) -> Reason | None:
    before, question_tag, inside = record.partition(QUESTION_TAG)
    if not question_tag:
        return "no_question"
    if before.strip():
        return "leftover_text"
    if QUESTION_TAG in inside or CONTEXT_TAG.search(inside):
        return "nested_tag"
    answers = inside.count(ANSWER_TAG)
    if answers != 1:
        return "two_answers" if answers else "no_answer"
    return None


def read_format(question: str, answer: str) -> Pair:
    """The pair with its format, options and rationale; rejected if question and answer do not fit."""
    pair = Pair(question=question, answer=answer)
    if reason := read_rationale(pair) or read_options(pair):
        return reject(pair, reason)
    pair.format = pair_format(bool(pair.options), pair.rationale is not None)
    if not question_stem(pair).strip():
        return reject(pair, "empty_question")
    if pair.options and gold_option(pair) is None:
        return reject(pair, "answer_not_in_options")
    return pair


def read_rationale(pair: Pair) -> Reason | None:
    """Sets `rationale` if both cues are in their places."""
    question = f"\n{pair.question}"  # stripping removes the line break of a cue after an empty stem
    cues = question.count(COT_CUE), pair.answer.count(ANSWER_CUE)
    if cues == (0, 0):
        return None
    rationale, _, final = pair.answer.partition(ANSWER_CUE)
    if cues != (1, 1) or not (question.endswith(COT_CUE) and rationale.strip() and final.strip()):
        return "cot_malformed"
    pair.rationale = rationale
    return None


def read_options(pair: Pair) -> Reason | None:
    """Sets `options` from the lines after 'Options:'."""
    _, cue, listing = f"\n{pair.question}".removesuffix(COT_CUE).partition(OPTIONS_CUE)
    if not cue:
        return None
    before, *options = listing.split(OPTION_MARK)
    if before.strip() or len(options) < 2 or len({option.strip() for option in options}) < len(options):
        return "options_malformed"
    if any(not line.strip() or rest.strip() for line, _, rest in (option.partition("\n") for option in options)):
        return "options_malformed"
    if len(options) > MAX_OPTIONS:
        return "too_many_options"
    pair.options = [option.strip() for option in options]
    return None


def gold_option(pair: Pair) -> int | None:
    """The index of the option that the answer names, up to one closing period."""
    answer = final_answer(pair)
    if answer in pair.options:
        return pair.options.index(answer)
    bare = [option.removesuffix(".") for option in pair.options]
    return bare.index(answer.removesuffix(".")) if answer.removesuffix(".") in bare else None


def question_key(pair: Pair) -> tuple[str, ...]:
    """Equal for questions that differ only in case, spaces and the order of options."""
    return plain(question_stem(pair)), *sorted(plain(option) for option in pair.options)


def plain(text: str) -> str:
    return " ".join(text.casefold().split())


def rejected(reason: Reason, question: str, answer: str = "") -> Pair:
    return Pair(question=question, answer=answer, verdict="rejected", reason=reason)


def reject(pair: Pair, reason: Reason) -> Pair:
    """The pair with its parsed fields and this reason."""
    return msgspec.structs.replace(pair, verdict="rejected", reason=reason)
