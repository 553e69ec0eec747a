"""Log-probabilities of continuations, with every shared beginning computed once.

The token sequences of a call are packed into rows as prefix trees: sorted, each sequence is appended to the row from
where it leaves the one before it, so that the choices of a question, and questions that share their examples, share the
tokens that they begin with. A token sees the tokens that precede it in its own sequence, at their own positions.
`ends` holds this: a key at index s is seen by the queries from s to ends[s] - 1. Choices of one token add none.

Guarantees: a score does not depend on the other sequences of the call, nor on padding, apart from rounding; any mesh
and any number of processes give the same scores, apart from rounding. Rows have few sizes, and a batch always has
`batch_tokens` tokens but for the last ones, so that few programs are compiled. The longest rows run first.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ipt_jax.model.attention import dense
from ipt_jax.model.config import ModelConfig
from ipt_jax.model.decoder import Execution, Mistral, Params, abstract_params, logical_axes
from ipt_jax.parallel.fsdp import OnDevice
from ipt_jax.parallel.mesh import ROWS, row_shards
from ipt_jax.parallel.rules import place_params

Pair = tuple[list[int], list[int]]  # ids of a context and of its continuation, neither empty
ROW_TOKENS = 256  # of a row, unless a sequence is longer
GROWTH = 4  # a row grows to so many times its first sequence, for sequences that share half of their tokens or more
CHUNK = 512  # continuation tokens whose logits exist at a time
IN_FLIGHT = 2  # batches that are started before the scores of an earlier one are fetched


class Score(NamedTuple):
    """Sum of the log-probabilities of a continuation's tokens, their number, and whether each is the greedy choice."""

    logprob: float
    tokens: int
    greedy: bool

    def __float__(self) -> float:
        return self.logprob


@dataclass
class PackedRow:
    """Sequences as a prefix tree, in depth-first order."""

    first: int  # tokens of the first sequence
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # of each token: the index after its last descendant
    path: list[int] = field(default_factory=list)  # indices of the newest sequence's tokens
    places: list[int] = field(default_factory=list)  # of each continuation token: the index that predicts it
    targets: list[int] = field(default_factory=list)
    owners: list[tuple[int, int]] = field(default_factory=list)  # (pair, continuation tokens)

    def has_room(self, tokens: int, shared: int, targets: int) -> bool:
        grown = len(self.tokens) + tokens - shared
        worthwhile = 2 * shared >= tokens
        limit = max(ROW_TOKENS, GROWTH * self.first if worthwhile else self.first)
        return grown <= limit and len(self.targets) + targets <= max(ROW_TOKENS, grown)

    def add(self, number: int, pair: Pair, ids: list[int], shared: int) -> None:
        """Appends pair `number`; `ids` are its input tokens, `shared` of which are those of the newest sequence."""
        self.close(shared)
        start = len(self.tokens)
        self.path += range(start, start + len(ids) - shared)
        self.tokens += ids[shared:]
        self.positions += range(shared, len(ids))
        self.ends += [0] * (len(ids) - shared)
        context, continuation = pair
        self.places += self.path[len(context) - 1 :]
        self.targets += continuation
        self.owners.append((number, len(continuation)))

    def close(self, shared: int = 0) -> None:
        """Ends the newest sequence's tokens from depth `shared` on: what follows does not see them."""
        for index in self.path[shared:]:
            self.ends[index] = len(self.tokens)
        del self.path[shared:]


def pack(pairs: Sequence[Pair]) -> list[PackedRow]:
    """Rows with all pairs, each pair in one row, the longest row first."""
    inputs = [context + continuation[:-1] for context, continuation in pairs]  # the last token predicts nothing asked
    rows: list[PackedRow] = []
    previous: list[int] = []
    for number in sorted(range(len(pairs)), key=inputs.__getitem__):
        ids = inputs[number]
        shared = _shared(previous, ids)
        if not rows or not rows[-1].has_room(len(ids), shared, len(pairs[number][1])):
            rows.append(PackedRow(first=len(ids)))
            shared = 0
        rows[-1].add(number, pairs[number], ids, shared)
        previous = ids
    for row in rows:
        row.close()
    return sorted(rows, key=lambda row: -len(row.tokens))


