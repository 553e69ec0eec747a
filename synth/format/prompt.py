"""The growing prompt of one few-shot group, as token ids.

The prompt of round r + 1 is the prompt of round r, the completion's tokens up to the last accepted `</END>`, and EOS,
unchanged, so that an engine's prefix cache hits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.records import Pair
from synth.format.wire import END_TAG, PAIR_SEPARATOR, context_block, pairs_text

if TYPE_CHECKING:
    from ipt_jax.corpus.tokenizer import Tokenizer


class Prompt:
    """Closed examples, oldest first, then the open one. `examples` are those before the group's first text.

    An example without accepted pairs is excluded from later prompts: it would teach the model to write none.
    """

    def __init__(self, tokenizer: Tokenizer, examples: Sequence[list[int]] = ()) -> None:
        if tokenizer.eos_id is None:
            raise UserError(
                f"tokenizer {tokenizer.path}: no EOS token; the synthesizer's format needs one, name it in "
                "tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.start = start_ids(tokenizer)
        self.eos_id: int = tokenizer.eos_id
        self.examples = list(examples)
        self.current: list[int] = []

    def start_example(self, text: str) -> list[int]:
        return [*self.start, *self.tokenizer.encode(context_block(text))]

    def example(self, text: str, pairs: Sequence[Pair]) -> list[int]:
        """A complete example, BOS to EOS. A tokenizer without BOS begins it with the context."""
        return [*self.start_example(text), *self.tokenizer.encode(pairs_text(pairs), continuing=True), self.eos_id]

    def sized_example(self, text: str, pairs: Sequence[Pair]) -> tuple[list[int], int]:
        """An example and its tokens."""
        example = self.example(text, pairs)
        return example, len(example)

    def open(self, text: str, max_tokens: int | None = None) -> list[int]:
        """The prompt for this text's pairs. Drops the oldest examples if it would exceed max_tokens."""
        self.current = self.start_example(text)
        while max_tokens is not None and self.examples and self.token_count > max_tokens:
            self.examples.pop(0)
        return [token for example in self.examples for token in example] + self.current

    def close(self, completion_ids: Sequence[int], pairs: Sequence[Pair]) -> int:
        """Appends the completion; returns how many of its kept tokens a prefix cache cannot reuse.

        Tokens after a removed rejected pair have moved, so their cached keys and values do not fit.
        """
        kept = keep_accepted(self.tokenizer, completion_ids, pairs)
        if kept:
            self.examples.append([*self.current, *kept, self.eos_id])
        self.current = []
        return len(kept) - common_prefix(kept, completion_ids)

    @property
    def token_count(self) -> int:
        return sum(len(example) for example in self.examples) + len(self.current)


def keep_accepted(tokenizer: Tokenizer, completion_ids: Sequence[int], pairs: Sequence[Pair]) -> list[int]:
    """The completion's tokens up to the last accepted `</END>`, without rejected pairs.

    `pairs` is the result of `parse_completion` on the decoded completion: record i ends at the i-th `</END>`. The
    tokens before the first rejected pair stay unchanged; accepted pairs after it are encoded again.
    """
    leading = next((place for place, pair in enumerate(pairs) if not pair.accepted), len(pairs))
    later = [pair for pair in pairs[leading:] if pair.accepted]
    kept, tail = tokens_to_end(tokenizer, completion_ids, leading)
    if not later:
        return kept
    separator = PAIR_SEPARATOR.removeprefix(tail) if leading else ""
    return kept + tokenizer.encode(separator + pairs_text(later), continuing=True)


def tokens_to_end(tokenizer: Tokenizer, ids: Sequence[int], ends: int) -> tuple[list[int], str]:
    """The fewest first tokens whose text has `ends` closing tags, and the blank text after the last tag.

    One token may hold '>' and the blank line after it. If one holds '>' and the next pair's first letters, the text up
    to the tag is encoded again.
    """
    if ends == 0:
        return [], ""
    ids = list(ids)

    def tags(size: int) -> int:
        return tokenizer.decode(ids[:size]).count(END_TAG)

    rest = 1  # tokens after the last tag: it is most often near the end
    while rest < len(ids) and tags(len(ids) - rest) >= ends:
        rest *= 2
    before = max(0, len(ids) - rest)  # too few; half of `rest` less are enough
    size = bisect_left(range(len(ids)), ends, before + 1, len(ids) - rest // 2, key=tags)
    text = tokenizer.decode(ids[:size])
    stop = text.rfind(END_TAG) + len(END_TAG)
    tail = text[stop:]
    if tail.strip():
        return tokenizer.encode(text[:stop].lstrip(), continuing=True), ""
    return ids[:size], tail


def context_tokens(text: str, tokenizer: Tokenizer) -> int:
    """Tokens of an example's start: BOS and the context block."""
    return len(start_ids(tokenizer)) + len(tokenizer.encode(context_block(text)))


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """[1, 2, 3], [1, 2, 4] -> 2"""
    both = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in both if a != b), min(len(one), len(other)))


def start_ids(tokenizer: Tokenizer) -> list[int]:
    """What opens an example: BOS, or nothing for a tokenizer without one."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]
