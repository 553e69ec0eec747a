"""Dtypes of the real bfloat16 step, read from its jaxpr: matrix products, reductions, what needs float32, the state."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxprs import equations
from trainkit import model_of, place, program_of, random_batch, recipe_of, start

from ipt_jax.train.step import gradients

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


@pytest.mark.parametrize(("reduce", "dtype"), [("auto", HALF), ("float32", FULL), ("bfloat16", HALF)])
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_gradients_are_reduced_as_the_recipe_says(reduce: str, dtype: Any, mesh: dict[str, int]) -> None:
    train = {"compute_dtype": "bfloat16", "reduce_dtype": reduce}
    program = program_of(recipe_of(mesh=mesh, train=train), model_of(), 8)
    step = jax.make_jaxpr(program.step.__wrapped__)(program.state, program.batch)
    scattered = {dtypes(one)[0] for one, _ in equations(step) if one.primitive.name == "reduce_scatter"}
    gathered = {dtypes(one)[0] for one, _ in equations(step) if one.primitive.name == "all_gather"}
    assert (scattered, gathered) == ({dtype}, {HALF})


@pytest.mark.parametrize(("reduce", "rounded"), [("bfloat16", True), ("float32", False)])
def test_a_float32_sum_of_gradients_is_kept(reduce: str, rounded: bool) -> None:
    """Sums over eight devices of a split weight's gradients: all bfloat16 numbers, or not."""
    train = {"compute_dtype": "bfloat16", "reduce_dtype": reduce}
    made = program_of(recipe_of(mesh={"fsdp": 8}, train=train), model_of(), 8)
    find = functools.partial(
        gradients, config=made.model, shape=made.shape, mesh=made.mesh, shardings=made.shardings.params
    )
    grads, _ = jax.jit(find)(start(made).params, place(made, random_batch(16, 32, 104)))
    for found in (grads["embedding"], grads["layers"]["query"], grads["head"]):
        assert bool((found == found.astype(HALF).astype(FULL)).all()) == rounded


def test_parameters_and_moments_stay_float32(step: Any) -> None:
    state, metrics = step[1]
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.optimizer))} == {FULL, jnp.dtype("int32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {FULL}
    assert metrics["loss_sums"].dtype == metrics["grad_norm"].dtype == FULL
