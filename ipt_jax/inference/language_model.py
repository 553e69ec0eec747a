"""The Python interface: a model that scores and generates.

`ipt_jax.load(path)` returns a `LanguageModel`. Guarantees: a text prompt is encoded as BOS (where the tokenizer has
one) and the text's tokens, a list of ids is used unchanged; results have the type of the prompts and no closing EOS;
a result does not depend on the other prompts of the call, apart from rounding. `BatchGenerator` serves callers whose
prompts arrive one by one. Inputs are padded to a few sizes, so that few programs are compiled.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ipt_jax.core.checkpoint_path import resolve_checkpoint
from ipt_jax.core.errors import UserError
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from ipt_jax.hf.params import load_params
from ipt_jax.inference import generate
from ipt_jax.model.config import ModelConfig
from ipt_jax.model.decoder import Mistral, Params, params_of

PromptInput = str | list[int]
SCORE_TOKENS = 8192  # tokens of a scoring batch, padding included
LOGITS_TOKENS = 512  # of a row, whose logits exist at a time
CACHE_BYTES = 512 * 2**20  # key-value cache of `LanguageModel.generate`


@dataclass(frozen=True)
class Score:
    """Sum of the log-probabilities of a continuation's tokens, their number, and whether each is the greedy choice."""

    logprob: float
    tokens: int
    greedy: bool

    def __float__(self) -> float:
        return self.logprob


@dataclass(frozen=True)
class Generation:
    """The completion of request `number`: `ids` without EOS; `finish_reason` is stop or length."""

    number: int
    ids: list[int]
    finish_reason: str


