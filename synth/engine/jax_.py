"""This project's own model as an engine: continuous batching over fixed shapes, on any device that JAX has.

One thread steps the generator; new requests join at the next step. There is no prefix cache, so `cached_prompt_tokens`
is 0.
"""

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import SynthesizerSettings
from synth.engine.base import (
    Completion,
    EngineNotStarted,
    GenerationRequest,
    cut_at_stop,
    model_directory,
    refuse_vocabulary,
    time_limit,
    without_eos,
)

if TYPE_CHECKING:
    from ipt_jax.inference.language_model import LanguageModel

LOOP_TURNS = 6  # turns of the event loop from an answer to the next request of its place


class PendingRequest(NamedTuple):
    request: GenerationRequest
    answer: "asyncio.Future[Completion]"


class PendingScore(NamedTuple):
    prompt_ids: list[int]
    answer_ids: list[int]
    logprob: "asyncio.Future[float]"


class JaxEngine:
    def __init__(
        self, settings: SynthesizerSettings, tokenizer: Tokenizer, model: "LanguageModel | None" = None
    ) -> None:
        """Loads `settings.model` unless a model is given."""
        import jax

        from ipt_jax import load
        from ipt_jax.inference.language_model import BatchGenerator

        if model is None:
            default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
            dtype = default if settings.dtype == "auto" else settings.dtype
            try:
                model = load(str(model_directory(settings.model)), dtype=dtype)
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise EngineNotStarted(f"the JAX engine did not start: {type(error).__name__}: {reason}") from error
        refuse_vocabulary(settings.model, tokenizer, model.config.vocab_size)
        if settings.max_model_len > model.config.max_positions:
            raise UserError(
                f"synthesizer.max_model_len: {settings.max_model_len}, the model has {model.config.max_positions} "
                "positions; lower it"
            )
        self.tokenizer = tokenizer
        self.places = settings.max_num_seqs
        self._stop = settings.stop
        self._timeout = settings.request_timeout_seconds
        self._model = model
        self._generator = BatchGenerator(model, settings.max_num_seqs, settings.max_model_len, settings.max_new_tokens)
        self._waiting: list[PendingRequest] = []
        self._running: dict[int, PendingRequest] = {}
        self._asked: list[PendingScore] = []
        self._stepper: asyncio.Task[None] | None = None

    async def generate(self, request: GenerationRequest) -> Completion:
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append(PendingRequest(request, answer))
        self._wake()
        async with time_limit(self._timeout):
            return await answer

    async def score(self, prompt_ids: list[int], answer_ids: list[int], *, request_id: str) -> float:
        """Waiting scores are computed together before the next step, in a few batches of similar length."""
        logprob: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._asked.append(PendingScore(prompt_ids, answer_ids, logprob))
        self._wake()
        async with time_limit(self._timeout):
            return await logprob

    def _wake(self) -> None:
        if self._stepper is None:
            self._stepper = asyncio.create_task(self._step_on())

    async def _step_on(self) -> None:
        """Steps until no request is left. An exception ends all requests: the generator is unusable then."""
        try:
            while await self._gather():
                await self._score_waiting()
                self._admit()
                for done in await asyncio.to_thread(self._generator.step):
                    self._settle(self._running.pop(done.number), done.ids, done.finish_reason)
        except Exception as error:
            pending: list[asyncio.Future[Any]] = [one.answer for one in (*self._waiting, *self._running.values())]
            for future in pending + [asked.logprob for asked in self._asked]:
                if not future.done():
                    future.set_exception(error)
            self._waiting, self._running, self._asked = [], {}, []
        finally:
            self._stepper = None

    async def _gather(self) -> bool:
        """Lets answered groups send their next request, and waiting groups start, before the next step."""
        for _ in range(LOOP_TURNS):
            await asyncio.sleep(0)
        return bool(self._waiting or self._running or self._asked)

    async def _score_waiting(self) -> None:
        if not self._asked:
            return
        prompts, answers = [one.prompt_ids for one in self._asked], [one.answer_ids for one in self._asked]
        scores = await asyncio.to_thread(self._model.loglikelihood, prompts, answers)
        for asked, score in zip(self._asked[: len(scores)], scores, strict=True):  # new ones may follow them by now
            if not asked.logprob.done():
                asked.logprob.set_result(score.logprob)
        del self._asked[: len(scores)]

    def _admit(self) -> None:
        """Fills the free places by priority, which the generator does not know."""
        self._waiting = [pending for pending in self._waiting if not pending.answer.done()]  # else cancelled
        self._waiting.sort(key=lambda pending: pending.request.priority)
        free = self.places - len(self._running)
        for pending in self._waiting[:free]:
            asked = pending.request
            number = self._generator.add(
                asked.prompt_ids, asked.seed, max_new_tokens=asked.max_new_tokens, temperature=asked.temperature
            )
            self._running[number] = pending
        del self._waiting[:free]

    def _settle(self, pending: PendingRequest, ids: list[int], finish_reason: str) -> None:
        kept = without_eos(ids, self.tokenizer.eos_id)
        cut = cut_at_stop(self.tokenizer, kept, self._stop)
        reason = "stop" if len(kept) < len(ids) or cut is not kept else finish_reason
        if not pending.answer.done():  # else cancelled
            pending.answer.set_result(Completion(cut, reason, len(pending.request.prompt_ids), 0))

    async def close(self) -> None:
        if self._stepper is not None:
            self._stepper.cancel()