def _shared(left: list[int], right: list[int]) -> int:
    """The number of tokens that both begin with."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[low:middle] == right[low:middle] else (low, middle - 1)
    return low


def row_size(tokens: int) -> int:
    """A multiple of 64 up to 512, then one of four sizes between powers of two, with at most a fifth of padding."""
    step = max(64, (1 << (tokens - 1).bit_length()) // 8)
    return -(-tokens // step) * step


class Scorer:
    """Scores pairs with the parameters of one model, on one device or on a mesh.

    `params` are used where they are: on a mesh, they are placed as `place_params` says. `compute_dtype` is that of
    matrix products; None: that of the parameters.
    """

    def __init__(
        self, config: ModelConfig, params: Params, *, mesh: Mesh | None = None, compute_dtype: Any = None,
        batch_tokens: int = 4096,
    ):  # fmt: skip
        self.params, self.mesh, self.batch_tokens = params, mesh, batch_tokens
        self.config = config.model_copy(update={"bos_id": None, "eos_id": None})  # what compiled code depends on
        self.dtype = jnp.dtype(compute_dtype or params["norm"].dtype)
        self.shards = 1 if mesh is None else row_shards(mesh)

    def score(self, pairs: Sequence[Pair]) -> list[Score]:
        found: dict[int, Score] = {}
        for _, scores in self.batches(pack(pairs)):
            found |= scores
        return [found[number] for number in range(len(pairs))]

    def batches(self, rows: list[PackedRow]) -> Iterator[tuple[int, dict[int, Score]]]:
        """(tokens, {pair: score}) of one batch after another. Every process passes the same rows."""
        started: deque[tuple[list[list[PackedRow]], Any]] = deque()
        at = 0
        while at < len(rows):
            size = row_size(max(ROW_TOKENS // 4, len(rows[at].tokens)))
            count = self._rows_per_batch(size, len(rows) - at)
            batch, at = rows[at : at + count], at + count
            parts = [batch[shard :: self.shards] for shard in range(self.shards)]  # of each device, alike in length
            started.append((parts, self._start(parts, -(-count // self.shards), size)))
            if len(started) > IN_FLIGHT:
                yield _fetched(*started.popleft())
        while started:
            yield _fetched(*started.popleft())

    def _rows_per_batch(self, size: int, left: int) -> int:
        """Rows of `size` tokens that fill a batch; a quarter, a sixteenth ... of them where no more are left."""
        count = max(1, self.batch_tokens // size // self.shards)
        while count > 1 and left <= -(-count // 4) * self.shards:
            count = -(-count // 4)
        return count * self.shards

    def _start(self, parts: list[list[PackedRow]], height: int, size: int) -> Any:
        """Starts the computation of `height` rows of `size` tokens for each device."""
        most, longest = -(-height * size // CHUNK) * CHUNK, 0
        tokens, positions, ends = (np.zeros((len(parts) * height, size), np.int32) for _ in range(3))
        places, targets = (np.zeros((len(parts), most), np.int32) for _ in range(2))
        for device, part in enumerate(parts):
            filled = 0
            for offset, row in enumerate(part):
                n, m = len(row.tokens), len(row.targets)
                line = device * height + offset
                tokens[line, :n], positions[line, :n], ends[line, :n] = row.tokens, row.positions, row.ends
                places[device, filled : filled + m] = np.array(row.places) + offset * size
                targets[device, filled : filled + m] = row.targets
                filled += m
            longest = max(longest, filled)
        batch = {
            "tokens": tokens, "positions": positions, "ends": ends, "places": places.ravel(), "targets": targets.ravel()
        }  # fmt: skip
        chunks = np.int32(-(-longest // CHUNK))
        return _logprobs(
            self.params, _placed(batch, self.mesh), chunks, config=self.config, mesh=self.mesh, dtype=self.dtype
        )


def _placed(batch: dict[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """Rows split over the mesh; every process has all of them."""
    if mesh is None:
        return batch
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    return {name: jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__) for name, rows in batch.items()}


def _fetched(parts: list[list[PackedRow]], started: tuple[Array, Array]) -> tuple[int, dict[int, Score]]:
    logprobs, greedy = (np.asarray(found).reshape(len(parts), -1) for found in started)
    scores, tokens = {}, 0
    for device, part in enumerate(parts):
        at = 0
        for row in part:
            tokens += len(row.tokens)
            for number, count in row.owners:
                mine = slice(at, at + count)
                at += count
                scores[number] = Score(math.fsum(logprobs[device, mine]), count, bool(greedy[device, mine].all()))
    return tokens, scores


@partial(jax.jit, static_argnames=("config", "mesh", "dtype"))
def _logprobs(
    params: Params, batch: dict[str, Any], chunks: Array, *, config: ModelConfig, mesh: Mesh | None, dtype: Any
) -> tuple[Array, Array]:
    """Of each target: its log-probability (float32) and whether it is the most likely token, on every process."""
    if mesh is None:
        return _of_device(params, batch, chunks, config=config, device=None, dtype=dtype)
    device = OnDevice(mesh, config.hidden_size)
    of_device = partial(_of_device, config=config, device=device, dtype=dtype)
    if device.manual:
        shardings = place_params(logical_axes(config), abstract_params(config), mesh).shardings
        specs = jax.tree.map(lambda sharding: device.spec(sharding.spec), shardings)
        rows = device.spec(PartitionSpec(ROWS))
        of_device = jax.shard_map(
            of_device, mesh=mesh, axis_names=device.manual, check_vma=False,
            in_specs=(specs, rows, PartitionSpec()), out_specs=rows,
        )  # fmt: skip
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(of_device(params, batch, chunks), everywhere)


def _of_device(
    params: Params, batch: dict[str, Any], chunks: Array, *, config: ModelConfig, device: OnDevice | None, dtype: Any
) -> tuple[Array, Array]:
    """Of a device's rows [B, T] and its targets [n], a multiple of CHUNK, of which `chunks` times CHUNK count."""
    execution = Execution(compute_dtype=dtype, attention=partial(_attend, batch["positions"], batch["ends"]))
    tables: Params = {}
    if device is not None:
        axes = logical_axes(config)
        tables = {
            name: device.gather(params[name], axes[name], dtype) for name in ("embedding", "head") if name in params
        }
        execution = Execution(
            compute_dtype=dtype, attention=execution.attention, constrain=device.constrain, gather=device.gather
        )
    model = Mistral.from_params(config, {**params, **tables})
    hidden = model.hidden(batch["tokens"], positions=batch["positions"], execution=execution)
    hidden = hidden.reshape(-1, config.hidden_size)
    head = model.output_projection().astype(hidden.dtype)

    def of_chunk(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        places, targets = (
            jax.lax.dynamic_slice_in_dim(batch[name], i * CHUNK, CHUNK) for name in ("places", "targets")
        )
        logits = jnp.matmul(hidden[places], head, preferred_element_type=jnp.float32)  # [CHUNK, V]
        peak = logits.max(-1, keepdims=True)
        index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        # sums over an iota instead of gathers: the vocabulary may be split over devices
        chosen = jnp.where(index == targets[:, None], logits, 0.0).sum(-1)
        best = jnp.where(logits == peak, index, config.vocab_size).min(-1)  # the first of equal ones
        logprob = (chosen - peak[:, 0]) - jnp.log(jnp.exp(logits - peak).sum(-1))
        update = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * CHUNK, axis=0)
        return update(found[0], logprob), update(found[1], best == targets)

    nothing = jnp.zeros(batch["targets"].shape, jnp.float32), jnp.zeros(batch["targets"].shape, bool)
    return jax.lax.fori_loop(0, chunks, of_chunk, nothing)


def _attend(
    positions: Array, ends: Array, q: Array, k: Array, v: Array, *, window: int | None, segment_ids: None = None
) -> Array:
    """Attention of q [B, T, N, H] over k, v [B, T, K, H], each query over its ancestors; see the module."""
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, S, H]
    step = 64 if T <= 512 else 256  # queries at a time, each against the keys up to the last of them
    parts = []
    for start in range(0, T, step):
        stop = min(start + step, T)
        query = jnp.arange(start, stop)[None, :, None]
        seen = (jnp.arange(stop)[None, None, :] <= query) & (query < ends[:, None, :stop])  # [B, T, S]
        if window is not None:
            seen &= positions[:, start:stop, None] - positions[:, None, :stop] < window
        parts.append(dense(q[:, :, :, start:stop], k[:, :, :stop], v[:, :, :stop], seen))
    return jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
