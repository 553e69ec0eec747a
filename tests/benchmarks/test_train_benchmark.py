"""benchmarks/train_step.py: both JAX sides compute the same, and a ratio says what it claims."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from extras import ROOT
from trainkit import model_of, worst

from ipt_jax.model.decoder import Mistral, init_params
from ipt_jax.train.loss import cross_entropy

sys.path.insert(0, str(ROOT / "benchmarks"))
import naive_step  # noqa: E402
import train_step  # noqa: E402

NAMES = {
    "attention_norm": "norm1", "query": "wq", "key": "wk", "value": "wv", "output": "wo",
    "mlp_norm": "norm2", "gate": "gate", "up": "up", "down": "down",
}  # fmt: skip


def naive_params(params: dict[str, Any], loop: bool) -> dict[str, Any]:
    layers = {NAMES[name]: value for name, value in params["layers"].items()}
    count = len(layers["norm1"])
    each = [jax.tree.map(lambda value, i=i: value[i], layers) for i in range(count)]
    return {**params, "layers": each if loop else layers}


@pytest.mark.parametrize("loop", [False, True])
def test_naive_step_and_ours_agree(loop: bool) -> None:
    model = model_of(layers=3, tie_embeddings=False)
    params = init_params(model, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, 40))

    def ours(params: dict[str, Any]) -> jax.Array:
        merged, ones = Mistral.from_params(model, params), jnp.ones(tokens.shape, jnp.int32)
        mask = jnp.arange(40) < jnp.full((2, 1), 39)
        total, _ = cross_entropy(
            merged.hidden(tokens), merged.output_projection(), np.roll(tokens, -1, 1), mask, ones, chunk=16
        )
        return total / mask.sum()

    def theirs(params: dict[str, Any]) -> jax.Array:
        return naive_step.loss_of(naive_params(params, loop), jnp.asarray(tokens))

    quick = {"xla_backend_optimization_level": 0}
    (loss, grads), (wanted, wanted_grads) = (
        jax.jit(jax.value_and_grad(one), compiler_options=quick)(params) for one in (ours, theirs)
    )
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert worst(grads, wanted_grads) < 1e-5


def test_ratios_are_those_of_neighbours_in_time() -> None:
    """The machine is three times slower in the second round, for all alike."""

    def of(*turns: list[float]) -> dict[str, Any]:
        return {"seconds": [*turns], "compile_seconds": 1.0, "peak_mib": 7, "losses": [2.0, 1.0]}

    results = {
        "ours": of([1.0, 1.0], [3.0, 3.0]),
        "naive-scan": of([2.0, 2.0], [6.0, 6.0]),
        "naive-loop": of([4.0, 4.0], [4.5, 4.5]),
        "torch-eager": of([0.5, 0.5], [1.5, 1.5]),
    }
    report = train_step.summary("A", results)
    assert report["speedup_of_ours_over"] == {"ours": 1, "naive-scan": 2, "naive-loop": 2.75, "torch-eager": 0.5}
    assert (report["ours_over_best_naive"], report["ours_over_best_torch"]) == (2, 0.5)
    assert "ours over the best naive: 2.00x" in train_step.describe(report)
