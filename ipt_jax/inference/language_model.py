"""The Python interface: a model that scores and generates.

`ipt_jax.load(path)` returns a `LanguageModel`. Guarantees: a text prompt is encoded as BOS (where the tokenizer has
one) and the text's tokens, a list of ids is used unchanged; results have the type of the prompts and no closing EOS;
a result does not depend on the other prompts of the call, apart from rounding. `BatchGenerator` serves callers whose
prompts arrive one by one. Inputs are padded to a few sizes, so that few programs are compiled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from ipt_jax.core.checkpoint_path import resolve_checkpoint
from ipt_jax.core.errors import UserError
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from ipt_jax.hf.config import read_model_config
from ipt_jax.hf.params import load_params
from ipt_jax.inference import generate
from ipt_jax.inference.scoring import Score, Scorer
from ipt_jax.model.config import ModelConfig
from ipt_jax.model.decoder import Mistral, Params, abstract_params, logical_axes, params_of
from ipt_jax.parallel.mesh import row_shards
from ipt_jax.parallel.rules import place_params

PromptInput = str | list[int]
CACHE_BYTES = 512 * 2**20  # key-value cache of `LanguageModel.generate`


@dataclass(frozen=True)
class Generation:
    """The completion of request `number`: `ids` without EOS; `finish_reason` is stop or length."""

    number: int
    ids: list[int]
    finish_reason: str


class LanguageModel:
    """A model and its tokenizer, where there is one. Computes in the dtype of the parameters.

    `model` is the Flax NNX module: call it, differentiate it, or update its parameters. The methods here use the
    parameters that it holds at the time of the call. With a `mesh`, the parameters are on it, placed as `place_params`
    says, and `loglikelihood` and `generate` use all of its devices; every process makes the same calls. `compute_dtype`
    is that of the matrix products of `loglikelihood`.
    """

    def __init__(
        self, config: ModelConfig, params: Params, tokenizer: Tokenizer | None = None, *, mesh: Mesh | None = None,
        compute_dtype: Any = None,
    ):  # fmt: skip
        self.config, self.tokenizer, self.mesh, self.compute_dtype = config, tokenizer, mesh, compute_dtype
        self.compiled = config.model_copy(update={"bos_id": None, "eos_id": None})  # what compiled code depends on
        self.model = Mistral.from_params(config, jax.tree.map(jnp.asarray, params))

    @property
    def params(self) -> Params:
        """The parameters of `model` as a nested dict of arrays."""
        return params_of(self.model)

    @property
    def dtype(self) -> Any:
        return self.model.norm.dtype

    def logits(self, tokens: Any, segment_ids: Any = None) -> np.ndarray:
        """float32 [B, T, V] of tokens [B, T], or [T, V] of one row; compiled once per shape."""
        rows = np.atleast_2d(np.asarray(tokens, np.int32))
        segments = None if segment_ids is None else jnp.asarray(np.atleast_2d(np.asarray(segment_ids, np.int32)))
        _check_ids("tokens", rows.ravel(), self.config.vocab_size)
        out = np.asarray(_logits(self.params, jnp.asarray(rows), segments, config=self.compiled), np.float32)
        return out if np.ndim(tokens) == 2 else out[0]

    def loglikelihood(self, prompts: Sequence[PromptInput], continuations: Sequence[PromptInput]) -> list[Score]:
        """The score of each continuation after its prompt; the two are encoded separately."""
        _check_list("prompts", prompts)
        _check_list("continuations", continuations)
        if len(prompts) != len(continuations):
            raise UserError(f"loglikelihood: {len(prompts)} prompts for {len(continuations)} continuations; pass pairs")
        rows = [
            (self.encode(prompt), self.encode(continuation, continuing=True))
            for prompt, continuation in zip(prompts, continuations, strict=True)
        ]
        for number, (prompt, continuation) in enumerate(rows):
            if not prompt:
                raise UserError(f"loglikelihood: prompt {number} has no tokens; a continuation needs one before it")
            self._fits(number, len(prompt) + len(continuation) - 1, "prompt and continuation but its last token")
        return self.scorer().score(rows)

    def scorer(self, batch_tokens: int = 4096) -> Scorer:
        """What computes log-probabilities of this model, `batch_tokens` tokens at a time."""
        return Scorer(
            self.config, self.params, mesh=self.mesh, compute_dtype=self.compute_dtype, batch_tokens=batch_tokens
        )

    def generate(
        self,
        prompts: Sequence[PromptInput],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        eos: bool = True,
    ) -> list[Any]:
        """A completion of each prompt: a text for a text, ids for ids. Prompt i draws from (seed, i)."""
        _check_list("prompts", prompts)
        _check_sampling(max_new_tokens, temperature)
        if not prompts:
            return []
        ids = [self.encode(prompt) for prompt in prompts]
        for number, prompt in enumerate(ids):
            self._fits(number, len(prompt) + max_new_tokens, f"prompt and {max_new_tokens} new tokens")
        length = length_bucket(max(len(prompt) for prompt in ids) + max_new_tokens)
        generator = BatchGenerator(self, self.batch_rows(len(ids), length), length, max_new_tokens, eos=eos)
        requests = [(prompt, (seed << 32) + number) for number, prompt in enumerate(ids)]
        done = generator.run(requests, temperature=temperature)
        return [
            self._tokenizer().decode(one.ids) if isinstance(prompt, str) else one.ids
            for prompt, one in zip(prompts, done, strict=True)
        ]

    def encode(self, text: PromptInput, continuing: bool = False) -> list[int]:
        """Ids of a prompt, or of what continues one; a list passes through."""
        if not isinstance(text, str):
            _check_ids("prompts", text, self.config.vocab_size)
            return list(text)
        tokenizer = self._tokenizer()
        start = [] if continuing or tokenizer.bos_id is None else [tokenizer.bos_id]
        return start + tokenizer.encode(text, continuing=continuing)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer files; pass token ids, or load a directory with a tokenizer")
        return self.tokenizer

    def _fits(self, number: int, tokens: int, what: str) -> None:
        if tokens > self.config.max_positions:
            raise UserError(
                f"request {number}: {what} have {tokens} tokens, the model's context has {self.config.max_positions}"
                "; shorten it"
            )

    def batch_rows(self, count: int, length: int) -> int:
        """Rows of a batch of `count` prompts: one per prompt, on each device up to 64 and to CACHE_BYTES."""
        c = self.config
        row_bytes = 2 * c.layers * c.kv_heads * c.head_dim * length * jnp.dtype(self.dtype).itemsize
        shards = 1 if self.mesh is None else row_shards(self.mesh)
        rows = min(_power_of_two(-(-count // shards)), 64, max(1, CACHE_BYTES // row_bytes))
        return rows * shards


class BatchGenerator:
    """Continuous batching over fixed shapes: a prompt is admitted when another one ends.

    `add` requests, then `step` until nothing is pending; each step returns the requests that ended in it. A request's
    tokens depend on its prompt, seed, temperature and limit; the batch changes at most the rounding of its logits.
    `stop(ids)` says whether a row may end after these new tokens; it is asked every STOP_TURNS tokens, so that a row
    may be a few tokens longer.
    """

    def __init__(
        self, model: LanguageModel, batch_rows: int, max_model_len: int, max_new_tokens: int, eos: bool = True,
        stop: Callable[[list[int]], bool] | None = None,
    ):  # fmt: skip
        self.model, self.length, self.max_new_tokens = model, max_model_len, max_new_tokens
        self.eos_ids = model.config.eos_ids if eos else ()
        self.eos = np.array(self.eos_ids or (-1,), np.int32)
        self.arrivals = max(1, batch_rows // 4)  # rows per prefill, and rows that end before the loop returns
        start, self.prefill, self.decode = generate.programs(model.mesh, model.config.kv_heads)
        self.rows = start(model.compiled, batch_rows, max_model_len, max_new_tokens, model.dtype)
        self.stop, self.turns = stop, generate.TURNS if stop is None else generate.STOP_TURNS
        self.owner: list[int | None] = [None] * batch_rows
        self.queue: deque[tuple[int, list[int], int, int, float]] = deque()
        self.added = 0

    @property
    def pending(self) -> int:
        """Requests that have not been returned."""
        return len(self.queue) + sum(owner is not None for owner in self.owner)

    def add(
        self, prompt: list[int], seed: int = 0, *, max_new_tokens: int | None = None, temperature: float = 0.0
    ) -> int:
        """Queues a prompt and returns its number. The limit is cut to the end of the context."""
        if not 0 < len(prompt) < self.length:
            raise UserError(f"a prompt of {len(prompt)} tokens: expected 1 to {self.length - 1} (max_model_len - 1)")
        _check_ids("prompt", prompt, self.model.config.vocab_size)
        _check_sampling(1 if max_new_tokens is None else max_new_tokens, temperature)
        wanted = self.max_new_tokens if max_new_tokens is None else min(max_new_tokens, self.max_new_tokens)
        limit = min(wanted, self.length - len(prompt))
        self.queue.append((self.added, list(prompt), seed, limit, temperature))
        self.added += 1
        return self.added - 1

    def run(self, requests: Sequence[tuple[list[int], int]], temperature: float = 0.0) -> list[Generation]:
        """The completions of (prompt, seed) pairs, in their order."""
        numbers = [self.add(prompt, seed, temperature=temperature) for prompt, seed in requests]
        done: dict[int, Generation] = {}
        while self.pending:
            done |= {completion.number: completion for completion in self.step()}
        return [done[number] for number in numbers]

    def step(self) -> list[Generation]:
        """Fills free places from the queue, generates for a while, and returns the requests that ended."""
        while self.queue and None in self.owner:
            self._admit()
        live = sum(owner is not None for owner in self.owner)
        if not live:
            return []
        enough, turns = np.int32(max(0, live - self.arrivals)), np.int32(self.turns)
        self.rows = self.decode(self.model.params, self.rows, self.eos, enough, turns, config=self.model.compiled)
        return self._collect()

    def _admit(self) -> None:
        places = [place for place, owner in enumerate(self.owner) if owner is None][: self.arrivals]
        taken = [self.queue.popleft() for _ in places[: len(self.queue)]]
        R, T = self.arrivals, min(length_bucket(max(len(prompt) for _, prompt, *_ in taken)), self.length)
        tokens, seeds = np.zeros((R, T), np.int32), np.zeros((R, 2), np.uint32)
        lengths, limits = np.ones(R, np.int32), np.zeros(R, np.int32)
        slots, temperatures = np.full(R, len(self.owner), np.int32), np.zeros(R, np.float32)
        for row, ((number, prompt, seed, limit, temperature), place) in enumerate(zip(taken, places, strict=False)):
            tokens[row, : len(prompt)], lengths[row], limits[row] = prompt, len(prompt), limit
            seeds[row] = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
            slots[row], temperatures[row] = place, temperature
            self.owner[place] = number
        new = generate.Arrivals(tokens, lengths, slots, limits, temperatures, seeds)
        self.rows = self.prefill(self.model.params, self.rows, new, self.eos, config=self.model.compiled)

    def _collect(self) -> list[Generation]:
        live, produced, output = (np.asarray(x) for x in (self.rows.live, self.rows.produced, self.rows.output))
        done, stopped = [], np.array(live)
        for place, number in enumerate(self.owner):
            if number is None:
                continue
            ids = output[place, : produced[place]].tolist()
            ended = bool(ids) and ids[-1] in self.eos_ids
            if live[place] and not (self.stop and self.stop(ids)):
                continue
            cut = ended or bool(live[place])
            done.append(Generation(number, ids[:-1] if ended else ids, "stop" if cut else "length"))
            self.owner[place], stopped[place] = None, False
        if (stopped != live).any():
            self.rows = self.rows._replace(live=stopped)
        return done


@partial(jax.jit, static_argnames="config")
def _logits(params: Params, tokens: Array, segment_ids: Array | None, *, config: ModelConfig) -> Array:
    return Mistral.from_params(config, params)(tokens, segment_ids=segment_ids)


def _check_list(name: str, values: Any) -> None:
    if isinstance(values, str):
        raise UserError(f"{name} is a string; pass a list, such as [{values[:20]!r}]")


def _check_ids(name: str, ids: Any, vocab_size: int) -> None:
    for token in ids:
        if not isinstance(token, int | np.integer) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise UserError(f"{name}: token id {token!r}; expected integers from 0 to {vocab_size - 1}")


def _check_sampling(max_new_tokens: Any, temperature: Any) -> None:
    if not isinstance(max_new_tokens, int | np.integer) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens!r}; expected an integer, 1 or more")
    if not isinstance(temperature, int | float | np.number) or not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature!r}; expected a finite number, 0 or more")


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def length_bucket(n: int) -> int:
    """The next of 64, 96, 128, 192, 256, 384, ...: few shapes to compile, little padding."""
    whole = max(64, _power_of_two(n))
    return whole * 3 // 4 if n <= whole * 3 // 4 and whole > 64 else whole


def load(path: str | Path, dtype: str = "float32", mesh: Mesh | None = None) -> LanguageModel:
    """The model at `path` with its tokenizer, if it has one; `dtype` (float32 or bfloat16) stores and computes.

    Each device of `mesh` gets its part of the parameters; None: the first device of this process gets all.
    """
    source = resolve_checkpoint(path)
    tokenizer = load_tokenizer(source.tokenizer) if source.tokenizer else None
    if mesh is None:
        return LanguageModel(*load_params(source, dtype), tokenizer)
    config = read_model_config(source)
    shardings = place_params(logical_axes(config), abstract_params(config), mesh).shardings

    def place(path: tuple[str, ...], value: np.ndarray) -> Array:
        sharding = shardings
        for key in path:
            sharding = sharding[key]
        return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)  # type: ignore[arg-type]

    return LanguageModel(config, load_params(source, dtype, place)[1], tokenizer, mesh=mesh)
