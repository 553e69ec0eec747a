"""The wire format between texts, pairs and the synthesizer: literal strings, and the tokens of a few-shot prompt.

Guaranteed: tuning documents, prompts and the parser agree on one format to the byte (the paper's Table 7):

    <s> <CON> text </CON>

    <QUE> question <ANS> answer </END>

    <QUE> question <ANS> answer </END></s><s> <CON> next text </CON> ...

BOS and EOS are control tokens and never text; BOS stands once an example. The prompt of round r+1 is the prompt of
round r, the tokens that came back up to the last accepted `</END>`, and EOS, unchanged, so that an engine's prefix
cache hits. A raw text's own tags are broken in its block (`shown`), in tuning documents and prompts alike: no text ends
its block or holds what looks like a pair. Not guaranteed: that a pair built by `wire_pair` holds no tag of its own;
`parse_completion` tells.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from ipt_jax.corpus.records import Format, Pair, Segment
from ipt_jax.corpus.settings import UserError

if TYPE_CHECKING:
    from ipt_jax.corpus.tokenizer import Tokenizer

FORMAT = 1  # part of a run's identity: to be raised when this module, the parser or the grouping makes something else
QUESTION_TAG = "<QUE>"
ANSWER_TAG = "<ANS>"
END_TAG = "</END>"
TAGS = frozenset({"<con>", "</con>", "<que>", "<ans>", "</end>"})  # as `plain_letter` spells them
LESS = re.compile("[<＜﹤≮]")  # all that a normalizer may turn into '<'
PAIR_SEPARATOR = "\n\n"
OPTIONS_CUE = "\nOptions:"
OPTION_MARK = "\n- "
COT_CUE = "\nLet's think step by step."
ANSWER_CUE = "\nTherefore, the answer is "

Span = tuple[int, int]  # characters [start, end)

# How much of a long text is encoded to find its cut: what prose needs, then more. A text with more characters a token
# than the last is taken to be too long without being tokenized whole.
CHARACTERS_PER_TOKEN = (6, 32)
MOST_CHARACTER_TOKENS = 4  # the bytes of a character: taking away fewer characters than this needs cannot suffice
SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s)|[。！？]+[”’」』）]*|\n")


def context_block(text: str) -> str:
    """'abc' -> ' <CON> abc </CON>\\n\\n'; no tag of the text's own stands in it."""
    return f" <CON> {shown(text)} </CON>{PAIR_SEPARATOR}"


def shown(text: str) -> str:
    """A raw text as a block shows it: stripped, and each tag of the format broken by a space behind its '<'.

    '</END>' -> '< /END>'. What a tokenizer's normalizer might turn into a tag (other widths or cases, accents,
    invisible characters between the letters) counts as one. The record keeps the text as it is.
    """
    return LESS.sub(lambda less: less[0] + " " * opens_tag(text, less.start()), text).strip()


def opens_tag(text: str, place: int) -> bool:
    """Whether the text from `place` on is a tag of the format, or could be normalized into one."""
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
    """The letter without case, width and accents; nothing for marks and for control and format characters."""
    apart = unicodedata.normalize("NFKD", letter).casefold()
    return "".join(one for one in apart if unicodedata.category(one)[0] not in "CM")


def pair_text(pair: Pair) -> str:
    """One pair on the wire: '<QUE> q <ANS> a </END>'"""
    return f"{QUESTION_TAG} {pair.question} {ANSWER_TAG} {pair.answer} {END_TAG}"


def pairs_text(pairs: Sequence[Pair]) -> str:
    return PAIR_SEPARATOR.join(pair_text(pair) for pair in pairs)


def wire_pair(question: str, answer: str, options: Sequence[str] | None = None, rationale: str | None = None) -> Pair:
    """Builds the strings of one of the four formats; `answer` is the final answer (for choices the option's text)."""
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
    """One example of a tuning document: BOS, the context (no loss), the pairs (loss), EOS (loss: it ends the list)."""
    segments = [Segment(loss=False, control="bos"), Segment(text=context_block(text), loss=False)]
    if pairs:
        segments.append(Segment(text=pairs_text(pairs), loss=True))
    return [*segments, Segment(loss=True, control="eos")]


class Prompt:
    """The growing prompt of one few-shot group: closed examples, oldest first, then the open one.

    An example that kept no pair is left out of the prompts after it: shown, it would teach to write none.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.bos_id is None or tokenizer.eos_id is None:
            raise UserError(
                f"tokenizer {tokenizer.path}: no BOS or no EOS token; the synthesizer's format needs both, "
                "name them in tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.bos_id: int = tokenizer.bos_id
        self.eos_id: int = tokenizer.eos_id
        self.examples: list[list[int]] = []
        self.current: list[int] = []

    def start_example(self, text: str) -> list[int]:
        return [self.bos_id, *self.tokenizer.encode(context_block(text))]

    def add_example(self, text: str, pairs: Sequence[Pair]) -> None:
        """A seed example, written by hand or taken from tuning data."""
        answers = self.tokenizer.encode(pairs_text(pairs), continuing=True)
        self.examples.append([*self.start_example(text), *answers, self.eos_id])

    def open(self, text: str, max_tokens: int | None = None) -> list[int]:
        """The prompt that asks for this text's pairs; the oldest examples go first when it would exceed max_tokens."""
        self.current = self.start_example(text)
        while max_tokens is not None and self.examples and self.token_count > max_tokens:
            self.examples.pop(0)
        return [token for example in self.examples for token in example] + self.current

    def close(self, completion_ids: Sequence[int], pairs: Sequence[Pair]) -> bool:
        """Takes in what came back for the open text; True when a rejected pair was cut out (the cache hit is lost)."""
        kept, cut = keep_accepted(self.tokenizer, completion_ids, pairs)
        if kept:
            self.examples.append([*self.current, *kept, self.eos_id])
        self.current = []
        return cut

    @property
    def token_count(self) -> int:
        return sum(len(example) for example in self.examples) + len(self.current)


