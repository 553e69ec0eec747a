"""What every engine offers: token ids in, token ids out, one awaitable a request, many requests at once.

An engine streams: a request comes back when it is done, whatever the others do. A failure of one request is a
`RequestFailed`; an `EngineDied`, or anything else that `generate` raises, means that the engine itself is gone.
"""

import asyncio
import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal, Protocol

from ipt_jax.core.errors import Fault, UserError
from ipt_jax.core.hashing import DigestOf, digest, directory_digest, file_digest
from ipt_jax.corpus.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """`ids` go without the EOS that closed them; `finish_reason` is `stop` (EOS) or `length`.

    `recoded`: the server gave text alone, so the ids are this tokenizer's, perhaps not those that were sampled.
    """

    ids: list[int]
    finish_reason: str
    prompt_tokens: int
    cached_prompt_tokens: int
    recoded: bool = False


Failure = Literal["error", "timeout", "refused"]
FAILURES: tuple[Failure, ...] = ("error", "timeout", "refused")  # finish reasons of texts that failed


class RequestFailed(RuntimeError):
    """One request came to nothing; the engine serves the others. `lasting`: asking again would not help."""

    def __init__(self, message: str, reason: Failure = "error", *, lasting: bool = False) -> None:
        super().__init__(message)
        self.reason, self.lasting = reason, lasting or reason == "refused"


class EngineDied(Fault):
    """The engine answers nobody any more; what is stored stays, and another engine can go on."""


@asynccontextmanager
async def time_limit(seconds: float | None) -> AsyncIterator[None]:
    """Gives up what takes longer: RequestFailed with reason 'timeout'. None means no limit."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise RequestFailed(f"no answer within {seconds} s", "timeout") from error


class Engine(Protocol):
    """`places`: the requests that it works on at once. It takes more, and they wait."""

    tokenizer: Tokenizer
    places: int

    async def generate(
        self,
        prompt_ids: list[int],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        request_id: str,
        priority: int = 0,
    ) -> Completion:
        """One completion. Equal arguments mean the same request; `request_id` is '<group id>/<round>' or the like.

        Of the requests that wait, those of the lowest `priority` go first, and among them the earliest.
        """
        ...

    async def score(self, prompt_ids: list[int], answer_ids: list[int], *, request_id: str) -> float:
        """The log-probability (nats) of these tokens after the prompt. Both together are below `max_model_len`."""
        ...

    async def close(self) -> None: ...


class Places:
    """What an engine works on at once: of those who wait, the lowest priority goes first, then the earliest."""

    def __init__(self, free: int) -> None:
        self._free = free
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = count()

    async def take(self, priority: int) -> None:
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._arrivals), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # its turn had come at the same moment
                self.give_back()
            raise

    def give_back(self) -> None:
        while self._waiting:
            *_, turn = heapq.heappop(self._waiting)
            if not turn.done():  # else it was given up meanwhile
                return turn.set_result(None)
        self._free += 1


def without_eos(ids: list[int], eos_id: int | None) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def refuse_vocabulary(model: str, tokenizer: Tokenizer, known: int) -> None:
    """Raises UserError where the tokenizer has ids that the weights do not."""
    if tokenizer.vocab_size > known:
        raise UserError(
            f"synthesizer.model {model}: its tokenizer has {tokenizer.vocab_size} ids, its weights {known}; "
            "put the model's own tokenizer there"
        )


def weights_digest(model: str, digest_of: DigestOf = file_digest) -> str:
    """SHA-256 over config and weights of an HF directory or a checkpoint, wherever it lies. UserError without them."""
    directory = Path(model)
    if (directory / "config.json").is_file():
        weights = sorted(directory.glob("*.safetensors"))
        if not weights:
            raise UserError(f"synthesizer.model {model}: config.json but no *.safetensors; put the weights there")
        return directory_digest([directory / "config.json", *weights], digest_of)
    checkpoint = latest_checkpoint(directory)
    folders = [checkpoint / name for name in ("params", "checkpoint")]  # of a training run, of `ipt import`
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [str(path.relative_to(checkpoint)) for path in files]
    return digest([digest_of(checkpoint / "model.json"), *zip(names, map(digest_of, files), strict=True)])


def latest_checkpoint(directory: Path) -> Path:
    """The newest step of a run directory, one step's directory, or what `ipt import` wrote."""
    steps = [path for path in (directory / "checkpoints").glob("*") if path.name.isdigit()]
    for found in (directory, *sorted(steps, key=lambda path: -int(path.name))):
        if (found / "model.json").is_file():
            return found
    raise UserError(f"synthesizer.model {directory}: no config.json and no checkpoint; give a model's directory")
