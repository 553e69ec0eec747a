"""The interface of engines: token ids in, token ids out, one awaitable per request, many concurrent requests.

An engine streams: each request returns when it is done, independent of the others. `RequestFailed` is the failure of
one request. `EngineDied`, or any other exception from `generate`, means that the engine has stopped.
"""

import asyncio
import heapq
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Literal, Protocol, TypeVar, get_args

from ipt_jax.core.errors import Fault, UserError
from ipt_jax.corpus.tokenizer import Tokenizer

HUB = "hf:"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
ATTEMPTS = 3  # requests for one completion or score
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and how to continue it. Requests with equal fields ask for the same completion.

    `id` is '<group id>/<round>/<attempt>' or the like. Of the waiting requests, an engine serves those of the lowest
    `priority` first, and among them the earliest. `messages`: the conversation of a chat model, for a server that
    applies its own chat template; `prompt_ids` are the same conversation.
    """

    id: str
    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    priority: int = 0
    messages: list[dict[str, str]] | None = None


@dataclass(frozen=True)
class Completion:
    """`ids` exclude the closing EOS and stop strings.

    `finish_reason` is `stop` (the model ended it), `length` (the token limit), or the engine's word for another end.
    `recoded`: the server returned only text. The ids are then from this tokenizer and may differ from the sampled ones.
    `text`: the answer of a chat completion, where it is more exact than the ids. `text_prompt`: the server took the
    prompt as text. `drafts` and `accepted_draft_tokens`: of speculative decoding.
    """

    ids: list[int]
    finish_reason: str
    prompt_tokens: int
    cached_prompt_tokens: int
    recoded: bool = False
    text: str | None = None
    text_prompt: bool = False
    drafts: int = 0
    accepted_draft_tokens: int = 0


Failure = Literal["error", "timeout", "refused"]
FAILURES: tuple[Failure, ...] = get_args(Failure)  # finish reasons of failed texts


class RequestFailed(RuntimeError):
    """One request failed; the engine serves the others. `lasting`: a retry would fail too."""

    def __init__(self, message: str, reason: Failure = "error", *, lasting: bool = False) -> None:
        super().__init__(message)
        self.reason, self.lasting = reason, lasting or reason == "refused"


class EngineDied(Fault):
    """The engine answers no more requests. Stored groups are safe, and another engine can resume the run."""


class EngineNotStarted(EngineDied):
    """The engine ended during its start, before any request."""


async def with_retries(ask: Callable[[int], Awaitable[Answer]]) -> Answer:
    """The result of `ask(attempt)`, called up to ATTEMPTS times. Raises the last RequestFailed."""
    for attempt in range(1, ATTEMPTS):
        try:
            return await ask(attempt)
        except RequestFailed as error:
            if error.lasting:
                raise
    return await ask(ATTEMPTS)


@asynccontextmanager
async def time_limit(seconds: float | None) -> AsyncIterator[None]:
    """Raises RequestFailed with reason 'timeout' after this time. None: no limit."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise RequestFailed(f"no answer within {seconds} s", "timeout") from error


class Engine(Protocol):
    """`places`: the number of concurrent requests. Further requests wait."""

    tokenizer: Tokenizer
    places: int

    async def generate(self, request: GenerationRequest) -> Completion: ...

    async def score(self, prompt_ids: list[int], answer_ids: list[int], *, request_id: str) -> float:
        """The log-probability (nats) of the answer after the prompt. Both together are below `max_model_len`."""
        ...

    async def close(self) -> None: ...


class Places:
    """A semaphore with priorities: of the waiting, the lowest priority enters first, then the earliest."""

    def __init__(self, free: int) -> None:
        self._free = free
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = count()

    @asynccontextmanager
    async def hold(self, priority: int) -> AsyncIterator[None]:
        await self._take(priority)
        try:
            yield
        finally:
            self._give_back()

    async def _take(self, priority: int) -> None:
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._arrivals), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the turn came at the same moment
                self._give_back()
            raise

    def _give_back(self) -> None:
        while self._waiting:
            *_, turn = heapq.heappop(self._waiting)
            if not turn.done():  # else cancelled
                return turn.set_result(None)
        self._free += 1


def without_eos(ids: list[int], eos_id: int | None) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def cut_at_stop(tokenizer: Tokenizer, ids: list[int], stop: Sequence[str]) -> list[int]:
    """The ids up to the first stop string. What a token holds before it is encoded again."""
    text = tokenizer.decode(ids) if stop else ""
    found = [place for place in map(text.find, stop) if place >= 0]
    if not found:
        return ids
    at = min(found)
    size = bisect_right(range(len(ids)), at, key=lambda size: len(tokenizer.decode(ids[:size]))) - 1
    rest = text[len(tokenizer.decode(ids[:size])) : at]
    return ids[:size] + (tokenizer.encode(rest, continuing=True) if rest else [])


@lru_cache(maxsize=4)
def model_directory(model: str) -> Path:
    """The directory of `synthesizer.model`. `hf:NAME` is downloaded from the hub to its cache. Raises UserError."""
    if not model.startswith(HUB):
        return Path(model)
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise UserError(f"synthesizer.model {model}: needs huggingface_hub; run launch/setup.sh hf") from error
    try:
        return Path(snapshot_download(model.removeprefix(HUB), allow_patterns=HUB_FILES))
    except Exception as error:  # any type: no network, no such name, no access
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"synthesizer.model {model}: cannot be downloaded ({type(error).__name__}: {reason}); check the name and "
            "the network, or set a local directory"
        ) from error


def refuse_vocabulary(model: str, tokenizer: Tokenizer, known: int) -> None:
    """Raises UserError if the tokenizer has ids that the weights do not have."""
    if tokenizer.vocab_size > known:
        raise UserError(
            f"synthesizer.model {model}: its tokenizer has {tokenizer.vocab_size} ids, its weights {known}; "
            "copy the model's own tokenizer there"
        )