def keep_accepted(tokenizer: Tokenizer, completion_ids: Sequence[int], pairs: Sequence[Pair]) -> tuple[list[int], bool]:
    """The completion's tokens up to the last accepted `</END>`, and whether a rejected pair had to be cut out.

    `pairs` is what `parse_completion` made of the decoded completion: record i ends at the i-th `</END>`. The tokens
    before the first rejected pair stay as they are; accepted pairs after it are encoded anew behind them.
    """
    verdicts = [pair.verdict == "accepted" for pair in pairs]
    leading = verdicts.index(False) if False in verdicts else len(verdicts)
    later = [pair for pair, accepted in zip(pairs[leading:], verdicts[leading:], strict=True) if accepted]
    kept, tail, exact = tokens_to_end(tokenizer, completion_ids, leading)
    if not later:
        return kept, not exact
    separator = PAIR_SEPARATOR.removeprefix(tail) if leading else ""
    return kept + tokenizer.encode(separator + pairs_text(later), continuing=True), True


def tokens_to_end(tokenizer: Tokenizer, ids: Sequence[int], ends: int) -> tuple[list[int], str, bool]:
    """The fewest first tokens whose text holds `ends` closing tags; the blank text behind the last one; exactness.

    One token may hold '>' and the blank line after it. One that holds '>' and the next pair's first letters cannot be
    kept: then the text is encoded anew and the answer is inexact.
    """
    if ends == 0:
        return [], "", True
    ids = list(ids)

    def held(size: int) -> int:
        return tokenizer.decode(ids[:size]).count(END_TAG)

    behind = 1  # from the end, where the last of them most often stands
    while behind < len(ids) and held(len(ids) - behind) >= ends:
        behind *= 2
    before = max(0, len(ids) - behind)  # too few; and half of `behind` less are enough
    size = bisect_left(range(len(ids)), ends, before + 1, len(ids) - behind // 2, key=held)
    text = tokenizer.decode(ids[:size])
    stop = text.rfind(END_TAG) + len(END_TAG)
    tail = text[stop:]
    if tail.strip():
        return tokenizer.encode(text[:stop].lstrip(), continuing=True), "", False
    return ids[:size], tail, True


def context_tokens(text: str, tokenizer: Tokenizer) -> int:
    """Tokens of an example's start: BOS and the context block."""
    return 1 + len(tokenizer.encode(context_block(text)))


Count = Callable[[str, "Tokenizer"], int]


def split_text(text: str, tokenizer: Tokenizer, max_tokens: int, count: Count = context_tokens) -> list[Span]:
    """The text in spans of at most `max_tokens` tokens each, cut like `fit_text`; one where it fits.

    The spans cover the whole text: blank characters between two sentences end the first one's span.
    """
    spans: list[Span] = []
    start, first = 0, len(text) - len(text.lstrip())
    while start < len(text):
        _, size = fit_text(text[first:], tokenizer, max_tokens, count)
        rest = text[first + size :].lstrip()
        spans.append((start, len(text) - len(rest)))
        start = first = len(text) - len(rest)
    return spans


def surely_fits(text: str, tokenizer: Tokenizer, max_tokens: int) -> bool:
    """Whether an example's start fits even if every byte were a token; false tells nothing. It spares most encoding."""
    spare = 2  # BOS, and the space that a tokenizer may put first
    return tokenizer.literal and len(context_block(text).encode()) + spare <= max_tokens


def fit_text(text: str, tokenizer: Tokenizer, max_tokens: int, count: Count = context_tokens) -> Span:
    """The span of `text` that has at most `max_tokens` tokens, by default as the start of an example.

    Cut behind the last sentence that fits, else behind the last word, else behind the last character; at least one
    character stays whatever the budget, so the caller sets a budget that holds the empty block and a few tokens.
    """
    room = max_tokens - count("", tokenizer)
    for letters in CHARACTERS_PER_TOKEN:
        probe = text[: max(1, max_tokens) * letters]
        if len(probe) == len(text) and count(text, tokenizer) <= max_tokens:
            return 0, len(text)
        ends = tokenizer.char_ends(probe)[1]
        if len(ends) > room:
            break
    limit = ends[min(room, len(ends)) - 1] if room > 0 and ends else 1
    end = cut_point(probe, limit)
    # Tokens of the text alone and inside the block differ by a merge or two at the edges, and by one a broken tag.
    while end > 1 and (over := count(probe[:end], tokenizer) - max_tokens) > 0:
        end = cut_point(probe, end - max(1, over // MOST_CHARACTER_TOKENS))
    return 0, end


def cut_point(text: str, limit: int) -> int:
    """The last good place to cut at or before `limit`, at least 1."""
    limit = max(1, min(limit, len(text)))
    head = text[: limit + 1]
    sentences = [match.end() for match in SENTENCE_END.finditer(head) if match.end() <= limit]
    for end in reversed(sentences):
        if kept := len(text[:end].rstrip()):
            return kept
    words = text[:limit] if limit < len(text) and not text[limit].isspace() else ""
    space = max((i for i, letter in enumerate(words) if letter.isspace()), default=0)
    return len(text[:space].rstrip()) or limit
