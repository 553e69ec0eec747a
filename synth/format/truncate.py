"""Cuts a long text to a budget of tokens, at the end of a sentence or else of a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from synth.format.prompt import context_tokens
from synth.format.wire import context_block
from synth.text.words import SENTENCE_END

if TYPE_CHECKING:
    from ipt_jax.corpus.tokenizer import Tokenizer

Span = tuple[int, int]  # characters [start, end)
Count = Callable[[str, "Tokenizer"], int]

# Characters of a long text that are encoded to find its cut, per token of the budget: first those that prose needs. A
# text with more characters per token than the last is too long in any case.
CHARACTERS_PER_TOKEN = (6, 32)
MOST_CHARACTER_TOKENS = 4  # tokens of one character, byte by byte


def split_text(text: str, tokenizer: Tokenizer, max_tokens: int, count: Count = context_tokens) -> list[Span]:
    """The text in spans of at most `max_tokens` tokens each, cut like `fit_text`.

    The spans cover the text: the blanks between two sentences end the first one's span.
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
    """Whether an example's start fits even if every byte is a token. False: unknown. Saves encoding most texts."""
    spare = 2  # BOS, and the space that a tokenizer may add in front
    return tokenizer.literal and len(context_block(text).encode()) + spare <= max_tokens


def fit_text(text: str, tokenizer: Tokenizer, max_tokens: int, count: Count = context_tokens) -> Span:
    """The span of `text` that has at most `max_tokens` tokens, by default as the start of an example.

    Cut after the last sentence that fits, else after the last word, else after the last character. It has at least one
    character, even if that exceeds the budget.
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
    # Inside the block a merge or two at the edges, and one per broken tag, change the number of tokens.
    while end > 1 and (over := count(probe[:end], tokenizer) - max_tokens) > 0:
        end = cut_point(probe, end - max(1, over // MOST_CHARACTER_TOKENS))
    return 0, end


def cut_point(text: str, limit: int) -> int:
    """The last good place to cut at or before `limit`, at least 1."""
    limit = max(1, min(limit, len(text)))
    for match in reversed(list(SENTENCE_END.finditer(text, 0, limit + 1))):
        if match.end() <= limit and (kept := len(text[: match.end()].rstrip())):
            return kept
    words = text[:limit] if limit < len(text) and not text[limit].isspace() else ""
    space = max((i for i, letter in enumerate(words) if letter.isspace()), default=0)
    return len(text[:space].rstrip()) or limit
