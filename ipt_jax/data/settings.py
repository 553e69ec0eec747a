"""The `data:` block of a training recipe: which token shards, how much of each, and how they are packed into rows.

A source states one of `epochs`, `tokens` or `share`; one source may state nothing and takes the rest of the budget, at
most one epoch. Token counts are real tokens, BOS and EOS included.
"""

from typing import Literal, Self

import pydantic
from pydantic import Field

from ipt_jax.core.settings import Settings


class SourceMix(Settings):
    """One source: a directory that `ipt tokenize` wrote, and its amount."""

    name: str = Field(min_length=1)
    """Name of the source in plans and reports."""
    path: str
    """Output directory of `ipt tokenize`."""
    epochs: float | None = Field(default=None, gt=0)
    """Amount in epochs."""
    tokens: int | None = Field(default=None, gt=0)
    """Amount in tokens."""
    share: float | None = Field(default=None, gt=0, le=1)
    """Amount as a fraction of the budget. One source may state no amount and gets the remaining tokens."""
    max_epochs: float | None = Field(default=None, gt=0)
    """Maximum epochs that `tokens` or `share` may come to."""
    exclude_converted: str | None = None
    """Name of another source. Texts that it was made from are excluded from this source."""

    @pydantic.model_validator(mode="after")
    def _one_amount(self) -> Self:
        stated = [name for name in ("epochs", "tokens", "share") if getattr(self, name) is not None]
        if len(stated) > 1:
            raise ValueError(f"source {self.name!r} states {' and '.join(stated)}; keep one of them")
        if self.exclude_converted == self.name:
            raise ValueError(f"source {self.name!r} excludes what itself was converted to; name another source")
        return self

    @property
    def asked(self) -> str:
        """The amount as the recipe states it."""
        if self.epochs is not None:
            return f"epochs {self.epochs:g}"
        if self.tokens is not None:
            return f"tokens {self.tokens:,}"
        return f"share {self.share:g}" if self.share is not None else "the rest"


class DataSettings(Settings):
    """The token mix of a run and its packing into rows."""

    seq_len: int = Field(gt=1)
    """Tokens per row."""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat: split documents at row ends. best_fit: keep documents that fit in one row unsplit."""
    cross_document: Literal["allow", "block"] = "allow"
    """block: attention stays within a document. The rows are the same either way."""
    tokens: int | None = Field(default=None, gt=0)
    """Token budget of the run. null: the sum of the sources, each of which must state its amount."""
    seed: int = 0
    """Random seed of the order of rows."""
    sources: list[SourceMix] = Field(min_length=1)
    """Token directories and their amounts."""
