"""Dtypes of the real bfloat16 step, read from its jaxpr: matrix products, reductions, what needs float32, the state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxprs import equations
from trainkit import model_of, program_of, recipe_of

HALF, FULL = jnp.dtype("bfloat16"), jnp.dtype("float32")
WIDE = ("exp", "exp2", "log", "rsqrt", "sqrt", "cos", "sin", "tanh", "logistic", "erf", "integer_pow")


@pytest.fixture(scope="module")
def step() -> Any:
    """jaxpr and result of a step with windows, blocks, accumulation, a chunked loss and recomputation."""
    train = {"compute_dtype": "bfloat16", "microbatch": 8, "remat": "full", "loss_chunk": 64, "z_loss": 1e-4}
    program = program_of(recipe_of(data={"cross_document": "block"}, train=train), model_of(sliding_window=8))
    return jax.make_jaxpr(program.step.__wrapped__, return_shape=True)(program.state, program.batch)


def dtypes(equation: Any) -> list[Any]:
    return [value.aval.dtype for value in equation.invars]


def test_products_take_bfloat16_and_say_what_they_sum_in(step: Any) -> None:
    products = [one for one, _ in equations(step[0]) if one.primitive.name == "dot_general"]
    sums = [one.params["preferred_element_type"] for one in products]
    assert len(products) > 20 and None not in sums, "a product without a stated result takes what it gets"
    for one, result in zip(products, sums, strict=True):
        assert HALF in dtypes(one), f"a product of float32 alone: {one}"
        # A gradient that arrives as float32 (of attention's scores) is not rounded before its product.
        assert FULL not in dtypes(one) or result == FULL, one
    assert {jnp.dtype(result) for result in sums} == {HALF, FULL}


def test_softmax_norms_angles_and_reductions_are_float32(step: Any) -> None:
    seen = set()
    for one, _ in equations(step[0]):
        name = one.primitive.name
        if name in WIDE or name.startswith(("reduce_", "cum", "scatter-add", "psum")):
            assert HALF not in dtypes(one), f"in bfloat16: {one}"
            seen.add(name)
    assert {"exp", "log", "rsqrt", "cos", "logistic", "reduce_sum", "reduce_max", "scatter-add"} <= seen


def test_parameters_and_moments_stay_float32(step: Any) -> None:
    state, metrics = step[1]
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.optimizer))} == {FULL, jnp.dtype("int32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {FULL}
    assert metrics["loss_sums"].dtype == metrics["grad_norm"].dtype == FULL
