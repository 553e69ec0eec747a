"""Walking a jaxpr: every equation with the number of times that it runs, loops and calls included."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """(equation, how often it runs) of a jaxpr and of all inside it; the body of a scan runs `length` times."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        assert equation.primitive.name != "while", "a while loop runs an unknown number of times"
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        yield equation, times
        for value in equation.params.values():
            for part in value if isinstance(value, list | tuple) else [value]:
                if isinstance(part, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr):
                    yield from equations(part, inner)


def product_flops(jaxpr: Any) -> int:
    """Multiplications and additions of all matrix products."""
    return sum(times * _flops(equation) for equation, times in equations(jaxpr) if _is_product(equation))


def _is_product(equation: Any) -> bool:
    assert equation.primitive.name not in ("conv_general_dilated", "ragged_dot"), "a product that is not counted"
    return equation.primitive.name == "dot_general"


def _flops(product: Any) -> int:
    """Of one dot_general: twice the size of its result times the sizes that it sums over."""
    (contracted, _), _ = product.params["dimension_numbers"]
    summed = math.prod(product.invars[0].aval.shape[dim] for dim in contracted)
    return 2 * product.outvars[0].aval.size * summed
