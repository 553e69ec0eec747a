"""Steps that go wrong: spikes of the loss, and losses or gradients that are not finite.

Guarantees: the update of a step that is not finite is skipped on all hosts (`ipt_jax.train.step`), and counted; after
`train.max_bad_steps` in a row the run ends with `bad_steps.json`, which names the parameters and layers at fault. A
spike is reported and trained on.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ipt_jax.core.files import write_whole
from ipt_jax.model.decoder import Params
from ipt_jax.parallel.rules import param_name
from ipt_jax.train.step import Program, gradients

WINDOW, SPIKE = 128, 10.0  # steps, deviations


class LossWindow:
    """The last losses, and whether a new one is a spike: above their median by SPIKE deviations and a tenth of it."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._above: list[float] = []

    def add(self, step: int, loss: float) -> str | None:
        """A line to report: a spike begins or ends at this step."""
        if len(self._losses) < WINDOW // 4:
            self._losses.append(loss)
            return None
        median = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in self._losses)
        if loss > median + max(SPIKE * deviation, 0.1 * abs(median)):
            self._above.append(loss)
            self._losses.append(loss)
            if len(self._above) > 1:
                return None
            return f"warning: step {step}: loss {loss:.3f}, median of the last {len(self._losses)} steps {median:.3f}"
        self._losses.append(loss)
        if not self._above:
            return None
        steps, most = len(self._above), max(self._above)
        self._above = []
        return f"step {step}: loss {loss:.3f} is back near the median after {steps} steps of up to {most:.3f}"


@jax.jit
def all_finite(params: Params) -> jax.Array:
    """Whether every parameter is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def write_dump(path: Path, steps: list[int], params: Params, batch: dict[str, jax.Array], program: Program) -> None:
    """Writes the norms of parameters and gradients, per layer, with the batch of the last step of `steps`."""
    compute = functools.partial(
        gradients, config=program.model, shape=program.shape, mesh=program.mesh, shardings=program.shardings.params
    )
    grads, sums = jax.jit(compute)(params, batch)
    found = {
        "steps": steps,
        "loss_sums_by_kind": [str(value) for value in np.asarray(sums["loss"])],
        "gradient_norms": dict(_norms(grads)),
        "parameter_norms": dict(_norms(params)),
    }
    if jax.process_index() == 0:
        write_whole(path, json.dumps(found, indent=1).encode())


def _norms(tree: Params) -> Iterator[tuple[str, list[str]]]:
    """The L2 norm of each tensor, one per layer where layers are stacked; as text, since JSON has no NaN."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = param_name(path)
        dims = tuple(range(1 if name.startswith("layers.") else 0, leaf.ndim))
        yield name, [f"{norm:.4g}" for norm in np.atleast_1d(jnp.sqrt(jnp.square(leaf).sum(dims)))]
