"""Solves a mix in tokens: from what each source asks and holds to the exact number of tokens each one gives.

Amounts are exact: `epochs` times the source's tokens, `tokens` as stated, `share` of the whole with the roundings
handed out so that shares of 1 fill the budget to the token. What cannot be met is a UserError that says by how much and
which number to change; nothing is ever silently less.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence

from ipt_jax.core.errors import UserError
from ipt_jax.data.settings import DataSettings, SourceMix

SAME = 1e-9  # shares that differ by less from a whole make one
MOST = 1 << 53  # tokens; floats count no further one by one


def solve_mix(settings: DataSettings, available: Sequence[int]) -> list[int]:
    """Tokens that each source gives, where source i holds available[i] tokens in one epoch."""
    sources = settings.sources
    for source, tokens in zip(sources, available, strict=True):
        if tokens == 0:
            raise UserError(f"source {source.name!r}: no token is left in {source.path}; take it out of data.sources")
    fixed = [_fixed_tokens(source, tokens) for source, tokens in zip(sources, available, strict=True)]
    total = settings.tokens if settings.tokens is not None else _total_without_budget(sources, sum(fixed))
    amounts = _amounts(sources, fixed, total)
    rest = next((i for i, source in enumerate(sources) if source.asked == "the rest"), None)
    if rest is None:
        _check_sum(settings, available, fixed, amounts, total)
    else:
        _check_rest(settings, available, fixed, rest, amounts[rest], total)
    for source, amount, tokens in zip(sources, amounts, available, strict=True):
        if amount == 0:
            raise UserError(f"source {source.name!r}: {source.asked} of {total:,} is less than a token; raise it")
        _check_repeats(source, amount, tokens)
    return amounts


def check_sources(sources: Sequence[SourceMix]) -> None:
    """Names, and what names refer to, before any source is opened."""
    names = [source.name for source in sources]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"data.sources: the name {doubled[0]!r} stands twice; give each source its own name")
    silent = [source.name for source in sources if source.asked == "the rest"]
    if len(silent) > 1:
        raise UserError(
            f"data.sources: {' and '.join(map(repr, silent))} state no amount; only one source may take the rest: "
            "give the others epochs, tokens or share"
        )
    for source in sources:
        if source.exclude_converted not in (None, *names):
            raise UserError(
                f"source {source.name!r}: exclude_converted names {source.exclude_converted!r}, which is no source "
                f"here; sources are {', '.join(map(repr, names))}"
            )


def _fixed_tokens(source: SourceMix, available: int) -> int:
    if source.epochs is not None:
        whole = math.floor(source.epochs)
        return max(whole * available + round((source.epochs - whole) * available), 1)
    return source.tokens or 0


def _total_without_budget(sources: Sequence[SourceMix], fixed: int) -> int:
    """The whole in which `fixed` tokens are what the shares leave."""
    shares = math.fsum(source.share or 0 for source in sources)
    rest = [source.name for source in sources if source.asked == "the rest"]
    if rest:
        raise UserError(
            f"data.tokens is missing, so the rest for source {rest[0]!r} is unknown; give it, or epochs: 1 there"
        )
    if shares and (not fixed or shares >= 1):
        raise UserError(
            f"data.tokens is missing and the shares (sum {shares:g}) alone do not tell the amount; give data.tokens"
        )
    return round(fixed / (1 - shares))


def _amounts(sources: Sequence[SourceMix], fixed: Sequence[int], total: int) -> list[int]:
    """Tokens of each source in a whole of `total`, whether or not it holds them; the rest may be none or less."""
    amounts = [a + b for a, b in zip(fixed, _share_tokens(sources, total), strict=True)]
    left = total - sum(amounts)
    return [left if source.asked == "the rest" else amount for source, amount in zip(sources, amounts, strict=True)]


def _share_tokens(sources: Sequence[SourceMix], total: int) -> list[int]:
    """Whole tokens for each share; what rounding leaves goes to the largest fractions."""
    shares = [source.share or 0.0 for source in sources]
    if math.fsum(shares) > 1 + SAME:
        raise UserError(
            f"data.sources: the shares sum to {math.fsum(shares):g}, {math.fsum(shares) - 1:g} more than the whole; "
            "lower them to 1 or less"
        )
    quotas = [share * total for share in shares]
    tokens = [math.floor(quota) for quota in quotas]
    by_fraction = sorted(range(len(quotas)), key=lambda i: tokens[i] - quotas[i])
    for i in by_fraction[: round(math.fsum(quotas)) - sum(tokens)]:
        tokens[i] += 1
    return tokens


def _check_sum(
    settings: DataSettings, available: Sequence[int], fixed: Sequence[int], amounts: Sequence[int], total: int
) -> None:
    """Without a source that takes the rest, the amounts must make the budget; a row of difference is none."""
    amount, shares = sum(amounts), math.fsum(source.share or 0 for source in settings.sources)
    if abs(total - amount) < settings.seq_len:
        return
    side = f"{total - amount:,} short of" if amount < total else f"{amount - total:,} more than"
    changes = "let one source state no amount and take the rest"
    if sum(fixed) and shares < 1 - SAME:
        whole = round(sum(fixed) / (1 - shares))
        if _fits(settings, available, fixed, whole):
            changes = f"set data.tokens to {whole}, or {changes}"
    elif shares < 1:
        changes = f"raise the shares (sum {shares:g}) to 1, or {changes}"
    else:
        changes = "lower the shares, which sum to 1 and leave nothing for the others"
    raise UserError(
        f"data.tokens: the sources ask for {amount:,} tokens in all, {side} the budget of {total:,}; {changes}"
    )


def _check_rest(
    settings: DataSettings, available: Sequence[int], fixed: Sequence[int], rest: int, amount: int, total: int
) -> None:
    """The rest must be something, and no more than the source holds. The shares move with the budget, so the budget
    that a refusal names is searched, and named only where the mix fits it."""
    source, held = settings.sources[rest], available[rest]
    if amount <= 0:
        enough = bisect_left(
            range(MOST), True, key=lambda whole: all(one > 0 for one in _amounts(settings.sources, fixed, whole))
        )
        change = f"raise data.tokens above {enough - 1}" if _fits(settings, available, fixed, enough) else "lower those"
        raise UserError(
            f"source {source.name!r}: takes the rest, but the other sources already ask for {total - amount:,} of the "
            f"{total:,} tokens; {change}, or take the source out"
        )
    if amount > held:
        most = bisect_left(range(total), True, key=lambda whole: _lacks(settings, available, fixed, whole)) - 1
        change = f"lower data.tokens to {most}" if _fits(settings, available, fixed, most) else "raise the others"
        raise UserError(
            f"source {source.name!r}: the rest is {amount:,} tokens and one epoch of it has {held:,}, short "
            f"by {amount - held:,}; {change}, or state epochs for it"
        )


def _fits(settings: DataSettings, available: Sequence[int], fixed: Sequence[int], total: int) -> bool:
    """Whether a budget of `total` is accepted."""
    amounts = _amounts(settings.sources, fixed, total)
    if min(amounts) <= 0 or abs(total - sum(amounts)) >= settings.seq_len:
        return False
    return not _lacks(settings, available, fixed, total)


def _lacks(settings: DataSettings, available: Sequence[int], fixed: Sequence[int], total: int) -> bool:
    """Whether a budget of `total` asks some source for more than it may give."""
    amounts = _amounts(settings.sources, fixed, total)
    return any(
        amount > _most(source, held) for source, amount, held in zip(settings.sources, amounts, available, strict=True)
    )


def _most(source: SourceMix, available: int) -> float:
    """Tokens that a source may give; the rest is no more than an epoch."""
    repeated = math.inf if source.max_epochs is None else source.max_epochs * available + 1
    return min(repeated, available) if source.asked == "the rest" else repeated


def _check_repeats(source: SourceMix, amount: int, available: int) -> None:
    if source.max_epochs is None or amount <= _most(source, available):
        return
    most = math.floor(source.max_epochs * available)
    raise UserError(
        f"source {source.name!r}: {source.asked} is {amount:,} tokens, {amount / available:.4g} epochs of its "
        f"{available:,}; max_epochs {source.max_epochs:g} allows {most:,}, short by {amount - most:,}; "
        f"raise max_epochs, or lower {_lever(source)}"
    )


def _lever(source: SourceMix) -> str:
    return f"its {source.asked.split()[0]}" + (" or data.tokens" if source.share is not None else "")
