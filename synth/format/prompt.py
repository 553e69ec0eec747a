"""The growing prompt of one few-shot group, as token ids.

The prompt of round r + 1 is the prompt of round r, the tokens that came back up to the last accepted `</END>`, and
EOS, unchanged, so that an engine's prefix cache hits.
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
    leading = next((place for place, pair in enumerate(pairs) if not pair.accepted), len(pairs))
    later = [pair for pair in pairs[leading:] if pair.accepted]
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
