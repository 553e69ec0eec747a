"""The chunked loss holds the head's gradient and at most two chunks of logits, by the compiler's own count."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from ipt_jax.train.loss import cross_entropy

ROWS, LENGTH, D, VOCAB, CHUNK = 2, 2048, 256, 32_000, 256


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temporaries(dtype: str) -> None:
    hidden = jax.ShapeDtypeStruct((ROWS, LENGTH, D), dtype)
    head = jax.ShapeDtypeStruct((D, VOCAB), dtype)
    labels = [jax.ShapeDtypeStruct((ROWS, LENGTH), kind) for kind in (jnp.int32, jnp.bool_, jnp.int32)]
    loss = functools.partial(cross_entropy, chunk=CHUNK)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    memory = run.lower(hidden, head, *labels).compile().memory_analysis()
    allowed = D * VOCAB * 4 + 2 * CHUNK * VOCAB * 4
    if dtype == "bfloat16":  # a CPU multiplies bfloat16 by way of float32 copies of both; accelerators make none
        allowed += D * (VOCAB + CHUNK) * 4 + 4096
    assert memory.temp_size_in_bytes <= allowed
