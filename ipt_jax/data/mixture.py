"""The `data:` block of a training recipe, and its solution: the exact number of tokens that each source gives.

A source states one of `epochs`, `tokens` or `share`. One source may state no amount and takes the remaining tokens of
the budget, at most one epoch. Token counts include BOS and EOS.

Guarantees: amounts are exact. `epochs` are multiples of the tokens of the source, and shares that sum to 1 fill the
budget. An amount that cannot be met is a UserError that says by how many tokens and which number to change.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal, Self

import pydantic
from pydantic import Field

from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import PathText, Settings

EPSILON = 1e-9  # of sums of shares
MAX_TOKENS = 1 << 53  # the integers that a float holds exactly


class SourceMix(Settings):
    """One source: a directory that `ipt tokenize` wrote, and its amount."""

    name: str = Field(min_length=1)
    """Name of the source in plans and reports."""
    path: PathText
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
            raise ValueError(f"source {self.name!r} excludes texts converted into itself; name another source")
        return self

    @property
    def asked(self) -> str:
        """The amount as the recipe states it."""
        if self.epochs is not None:
            return f"epochs {self.epochs:g}"
        if self.tokens is not None:
            return f"tokens {self.tokens:,}"
        return f"share {self.share:g}" if self.share is not None else "the rest"

    def limit(self, available: int) -> float:
        """The most tokens that this source may give if one epoch has `available`."""
        limit = math.inf if self.max_epochs is None else self.max_epochs * available + 1
        return min(limit, available) if self.asked == "the rest" else limit


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
    held_out_share: float | None = Field(default=None, gt=0, lt=1)
    """Fraction of documents, drawn by id, that training leaves out for `validation`. null: none."""
    sources: list[SourceMix] = Field(min_length=1)
    """Token directories and their amounts."""


def check_sources(sources: Sequence[SourceMix]) -> None:
    """Checks names and references to names before a source is opened."""
    names = [source.name for source in sources]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"data.sources: two sources have the name {duplicate!r}; rename one")
    silent = [source.name for source in sources if source.asked == "the rest"]
    if len(silent) > 1:
        raise UserError(
            f"data.sources: {' and '.join(map(repr, silent))} state no amount; only one source may take the rest: "
            "set epochs, tokens or share for the others"
        )
    for source in sources:
        if source.exclude_converted not in (None, *names):
            raise UserError(
                f"source {source.name!r}: exclude_converted names {source.exclude_converted!r}, which is not a source; "
                f"sources are {', '.join(map(repr, names))}"
            )


def solve_mix(settings: DataSettings, available: Sequence[int]) -> list[int]:
    """Tokens that each source gives, where source i has available[i] tokens in one epoch."""
    return _Mix(settings, available).solve()


class _Mix:
    def __init__(self, settings: DataSettings, available: Sequence[int]):
        self._settings, self._sources, self._available = settings, settings.sources, available
        self._shares = math.fsum(source.share or 0 for source in settings.sources)
        self._fixed = [_fixed_tokens(source, tokens) for source, tokens in zip(self._sources, available, strict=True)]

    def solve(self) -> list[int]:
        for source, tokens in zip(self._sources, self._available, strict=True):
            if tokens == 0:
                raise UserError(
                    f"source {source.name!r}: no token is left in {source.path}; remove it from data.sources"
                )
        budget = self._budget() if self._settings.tokens is None else self._settings.tokens
        if self._shares > 1 + EPSILON:
            raise UserError(
                f"data.sources: the shares sum to {self._shares:g}, {self._shares - 1:g} more than 1; "
                "lower them to a sum of 1 or less"
            )
        amounts = self._amounts(budget)
        rest = next((i for i, source in enumerate(self._sources) if source.asked == "the rest"), None)
        if rest is None:
            self._check_sum(sum(amounts), budget)
        else:
            self._check_rest(rest, amounts[rest], budget)
        for source, amount, tokens in zip(self._sources, amounts, self._available, strict=True):
            if amount == 0:
                raise UserError(f"source {source.name!r}: {source.asked} of {budget:,} is less than a token; raise it")
            _check_repeats(source, amount, tokens)
        return amounts

    def _budget(self) -> int:
        """The budget in which the fixed amounts fill what the shares leave."""
        if rest := next((source.name for source in self._sources if source.asked == "the rest"), None):
            raise UserError(
                f"data.tokens is missing, so the rest for source {rest!r} is unknown; set it, or epochs: 1 there"
            )
        if self._shares and (not sum(self._fixed) or self._shares >= 1):
            raise UserError(
                f"data.tokens is missing and shares (sum {self._shares:g}) alone do not set the amount; set data.tokens"
            )
        return round(sum(self._fixed) / (1 - self._shares))

    def _amounts(self, budget: int) -> list[int]:
        """Tokens of each source in a budget, whether or not the source has them. The rest may be 0 or negative.

        Shares are rounded down; the tokens lost by rounding go to the largest fractions.
        """
        quotas = [(source.share or 0.0) * budget for source in self._sources]
        tokens = [math.floor(quota) for quota in quotas]
        by_fraction = sorted(range(len(quotas)), key=lambda i: tokens[i] - quotas[i])
        for i in by_fraction[: round(math.fsum(quotas)) - sum(tokens)]:
            tokens[i] += 1
        amounts = [fixed + shared for fixed, shared in zip(self._fixed, tokens, strict=True)]
        rest = budget - sum(amounts)
        return [rest if one.asked == "the rest" else amount for one, amount in zip(self._sources, amounts, strict=True)]

    def _exceeds(self, budget: int) -> bool:
        """Whether a source gives more than it may in a budget."""
        limits = (source.limit(tokens) for source, tokens in zip(self._sources, self._available, strict=True))
        return any(amount > limit for amount, limit in zip(self._amounts(budget), limits, strict=True))

    def _accepts(self, budget: int) -> bool:
        amounts = self._amounts(budget)
        filled = abs(budget - sum(amounts)) < self._settings.seq_len
        return min(amounts) > 0 and filled and not self._exceeds(budget)

    def _check_sum(self, amount: int, budget: int) -> None:
        """If no source takes the rest, the amounts must sum to the budget, within one row."""
        if abs(budget - amount) < self._settings.seq_len:
            return
        side = f"{budget - amount:,} short of" if amount < budget else f"{amount - budget:,} more than"
        change = "let one source state no amount and take the rest"
        if sum(self._fixed) and self._shares < 1 - EPSILON:
            enough = round(sum(self._fixed) / (1 - self._shares))
            if self._accepts(enough):
                change = f"set data.tokens to {enough}, or {change}"
        elif self._shares < 1:
            change = f"raise the shares (sum {self._shares:g}) to 1, or {change}"
        else:
            change = "lower the shares, which sum to 1 and leave no tokens for the others"
        raise UserError(
            f"data.tokens: the sources ask for {amount:,} tokens in all, {side} the budget of {budget:,}; {change}"
        )

    def _check_rest(self, rest: int, amount: int, budget: int) -> None:
        """The rest must be positive and at most one epoch. The shares change with the budget, so the budget that an
        error names is found by bisection, and named only if it is accepted."""
        source, available = self._sources[rest], self._available[rest]
        if amount <= 0:
            enough = bisect_left(range(MAX_TOKENS), True, key=lambda one: min(self._amounts(one)) > 0)
            change = f"raise data.tokens above {enough - 1}" if self._accepts(enough) else "lower those"
            raise UserError(
                f"source {source.name!r}: takes the rest, but the other sources already ask for {budget - amount:,} of "
                f"the {budget:,} tokens; {change}, or remove the source"
            )
        if amount > available:
            most = bisect_left(range(budget), True, key=self._exceeds) - 1
            change = f"lower data.tokens to {most}" if self._accepts(most) else "raise the others"
            raise UserError(
                f"source {source.name!r}: the rest is {amount:,} tokens and one epoch of it has {available:,}, short "
                f"by {amount - available:,}; {change}, or set its epochs"
            )


def _fixed_tokens(source: SourceMix, available: int) -> int:
    if source.epochs is not None:
        complete = math.floor(source.epochs)
        return max(complete * available + round((source.epochs - complete) * available), 1)
    return source.tokens or 0


def _check_repeats(source: SourceMix, amount: int, available: int) -> None:
    if source.max_epochs is None or amount <= source.limit(available):
        return
    most = math.floor(source.max_epochs * available)
    raise UserError(
        f"source {source.name!r}: {source.asked} is {amount:,} tokens, {amount / available:.4g} epochs of its "
        f"{available:,}; max_epochs {source.max_epochs:g} allows {most:,}, short by {amount - most:,}; raise "
        f"max_epochs, or lower its {source.asked.split()[0]}{' or data.tokens' if source.share is not None else ''}"
    )
