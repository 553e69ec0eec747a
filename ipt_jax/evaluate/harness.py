"""`HarnessLM`: the model interface of lm-evaluation-harness over a JAX model, on any mesh.

`lm_eval.simple_evaluate(model=HarnessLM(ipt_jax.load(PATH)), tasks=[...])`. The class needs no package but the core: it
is registered as an `lm_eval.api.model.LM` where lm_eval is installed, and scores the JSON Lines tasks where it is not.

Texts are converted to tokens as in the harness's backend hf (0.4.13): trailing white space of a context moves to its
continuation, both are encoded together and cut after the tokens of the context alone; an empty context is BOS, or EOS
for a tokenizer without BOS. Where the two differ, hf fails and this does not: a continuation that the tokenizer merges
into the context is encoded alone, an empty one has log-likelihood 0, one that is longer than the model's context is
scored window by window, a rolling text gets one BOS. What is cut or encoded alone is counted in `counts`.

Guarantees: a result depends on its own request alone, apart from rounding. Several processes get the same requests and
return the same results. With a journal, a rerun computes only the requests that it lacks.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import writing
from ipt_jax.core.hashing import digest
from ipt_jax.core.progress import Progress
from ipt_jax.evaluate.lm_eval_ import DEFAULT_LIMIT, LIMITS, PROMPT, LogLikelihood
from ipt_jax.inference.language_model import BatchGenerator, LanguageModel, length_bucket
from ipt_jax.inference.scoring import Pair, Score, pack

Ids = list[int]
KEY = 64  # hex digits of a request's digest


class HarnessLM:
    """A language model for lm-evaluation-harness.

    `add_bos`: BOS before every context; None: where the tokenizer has one, as in training. `read_controls`: text that
    spells a control token is that token. `max_length`: tokens of context to use, at most those of the model.
    """

    rank, world_size, device = 0, 1, None

    def __init__(
        self, model: LanguageModel, *, add_bos: bool | None = None, read_controls: bool = False,
        max_length: int | None = None, batch_tokens: int = 4096, journal: RequestJournal | None = None, seed: int = 0,
    ):  # fmt: skip
        if model.tokenizer is None:
            raise UserError("eval: this model has no tokenizer files; add them to its directory")
        self.model, self._tokenizer, self.batch_tokens, self.seed = model, model.tokenizer, batch_tokens, seed
        context = model.config.max_positions
        if max_length is not None and not 1 < max_length <= context:
            raise UserError(f"max_length is {max_length}; expected 2 to {context}, the context of the model")
        self.max_length = max_length or context
        bos = self._tokenizer.bos_id if add_bos is not False else None
        if add_bos and bos is None:
            raise UserError("eval: BOS is asked for, but the tokenizer has none; leave the option out")
        self.start = [] if bos is None else [bos]
        self.read_controls = read_controls
        self.journal = RequestJournal(None, "") if journal is None else journal
        self.counts: Counter[str] = Counter()
        self.cache_hook: Any = None
        if importlib.util.find_spec("lm_eval"):
            from lm_eval.api.model import LM

            LM.register(HarnessLM)

    # ---- what the harness asks besides requests

    @property
    def eot_token_id(self) -> int | None:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that replaces an empty context."""
        found = self._tokenizer.eos_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id
        if found is None:
            raise UserError("eval: the tokenizer has neither BOS nor EOS to precede a text; set another tokenizer")
        return found

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.digest

    def set_cache_hook(self, cache_hook: Any) -> None:
        self.cache_hook = cache_hook  # the harness stores what a call returns; the journal stores it sooner

    def chat_template(self, chat_template: bool | str = False) -> None:
        return None

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        raise UserError("eval: chat templates are not supported by backend jax; use backend hf or vllm")

    def get_model_info(self) -> dict[str, Any]:
        sizes = (math.prod(value.shape) for value in jax.tree.leaves(self.model.params))
        return {
            "model_num_parameters": sum(sizes), "model_dtype": str(self.model.dtype), "max_length": self.max_length,
            "add_bos_token": bool(self.start),
        }  # fmt: skip

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> Ids:
        """Ids of a text; `add_special_tokens` overrides whether BOS precedes them."""
        return self._encode([string], add_special_tokens is not False)[string]

    # ---- requests

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[LogLikelihood]:
        """Of each (context, continuation): the continuation's log-likelihood."""
        return self._scored("loglikelihood", [tuple(request.args) for request in requests], self._windows_of_pairs)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """Of each text: its log-likelihood, in disjoint windows, the last one filled with the text before it.

        The harness's 0.5 passes ("", text) and expects (log-likelihood, False); 0.4 passes (text,), for a number.
        """
        asked = [(request.args[-1],) for request in requests]
        found = self._scored("loglikelihood_rolling", asked, self._windows_of_texts)
        return [
            one[0] if len(request.args) == 1 else (one[0], False) for one, request in zip(found, requests, strict=True)
        ]

    def rolling_scores(self, texts: Sequence[str]) -> list[LogLikelihood]:
        """`loglikelihood_rolling` with the number of tokens."""
        return self._scored("loglikelihood_rolling", [(text,) for text in texts], self._windows_of_texts)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Of each (context, settings): the new text up to the first stop string, EOS or the limit."""
        asked = [(request.args[0], _GenerationSettings.read(request.args[1])) for request in requests]
        keys = _keys("generate_until", [(context, settings._asdict(), self.seed) for context, settings in asked])
        done = {number: found for number, key in enumerate(keys) if (found := self.journal.get(key)) is not None}
        progress = Progress(len(asked), "answers", "eval generate_until", done=len(done))
        contexts = self._encode([asked[number][0] for number in range(len(asked)) if number not in done])
        groups: dict[tuple[_GenerationSettings, int], list[int]] = defaultdict(list)
        for number, (context, settings) in enumerate(asked):
            if number not in done:
                length = min(len(contexts[context]), self._room(settings)) + settings.limit
                groups[settings, min(length_bucket(length), self.model.config.max_positions)].append(number)
        with progress:
            for (settings, length), numbers in sorted(groups.items(), key=lambda group: -group[0][1]):
                prompts = [(number, contexts[asked[number][0]], keys[number]) for number in numbers]
                for number, text in self._generated(settings, length, prompts):
                    done[number] = text
                    self.journal.put(keys[number], text)
                    progress.advance(1)
        return [done[number] for number in range(len(asked))]

    def _room(self, settings: _GenerationSettings) -> int:
        if settings.limit >= self.max_length:
            raise UserError(
                f"eval: {settings.limit} new tokens leave no room for a prompt in a context of {self.max_length}; set "
                "max_gen_toks of the task lower"
            )
        return min(self.max_length - settings.limit, settings.prompt or self.max_length)

    def _generated(
        self, settings: _GenerationSettings, length: int, prompts: list[tuple[int, Ids, str]]
    ) -> Iterator[tuple[int, str]]:
        """(number, text) in the order in which they end."""
        room, stops = self._room(settings), [stop for stop in settings.until if stop]

        def stopped(ids: Ids) -> bool:
            text = self._tokenizer.decode(ids)
            return any(stop in text for stop in stops)

        rows = self.model.batch_rows(len(prompts), length)
        generator = BatchGenerator(self.model, rows, length, settings.limit, stop=stopped if stops else None)
        numbers = {}
        for number, ids, key in prompts:
            self.counts["truncated"] += len(ids) > room
            seed = int(digest([self.seed, key])[:16], 16)
            # the harness cuts the start, BOS included, and the tokenizer of max_prompt_tokens keeps BOS
            kept = self.start if settings.prompt and len(ids) > room else []
            # a prompt of no tokens begins as an empty context does
            prompt = kept + ids[len(kept) - room :] if len(ids) > room else ids or [self.prefix_token_id]
            numbers[generator.add(prompt, seed, temperature=settings.temperature)] = number
        while generator.pending:
            for one in generator.step():
                text = self._tokenizer.decode(one.ids)
                for stop in stops:
                    text = text.split(stop)[0]
                yield numbers[one.number], text

    def _scored(self, kind: str, asked: list[tuple[Any, ...]], windows_of: Any) -> list[LogLikelihood]:
        """The summed scores of the windows of each request. `windows_of(requests)`: windows and whether one was cut."""
        keys = _keys(kind, [(self.start, self.read_controls, *args) for args in asked], numbered=False)
        done = {number: LogLikelihood(*one) for number, key in enumerate(keys) if (one := self.journal.get(key))}
        todo = [number for number in range(len(asked)) if number not in done]
        windows = dict(zip(todo, windows_of([asked[number] for number in todo]), strict=True))
        owners = [number for number in todo for _ in windows[number][0]]
        parts: dict[int, dict[int, Score]] = {number: {} for number in todo}
        rows = pack([window for number in todo for window in windows[number][0]])

        def finish(number: int) -> None:
            scores = parts[number].values()
            logprob, tokens = math.fsum(one.logprob for one in scores), sum(one.tokens for one in scores)
            if not math.isfinite(logprob):
                raise UserError("eval: the model returns log-likelihoods that are not numbers; its weights are damaged")
            greedy = all(one.greedy for one in scores)
            done[number] = LogLikelihood(logprob, greedy, tokens, windows[number][1])
            self.journal.put(keys[number], [logprob, greedy, tokens, windows[number][1]])

        for number in todo:
            if not windows[number][0]:
                finish(number)  # an empty continuation
        tokens = sum(len(row.tokens) for row in rows)
        with Progress(tokens, "tokens", f"eval {kind}: {len(todo):,} requests") as progress:
            for size, scores in self.model.scorer(self.batch_tokens).batches(rows):
                for window, score in scores.items():
                    number = owners[window]
                    parts[number][window] = score
                    if len(parts[number]) == len(windows[number][0]):
                        finish(number)
                progress.advance(size)
        return [done[number] for number in range(len(asked))]

    # ---- texts to tokens

    def _encode(self, texts: Sequence[str], bos: bool = True) -> dict[str, Ids]:
        """Ids of each text, after BOS where `bos` and this model's rule ask for it."""
        distinct = list(dict.fromkeys(texts))
        if self.read_controls:
            encoded = [self._tokenizer.encode_rendered(text) for text in distinct]
        else:
            encoded = self._tokenizer.encode_batch(distinct) if distinct else []
        start = self.start if bos else []
        spelled = self.read_controls and bool(start)  # a text that begins with BOS gets no second one
        return {
            text: ids if spelled and ids[:1] == start else start + ids
            for text, ids in zip(distinct, encoded, strict=True)
        }

    def _windows_of_pairs(self, asked: list[tuple[str, str]]) -> list[tuple[list[Pair], bool]]:
        cut = []
        for context, continuation in asked:
            stem = context.rstrip()
            cut.append((stem, context[len(stem) :] + continuation))
        joined = self._encode([text for stem, rest in cut if stem for text in (stem, stem + rest)])
        alone = self._encode([rest for stem, rest in cut if not stem], bos=False)
        return [
            self._fitted(*(self._split(joined, stem, rest) if stem else self._after_prefix(alone[rest])))
            for stem, rest in cut
        ]

    def _split(self, joined: dict[str, Ids], stem: str, rest: str) -> Pair:
        context = joined[stem]
        continuation = joined[stem + rest][len(context) :]
        if rest and not continuation:  # a token crosses the seam
            self.counts["encoded alone"] += 1
            continuation = self._tokenizer.encode(rest, continuing=True)
        return context, continuation

    def _after_prefix(self, ids: Ids) -> Pair:
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)

    def _fitted(self, context: Ids, continuation: Ids) -> tuple[list[Pair], bool]:
        """The windows of one continuation, and whether its context was cut."""
        if not continuation:
            return [], False
        over = len(context) + len(continuation) - (self.max_length + 1)
        if over <= 0:
            return [(context, continuation)], False
        self.counts["truncated"] += 1
        if len(continuation) <= self.max_length:
            return [(context[over:], continuation)], True
        return list(windows(continuation, context[-1], self.max_length)), True

    def _windows_of_texts(self, asked: list[tuple[str]]) -> list[tuple[list[Pair], bool]]:
        texts = self._encode([text for (text,) in asked], bos=False)
        return [(list(windows(texts[text], self.prefix_token_id, self.max_length)), False) for (text,) in asked]


