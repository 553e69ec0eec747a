"""The `data:` block of a training recipe: which token shards, how much of each, and how they are packed into rows.

A source states one of `epochs`, `tokens` or `share`; one source may state nothing and takes the rest of the budget, at
most one epoch. Token counts are real tokens, BOS and EOS included.
"""

from typing import Literal, Self

import pydantic
from pydantic import Field

from ipt_jax.corpus.settings import Settings


class SourceMix(Settings):
    """One source: a directory that `ipt tokenize` wrote, and its amount.

    `max_epochs` caps how often `tokens` or `share` may repeat the source. `exclude_converted` names another source: the
    character spans that it was made from drop out of this one, the rest stays.
    """

    name: str = Field(min_length=1)
    path: str
    epochs: float | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    share: float | None = Field(default=None, gt=0, le=1)
    max_epochs: float | None = Field(default=None, gt=0)
    exclude_converted: str | None = None

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
    """`tokens` is the budget; it may be left out when every source states its own amount.

    `cross_document` says whether attention may look across the documents of a row; the rows are the same either way.
    """

    seq_len: int = Field(gt=1)
    packing: Literal["concat", "best_fit"] = "concat"
    cross_document: Literal["allow", "block"] = "allow"
    tokens: int | None = Field(default=None, gt=0)
    seed: int = 0
    sources: list[SourceMix] = Field(min_length=1)
