"""Batches of a plan, read ahead: a Grain MapDataset whose element i is what one host feeds at step i.

The element at a step is a pure function of (plan, step, host, hosts), so there is no state to save: a run goes on from
its step on any number of hosts and sees the same global batches. This module imports no jax; Grain, imported on the
first call, uses jax's tree functions where jax is installed.
"""

from collections.abc import Iterator

import numpy as np

from ipt_jax.corpus.settings import UserError
from ipt_jax.data.plan import Plan

READ_THREADS = 4
AHEAD_BYTES = 256 << 20  # most memory that batches read ahead may take, beyond the two that overlap with a step
AHEAD_STEPS = 8
TOKEN_BYTES = 5 * 4 + 1  # of a row's fields


class HostBatches:
    """Grain data source: element `step` is the rows of `host` of the global batch of that step."""

    def __init__(self, plan: Plan, *, rows_per_step: int, host: int, hosts: int):
        self._plan, self._rows_per_step = plan, rows_per_step
        self._rows = rows_per_step // hosts
        self._first = host * self._rows

    def __len__(self) -> int:
        return -(-self._plan.rows // self._rows_per_step)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        first = int(step) * self._rows_per_step + self._first
        return self._plan.batch(range(first, first + self._rows))

    def __repr__(self) -> str:
        return f"HostBatches(rows={self._rows}, plan={self._plan.fingerprint[:12]})"


def batches(
    plan: Plan, *, start_step: int, rows_per_step: int, host: int = 0, hosts: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of this host from `start_step` to the plan's end: arrays [rows_per_step / hosts, T] by field.

    The last batch is filled with rows of masked padding.
    """
    import grain

    if rows_per_step % hosts:
        raise UserError(
            f"a batch of {rows_per_step} rows cannot be shared by {hosts} hosts; "
            f"make train.batch_tokens a multiple of {hosts} x {plan.settings.seq_len} tokens"
        )
    source = HostBatches(plan, rows_per_step=rows_per_step, host=host, hosts=hosts)
    if start_step >= len(source):
        return iter(())
    batch_bytes = rows_per_step // hosts * plan.settings.seq_len * TOKEN_BYTES
    ahead = max(min(AHEAD_STEPS, AHEAD_BYTES // batch_bytes), 2)
    options = grain.ReadOptions(num_threads=min(READ_THREADS, ahead), prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.source(source)[start_step:].to_iter_dataset(options))
