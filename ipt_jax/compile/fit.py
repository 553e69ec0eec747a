"""`--fit`: which micro-batch and way of recomputing fit, ranked by predicted tokens/s.

For every remat the micro-batches that divide the batch are tried by bisection: memory grows with the rows, so a handful
of compilations finds the largest that fits. Of all that were tried and fit, the one with the most predicted tokens/s is
chosen. That need not be the largest: where memory is short, XLA recomputes on its own account.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ipt_jax.config import Recipe, rows_per_step
from ipt_jax.model.config import ModelConfig
from ipt_jax.model.flops import model_flops_per_token, recomputed_flops_per_token
from ipt_jax.parallel.topology import Topology

Remat = str | tuple[str, ...]
Compile = Callable[[Recipe, ModelConfig, Topology], dict[str, Any]]
REMATS: tuple[Remat, ...] = (
    "none",
    ("query", "key", "value", "output", "gate", "up"),
    ("query", "key", "value", "output"),
    "full",
)


def search(
    recipe: Recipe,
    model: ModelConfig,
    topology: Topology,
    shards: int,
    compile_recipe: Compile,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """{chosen, frontier, compilations}: results of `compile_recipe`, each with `recomputed`, a share of FLOPs.

    The frontier is all that fits, sorted by predicted tokens/s, the most first: that one is chosen.
    """
    tried: list[dict[str, Any]] = []
    for remat in REMATS:

        def attempt(microbatch: int, remat: Remat = remat) -> dict[str, Any]:
            settings = recipe.train.model_copy(update={"microbatch": microbatch, "remat": remat})
            result = compile_recipe(recipe.model_copy(update={"train": settings}), model, topology)
            result["recomputed"] = recomputed_flops_per_token(
                model, recipe.data.seq_len, remat
            ) / model_flops_per_token(model, recipe.data.seq_len)
            tried.append(result)
            tell(_line(result, remat, microbatch))
            return result

        largest(sizes(rows_per_step(recipe), shards), attempt)
    frontier = sorted(
        (one for one in tried if one["fits"]), key=lambda one: one["predicted_tokens_per_second"], reverse=True
    )
    return {"chosen": frontier[0] if frontier else None, "frontier": frontier, "compilations": len(tried)}


def _line(result: dict[str, Any], remat: Remat, microbatch: int) -> str:
    memory = f"{result['peak_bytes_per_device'] / 2**30:.2f} GiB"
    fits = "does not fit"
    if result["fits"]:
        fits = f"fits, predicted {result['predicted_tokens_per_second']:,.0f} tokens/s"
    return (
        f"remat {label(remat)}, microbatch {microbatch}: {memory}, {fits} (compiled in {result['compile_seconds']} s)"
    )


def sizes(rows: int, shards: int) -> list[int]:
    """Micro-batches that divide the rows of a shard, ascending."""
    each = rows // shards
    return [size for size in range(1, each + 1) if each % size == 0]


def largest(ascending: list[int], attempt: Callable[[int], dict[str, Any]]) -> dict[str, Any] | None:
    """The result of the largest size that fits, by bisection; None where none does."""
    best, low, high = None, 0, len(ascending)
    while low < high:
        middle = (low + high) // 2
        result = attempt(ascending[middle])
        if result["fits"]:
            best, low = result, middle + 1
        else:
            high = middle
    return best


def label(remat: Remat) -> str:
    return remat if isinstance(remat, str) else "+".join(remat)
