"""The text format of prompts, answers and tuning documents.

Guaranteed: tuning documents, prompts and the parser use the same strings (the paper's Table 7):

    <s> <CON> text </CON>

    <QUE> question <ANS> answer </END>

    <QUE> question <ANS> answer </END></s><s> <CON> next text </CON> ...

BOS and EOS are control tokens and never text; an example has one BOS. The tags of a raw text are broken in its block
(`shown`), in tuning documents and prompts: no text ends its block or contains a pair.
Not guaranteed: that a pair built by `wire_pair` contains no tag; `parse_completion` rejects it then.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from ipt_jax.corpus.records import Format, Pair, Segment

FORMAT = 1  # part of a run's identity: raise it when this module, the parser or the grouping changes its results
QUESTION_TAG = "<QUE>"
ANSWER_TAG = "<ANS>"
END_TAG = "</END>"
TAGS = frozenset({"<con>", "</con>", "<que>", "<ans>", "</end>"})  # after `plain_letter`
LESS = re.compile("[<＜﹤≮]")  # letters that a normalizer may turn into '<'
PAIR_SEPARATOR = "\n\n"
OPTIONS_CUE = "\nOptions:"
OPTION_MARK = "\n- "
COT_CUE = "\nLet's think step by step."
ANSWER_CUE = "\nTherefore, the answer is "


def context_block(text: str) -> str:
    """'abc' -> ' <CON> abc </CON>\\n\\n', with the text's own tags broken."""
    return f" <CON> {shown(text)} </CON>{PAIR_SEPARATOR}"


def shown(text: str) -> str:
    """A raw text in its block: stripped, with a space after the '<' of each tag. '</END>' -> '< /END>'

    Text that a tokenizer's normalizer might turn into a tag counts as one: other widths or cases, accents, invisible
    characters between the letters. The record keeps the text unchanged.
    """
    return LESS.sub(lambda less: less[0] + " " * opens_tag(text, less.start()), text).strip()


def opens_tag(text: str, place: int) -> bool:
    """Whether a tag of the format begins at `place`, or text that could be normalized into one."""
    seen = ""
    for at in range(place, len(text)):
        seen += plain_letter(text[at])
        if seen in TAGS:
            return True
        if not any(tag.startswith(seen) for tag in TAGS):
            return False
    return False


@lru_cache(maxsize=1024)
def plain_letter(letter: str) -> str:
    """The letter without case, width and accents. Empty for marks, control and format characters."""
    apart = unicodedata.normalize("NFKD", letter).casefold()
    return "".join(one for one in apart if unicodedata.category(one)[0] not in "CM")


def pair_text(pair: Pair) -> str:
    """One pair on the wire: '<QUE> q <ANS> a </END>'"""
    return f"{QUESTION_TAG} {pair.question} {ANSWER_TAG} {pair.answer} {END_TAG}"


def pairs_text(pairs: Sequence[Pair]) -> str:
    return PAIR_SEPARATOR.join(pair_text(pair) for pair in pairs)


def wire_pair(question: str, answer: str, options: Sequence[str] | None = None, rationale: str | None = None) -> Pair:
    """A pair of one of the four formats. `answer` is the final answer, for choices the text of the option."""
    options = list(options or [])
    wired = question
    if options:
        wired += OPTIONS_CUE + "".join(OPTION_MARK + option for option in options)
    if rationale is not None:
        wired += COT_CUE
        answer = f"{rationale}{ANSWER_CUE}{answer}"
    kind = pair_format(bool(options), rationale is not None)
    return Pair(question=wired, answer=answer, format=kind, options=options, rationale=rationale)


def pair_format(has_options: bool, has_rationale: bool) -> Format:
    if has_options:
        return "choice_cot" if has_rationale else "choice"
    return "free_cot" if has_rationale else "free"


def question_stem(pair: Pair) -> str:
    """The question without its options and its reasoning cue."""
    stem = pair.question if pair.rationale is None else f"\n{pair.question}".removesuffix(COT_CUE).removeprefix("\n")
    return f"\n{stem}".partition(OPTIONS_CUE)[0].removeprefix("\n") if pair.options else stem


def final_answer(pair: Pair) -> str:
    """The answer without its reasoning."""
    _, cue, final = pair.answer.partition(ANSWER_CUE)
    return (final if cue and pair.rationale is not None else pair.answer).strip()


def example_segments(text: str, pairs: Sequence[Pair]) -> list[Segment]:
    """One example of a tuning document: BOS, the context (no loss), the pairs (loss), EOS (loss). An empty text has no
    block, as in the official prompts."""
    segments = [Segment(loss=False, control="bos")]
    if text.strip():
        segments.append(Segment(text=context_block(text), loss=False))
    if pairs:
        segments.append(Segment(text=pairs_text(pairs), loss=True))
    return [*segments, Segment(loss=True, control="eos")]
