"""Batches of a plan, read ahead: a Grain MapDataset whose element i is the input of one host at consecutive steps.

The rows of a step are a pure function of (plan, step, host, hosts), so there is no state to save: a run resumes from
its step on any number of hosts and sees the same global batches. An element has about 262,144 tokens of this host, so
that documents share reads. This module imports no jax; Grain, imported on the first call, uses the tree functions of
jax if it is installed.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np

from ipt_jax.core.errors import UserError
from ipt_jax.data.plan import Plan

READ_THREADS = 2  # with several hosts, which wait for pages; with one host a second thread does not help
READ_TOKENS = 1 << 18  # per element and host: more does not fit into the caches of the processor
READS_TO_LOAD = 64  # elements ahead whose blocks are read: on a network disk reads are slow
READS_TOGETHER = 4  # elements whose blocks are looked up in one call
LOADING_THREADS = 6
QUICK_SECONDS = 0.01  # blocks that load faster come from memory and are not read ahead
AHEAD_BYTES = 256 << 20  # maximum memory of elements read ahead, beyond the two that overlap with a step
AHEAD_READS = 4  # more does not fit into the caches; blocks are read further ahead
TOKEN_BYTES = 5 * 4 + 1  # of all fields


class HostReads:
    """Grain data source: element i is the rows of `host` at steps start + [i, i + 1) * steps of the plan."""

    def __init__(self, plan: Plan, *, start: int, steps: int, rows_per_step: int, host: int, hosts: int):
        self._plan, self._start, self.steps = plan, start, steps
        self._rows_per_step, self._host, self._hosts = rows_per_step, host, hosts
        self._row = plan.first_row(start)
        self.stop = start + max(-(-(plan.rows - self._row) // rows_per_step), 0)
        self._ahead = ThreadPoolExecutor(LOADING_THREADS, thread_name_prefix="ahead")
        self._loaded, self._lock = 0, Lock()
        self._quick = False

    def __len__(self) -> int:
        return max(-(-(self.stop - self._start) // self.steps), 0)

    def __getitem__(self, read: int) -> dict[str, np.ndarray]:
        """Each field's array [steps, rows_per_step / hosts, T]."""
        rows = self._rows(int(read))
        if self._hosts == 1 and self._quick:
            self._load(rows.ravel().tolist())
        elif self._hosts == 1:
            self._load_ahead(int(read))
        made = self._plan.batch(rows.ravel().tolist(), by_block=self._hosts == 1)
        return {name: array.reshape(*rows.shape, -1) for name, array in made.items()}

    def _load_ahead(self, read: int) -> None:
        """Reads the blocks of later elements in threads. An error there is raised when their own read fails."""
        with self._lock:
            first = max(self._loaded, read)
            self._loaded = max(first, min((read + READS_TO_LOAD) // READS_TOGETHER * READS_TOGETHER, len(self)))
            groups = range(first, self._loaded, READS_TOGETHER)
        for group in groups:
            rows = [self._rows(one).ravel() for one in range(group, min(group + READS_TOGETHER, self._loaded))]
            self._ahead.submit(self._load, np.concatenate(rows).tolist())

    def _load(self, rows: list[int]) -> None:
        """Reads the blocks of these rows, and measures whether reading ahead is necessary."""
        began = time.perf_counter()
        self._plan.load_blocks(rows)
        self._quick = time.perf_counter() - began < QUICK_SECONDS

    def _rows(self, read: int) -> np.ndarray:
        """The rows of this host at the steps of an element, up to the last step."""
        first = self._start + read * self.steps
        steps = np.arange(first, min(first + self.steps, self.stop)) - self._start
        mine = self._rows_per_step // self._hosts
        return self._row + steps[:, None] * self._rows_per_step + self._host * mine + np.arange(mine)

    def __repr__(self) -> str:
        return f"HostReads(steps={self.steps}, plan={self._plan.fingerprint[:12]})"


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
    step_tokens = rows_per_step // hosts * plan.settings.seq_len
    steps = max(READ_TOKENS // step_tokens, 1)
    source = HostReads(plan, start=start_step, steps=steps, rows_per_step=rows_per_step, host=host, hosts=hosts)
    if not len(source):
        return iter(())
    ahead = max(min(AHEAD_READS, AHEAD_BYTES // (steps * step_tokens * TOKEN_BYTES)), 2)
    options = grain.ReadOptions(num_threads=READ_THREADS if hosts > 1 else 1, prefetch_buffer_size=ahead)
    return _steps(iter(grain.MapDataset.source(source).to_iter_dataset(options)))


def _steps(reads: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    for read in reads:
        for step in range(len(read["tokens"])):
            yield {name: array[step] for name, array in read.items()}