class LanguageModel:
    """A model and its tokenizer, where there is one. Computes in the dtype of the parameters.

    `model` is the Flax NNX module: call it, differentiate it, or update its parameters. The methods here use the
    parameters that it holds at the time of the call.
    """

    def __init__(self, config: ModelConfig, params: Params, tokenizer: Tokenizer | None = None):
        self.config, self.tokenizer = config, tokenizer
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
        scores: dict[int, Score] = {}
        by_size: dict[int, list[int]] = {}
        for number, (prompt, continuation) in enumerate(rows):
            by_size.setdefault(_bucket(len(prompt) + len(continuation) - 1), []).append(number)
        for size, numbers in by_size.items():
            at_once = max(1, SCORE_TOKENS // size)
            for start in range(0, len(numbers), at_once):
                batch = numbers[start : start + at_once]
                scores |= dict(zip(batch, self._score([rows[i] for i in batch], size), strict=True))
        return [scores[number] for number in range(len(rows))]

    def _score(self, rows: list[tuple[list[int], list[int]]], size: int) -> list[Score]:
        longest = max(len(continuation) for _, continuation in rows)
        R, C = _power_of_two(len(rows)), 32 if longest <= 32 else size
        tokens, places = np.zeros((R, size), np.int32), np.zeros((R, C), np.int32)
        targets, counts = np.zeros((R, C), np.int32), np.zeros((R, C), bool)
        for row, (prompt, continuation) in enumerate(rows):
            n, m = len(prompt), len(continuation)
            tokens[row, : n + m - 1] = (prompt + continuation)[:-1]  # the last one predicts nothing that is asked
            places[row, :m] = np.arange(n - 1, n + m - 1)  # the token before predicts
            targets[row, :m], counts[row, :m] = continuation, True
        sums, greedy = _continuations(self.params, tokens, places, targets, counts, config=self.compiled)
        sums, greedy = np.asarray(sums), np.asarray(greedy)
        return [Score(float(sums[i]), len(rows[i][1]), bool(greedy[i])) for i in range(len(rows))]

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
        length = _bucket(max(len(prompt) for prompt in ids) + max_new_tokens)
        generator = BatchGenerator(self, self._rows(len(ids), length), length, max_new_tokens, eos=eos)
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

    def _rows(self, count: int, length: int) -> int:
        """Rows of a batch: one per prompt, up to 64 and to CACHE_BYTES."""
        c = self.config
        row_bytes = 2 * c.layers * c.kv_heads * c.head_dim * length * jnp.dtype(self.dtype).itemsize
        return min(_power_of_two(count), 64, max(1, CACHE_BYTES // row_bytes))


class BatchGenerator:
    """Continuous batching over fixed shapes: a prompt is admitted when another one ends.

    `add` requests, then `step` until nothing is pending; each step returns the requests that ended in it. A request's
    tokens depend on its prompt, seed, temperature and limit; the batch changes at most the rounding of its logits.
    """

    def __init__(
        self, model: LanguageModel, batch_rows: int, max_model_len: int, max_new_tokens: int, eos: bool = True
    ):
        self.model, self.length, self.max_new_tokens = model, max_model_len, max_new_tokens
        self.eos_ids = model.config.eos_ids if eos else ()
        self.eos = jnp.array(self.eos_ids or (-1,), jnp.int32)
        self.arrivals = max(1, batch_rows // 4)  # rows per prefill, and rows that end before the loop returns
        self.rows = generate.empty_rows(model.config, batch_rows, max_model_len, max_new_tokens, model.dtype)
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
        enough = jnp.int32(max(0, live - self.arrivals))
        self.rows = generate.decode(self.model.params, self.rows, self.eos, enough, config=self.model.compiled)
        return self._collect()

    def _admit(self) -> None:
        places = [place for place, owner in enumerate(self.owner) if owner is None][: self.arrivals]
        taken = [self.queue.popleft() for _ in places[: len(self.queue)]]
        R, T = self.arrivals, min(_bucket(max(len(prompt) for _, prompt, *_ in taken)), self.length)
        tokens, seeds = np.zeros((R, T), np.int32), np.zeros((R, 2), np.uint32)
        lengths, limits = np.ones(R, np.int32), np.zeros(R, np.int32)
        slots, temperatures = np.full(R, len(self.owner), np.int32), np.zeros(R, np.float32)
        for row, ((number, prompt, seed, limit, temperature), place) in enumerate(zip(taken, places, strict=False)):
            tokens[row, : len(prompt)], lengths[row], limits[row] = prompt, len(prompt), limit
            seeds[row] = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
            slots[row], temperatures[row] = place, temperature
            self.owner[place] = number
        new = generate.Arrivals(*map(jnp.asarray, (tokens, lengths, slots, limits, temperatures, seeds)))
        self.rows = generate.prefill(self.model.params, self.rows, new, self.eos, config=self.model.compiled)

    def _collect(self) -> list[Generation]:
        live, produced, output = (np.asarray(x) for x in (self.rows.live, self.rows.produced, self.rows.output))
        done = []
        for place, number in enumerate(self.owner):
            if number is None or live[place]:
                continue
            ids = output[place, : produced[place]].tolist()
            ended = bool(ids) and ids[-1] in self.eos_ids
            done.append(Generation(number, ids[:-1] if ended else ids, "stop" if ended else "length"))
            self.owner[place] = None
        return done


@partial(jax.jit, static_argnames="config")
def _logits(params: Params, tokens: Array, segment_ids: Array | None, *, config: ModelConfig) -> Array:
    return Mistral.from_params(config, params)(tokens, segment_ids=segment_ids)


@partial(jax.jit, static_argnames="config")
def _continuations(
    params: Params, tokens: Array, places: Array, targets: Array, counts: Array, *, config: ModelConfig
) -> tuple[Array, Array]:
    """For each row of tokens [R, T]: the log-probability of targets [R, C] after `places`; are all greedy tokens."""
    model = Mistral.from_params(config, params)
    hidden = model.hidden(tokens)
    hidden = jnp.take_along_axis(hidden, places[:, :, None], axis=1)  # [R, C, D]
    R, C = targets.shape
    chunk = C if C <= LOGITS_TOKENS else math.gcd(C, LOGITS_TOKENS)

    def one(row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        states, target, count = row
        logits = model.logits(states)  # [chunk, V]
        chosen = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        logprob = chosen - jax.nn.logsumexp(logits, axis=1)
        return jnp.where(count, logprob, 0.0).sum(), ((logits.argmax(1) == target) | ~count).all()

    parts = (x.reshape(-1, chunk, *x.shape[2:]) for x in (hidden, targets, counts))
    sums, greedy = jax.lax.map(one, tuple(parts))
    return sums.reshape(R, -1).sum(1), greedy.reshape(R, -1).all(1)


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


def _bucket(n: int) -> int:
    """The next of 64, 96, 128, 192, 256, 384, ...: few shapes to compile, little padding."""
    whole = max(64, _power_of_two(n))
    return whole * 3 // 4 if n <= whole * 3 // 4 and whole > 64 else whole


def load(path: str | Path, dtype: str = "float32") -> LanguageModel:
    """The model at `path` with its tokenizer, if it has one; `dtype` (float32 or bfloat16) stores and computes."""
    source = resolve_checkpoint(path)
    config, params = load_params(source, dtype)
    return LanguageModel(config, params, load_tokenizer(source.tokenizer) if source.tokenizer else None)
