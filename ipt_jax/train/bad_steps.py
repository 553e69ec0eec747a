"""Steps that go wrong: spikes of the loss, divergence, and losses or gradients that are not finite.

Guarantees: the update of a step that is not finite is skipped on all hosts (`ipt_jax.train.step`), and counted; after
`train.max_bad_steps` in a row the run ends with `bad_steps.json`, which names the documents, parameters and layers at
fault. A spike is reported; with `train.on_spike: skip` its update is skipped like that of a step that is not finite.
The limit follows from losses that every process has fetched, so all decide alike without another synchronization.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ipt_jax.core.files import write_whole
from ipt_jax.data.loader import batches
from ipt_jax.data.plan import Plan
from ipt_jax.model.decoder import Params
from ipt_jax.parallel.mesh import batch_sharding, host_slot, place_batch
from ipt_jax.parallel.rules import param_name
from ipt_jax.train.step import Program, gradients

WINDOW, SPIKE, FEW = 128, 10.0, 8  # steps, deviations, steps that are too few for a deviation
RISE = 0.1  # of the median; a smaller rise is never a spike


class LossWindow:
    """The losses of the last steps: `losses` are (step, loss). `lag`: more steps to keep, for limits of the past."""

    def __init__(self, losses: Iterable[tuple[int, float]] = (), lag: int = 0) -> None:
        self.losses = deque(losses, maxlen=WINDOW + lag)
        self._above: list[float] = []
        self._best, self._diverges = math.inf, False

    def limit(self, through: int) -> float:
        """What a loss must exceed to be a spike, from the losses up to step `through`: their median, SPIKE deviations
        and at least a tenth above it."""
        losses = self._last(through)
        if len(losses) < FEW:
            return 1.5 * max(losses, default=math.inf)
        median = statistics.median(losses)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in losses)
        return median + max(SPIKE * deviation, RISE * abs(median))

    def add(self, step: int, loss: float) -> str | None:
        """A line to report: a spike begins or ends at this step, or the loss diverges."""
        spike, before = loss > self.limit(step), self._last(step)
        self.losses.append((step, loss))
        if spike:
            self._above.append(loss)
            if len(self._above) > 1:
                return None
            median = statistics.median(before)
            return f"warning: step {step}: loss {loss:.3f}, median of the last {len(before)} steps {median:.3f}"
        if self._above:
            steps, most = len(self._above), max(self._above)
            self._above = []
            return f"step {step}: loss {loss:.3f} is back near the median after {steps} steps of up to {most:.3f}"
        return self._divergence(step)

    def _divergence(self, step: int) -> str | None:
        """A line when the median of the window has risen above its lowest, which no single spike does."""
        losses = self._last(step)
        if len(losses) < WINDOW:
            return None
        median = statistics.median(losses)
        self._best = min(self._best, median)
        before, self._diverges = self._diverges, median > self._best + RISE * abs(self._best)
        if before or not self._diverges:
            return None
        return (
            f"warning: step {step}: the loss diverges: median of the last {WINDOW} steps {median:.3f}, "
            f"the lowest was {self._best:.3f}"
        )

    def _last(self, through: int) -> list[float]:
        return [loss for step, loss in self.losses if step <= through][-WINDOW:]


@jax.jit
def all_finite(params: Params) -> jax.Array:
    """Whether every parameter is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def write_dump(path: Path, steps: list[int], params: Params, plan: Plan, program: Program) -> None:
    """Writes the documents of `steps`, and the norms of parameters and of the last one's gradients, per layer."""
    host, hosts = host_slot(program.mesh)
    rows = next(batches(plan, start_step=steps[-1] - 1, rows_per_step=program.rows, host=host, hosts=hosts))
    batch = place_batch(rows, program.shape.accumulation, batch_sharding(program.mesh))
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
        found["documents"] = [row for step in steps for row in plan.document_ids(step)]
        write_whole(path, json.dumps(found, indent=1, ensure_ascii=False).encode())
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(
            "bad steps are written"
        )  # the others would end, and the first one with them


def _norms(tree: Params) -> Iterator[tuple[str, list[str]]]:
    """The L2 norm of each tensor, one per layer where layers are stacked; as text, since JSON has no NaN."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = param_name(path)
        dims = tuple(range(1 if name.startswith("layers.") else 0, leaf.ndim))
        yield name, [f"{norm:.4g}" for norm in np.atleast_1d(jnp.sqrt(jnp.square(leaf).sum(dims)))]