def windows(ids: Ids, first: int, context: int) -> Iterator[Pair]:
    """(prompt, continuation) pairs whose continuations join to `ids`; each pair has at most `context` + 1 tokens.

    The model reads all of a pair but its last token. Ids 5 6 7 8 9, first 1, context 3: (1, 5 6 7), (6 7, 8 9).
    """
    joined = [first, *ids]
    for start in range(0, len(ids), context):
        stop = min(start + context, len(ids))
        begin = start if start == 0 else stop - context
        yield joined[begin : start + 1], joined[start + 1 : stop + 1]


class _GenerationSettings(NamedTuple):
    until: tuple[str, ...]
    limit: int
    temperature: float
    prompt: int | None  # the most tokens of a prompt

    @classmethod
    def read(cls, stated: dict[str, Any]) -> _GenerationSettings:
        """Of a task's `generation_kwargs`, as the harness normalizes them."""
        left = dict(stated)
        until, prompt = left.pop("until", None) or [], left.pop(PROMPT, None)
        limits = [limit for name in LIMITS if (limit := left.pop(name, None)) is not None]
        temperature, sample = float(left.pop("temperature", 0.0) or 0.0), left.pop("do_sample", None)
        if sample is False or not temperature:
            temperature = 0.0
            left = {name: value for name, value in left.items() if name not in ("top_p", "top_k", "min_p", "typical_p")}
        if unknown := sorted(name for name, value in left.items() if value not in (None, 1, 1.0, False)):
            raise UserError(
                f"eval: generation setting {unknown[0]!r} is not supported by backend jax; remove it from the task, or "
                "use backend hf or vllm"
            )
        stops = tuple([until] if isinstance(until, str) else until)
        return cls(stops, int(limits[0]) if limits else DEFAULT_LIMIT, temperature, prompt)


