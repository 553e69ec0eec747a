"""Cuts a long text to a budget of tokens, at the end of a sentence or else of a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from synth.format.prompt import context_tokens
from synth.format.wire import context_block
from synth.text.sentences import SENTENCE_END

if TYPE_CHECKING:
    from ipt_jax.corpus.tokenizer import Tokenizer

Span = tuple[int, int]  # characters [start, end)

# How much of a long text is encoded to find its cut: what prose needs, then more. A text with more characters a token
# than the last is taken to be too long without being tokenized whole.
CHARACTERS_PER_TOKEN = (6, 32)
MOST_CHARACTER_TOKENS = 4  # the bytes of a character: taking away fewer characters than this needs cannot suffice


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