def _keys(kind: str, asked: list[Any], numbered: bool = True) -> list[str]:
    """A key of each request. `numbered`: repeated requests have different ones."""
    keys, seen = [], Counter[str]()
    for one in asked:
        key = digest([kind, one])
        keys.append(digest([key, seen[key]]) if numbered else key)
        seen[key] += 1
    return keys


class RequestJournal:
    """Results by request in a file, line by line, so that a rerun after a kill resumes.

    A file of another `identity` (model, dtype, context) is replaced; damaged lines are computed again. Process 0 reads
    and writes the file, and every process gets its contents. Without a path, nothing is kept.
    """

    def __init__(self, path: Path | None, identity: str):
        self.path = path
        self._file: TextIO | None = None
        self._known: dict[str, Any] = {}
        if path is not None:
            if jax.process_index() == 0:
                with writing(path):
                    self._file = self._opened(path, identity)
            self._known = _from_first_process(self._known)

    def _opened(self, path: Path, identity: str) -> TextIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output {path}: another run is writing here; wait for it or set another output") from None
        file.seek(0)
        lines = file.read().split("\n")
        if lines[0] == identity:
            for line in lines[1:-1]:
                key, _, value = line.partition(" ")
                if len(key) == KEY and (known := _json_or_none(value)) is not None:
                    self._known[key] = known
            file.write("\n" if lines[-1] else "")  # after a torn last line
        else:
            file.truncate(0)
            file.write(identity + "\n")
        file.flush()
        return file

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Any:
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        if self._file is not None:
            self._file.write(f"{key} {json.dumps(value)}\n")
            self._file.flush()

    def remove(self) -> None:
        """Ends the journal: its results are in the output."""
        if self._file is not None and self.path is not None:
            os.unlink(self.path)
            self._file.close()
            self._file = None


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _from_first_process(value: dict[str, Any]) -> dict[str, Any]:
    """What process 0 passes."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int64(data.size)))
    padded = data if jax.process_index() == 0 else np.zeros(size, np.uint8)
    found: dict[str, Any] = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))
    return found
