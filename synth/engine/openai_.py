"""Any OpenAI-compatible completions server: token prompts out over HTTP, token ids back where the server gives them.

Guaranteed: a server that is gone, overloaded or started anew is waited for with growing, scattered pauses, longer where
it says `Retry-After`; requests that were in flight are sent again. One that was never there is the user's mistake. A
server that answers nobody for `server_patience_seconds` is an EngineDied. A request that the server refuses fails
alone. Its key comes from the environment variable IPT_API_KEY and is written nowhere.

Servers of vLLM return token ids. Others give text, which is encoded here: `Completion.recoded`. The ids may then differ
from the sampled ones, which costs prefix-cache hits and nothing else. vLLM counts cached tokens when it is started with
`--enable-prompt-tokens-details`.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from ipt_jax.core.errors import UserError
from ipt_jax.core.seeding import uniform
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import SynthesizerSettings
from synth.engine.base import Completion, EngineDied, GenerationRequest, Places, RequestFailed, time_limit, without_eos

KEY = "IPT_API_KEY"
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds
LONGEST_RETRY_AFTER = 120.0
CONNECT_SECONDS = 10.0
KNOCKS = 4  # at a server that was never there; with the pauses between, some three seconds
TRIES = 5  # of a request that makes the server fail, or at which it went away
OVERLOADED = (429, 502, 503, 504)  # by the server itself, or by the gateway before it
log = logging.getLogger(__name__)


class Served(msgspec.Struct):
    """A model as a server lists it."""

    id: str
    owned_by: str | None = None
    max_model_len: int | None = None


class ServedModels(msgspec.Struct):
    data: list[Served]


class OpenAIEngine:
    """One server, which is asked for `max_num_seqs` completions at once; the others wait here."""

    def __init__(self, settings: SynthesizerSettings, tokenizer: Tokenizer) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise UserError("synthesizer.engine: openai is not installed here; launch/setup.sh openai") from error
        assert settings.server is not None
        if "@" in settings.server:
            raise UserError(f"synthesizer.server: holds a password or key; take it out, and put the key into {KEY}")
        self._openai, self._settings, self.tokenizer = openai, settings, tokenizer
        self.places = settings.max_num_seqs
        self._places = Places(self.places)
        self._client = openai.AsyncOpenAI(
            base_url=settings.server,
            api_key=os.environ.get(KEY) or "none",
            max_retries=0,
            timeout=openai.Timeout(None, connect=CONNECT_SECONDS),
        )
        self._extras: dict[str, Any] | None = None  # unknown until the server was looked at
        self._looking = asyncio.Lock()
        self._answered = 0.0  # when the server last answered anybody
        self._seen = self._away = False

    async def generate(self, request: GenerationRequest) -> Completion:
        extras = await self._known_extras()
        sampling = {"max_tokens": request.max_new_tokens, "temperature": request.temperature}
        asked = {"prompt": request.prompt_ids, **sampling, "extra_body": extras}
        if request.temperature > 0:
            asked["seed"] = request.seed
        return self._completion(await self._complete(asked, request.id, request.priority), request.prompt_ids)

    async def score(self, prompt_ids: list[int], answer_ids: list[int], *, request_id: str) -> float:
        """Only vLLM's servers say how likely a prompt's tokens are. UserError with others."""
        if not await self._known_extras():
            raise UserError(f"synthesizer.server {self._settings.server}: is no vLLM server, and scores need one")
        asked = {"prompt": prompt_ids + answer_ids, "max_tokens": 1, "temperature": 0.0}
        reply = await self._complete({**asked, "extra_body": {"prompt_logprobs": 0}}, request_id, 0)
        found = getattr(reply.choices[0], "prompt_logprobs", None) or []
        if len(found) != len(prompt_ids) + len(answer_ids):
            raise RequestFailed("the server's reply holds no log-probabilities")
        places = zip(found[len(prompt_ids) :], answer_ids, strict=True)
        return sum(float(place[str(token)]["logprob"]) for place, token in places)

    async def _known_extras(self) -> dict[str, Any]:
        async with self._looking:
            if self._extras is None:
                self._extras = await self._look_at_server()
        return self._extras

    async def _complete(self, asked: dict[str, Any], request_id: str, priority: int) -> Any:
        """The server's reply, asked for when a place is free."""
        create = self._client.completions.create
        async with self._places.hold(priority):
            return await self._answer(lambda: create(model=self._settings.served_name, **asked), request_id)

    async def _look_at_server(self) -> dict[str, Any]:
        """What to ask of it beyond the common interface. Raises UserError where it serves another model."""
        name, served = self._settings.served_name, await self._served_models()
        found = next((model for model in served if model.id == name), None)
        if found is None:
            raise UserError(
                f"synthesizer.server {self._settings.server}: serves "
                f"{', '.join(model.id for model in served) or 'nothing'}, not {name}; set synthesizer.served_model"
            )
        if found.max_model_len is not None and self._settings.max_model_len > found.max_model_len:
            raise UserError(
                f"synthesizer.max_model_len: {self._settings.max_model_len}, the server's is {found.max_model_len}; "
                "lower it"
            )
        if found.owned_by != "vllm":
            return {}
        return {"return_token_ids": True, "stop_token_ids": [self.tokenizer.eos_id]}

    async def _served_models(self) -> list[Served]:
        """Raises UserError where another service answers."""
        try:
            reply = await self._answer(self._client.models.with_raw_response.list, "models")
            return msgspec.json.decode(reply.content, type=ServedModels).data
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"synthesizer.server {self._settings.server}: its /models is no list of models ({error}); give the "
                "base URL of an OpenAI-compatible server, which mostly ends in /v1"
            ) from error

    async def _answer(self, ask: Callable[[], Awaitable[Any]], request_id: str) -> Any:
        """The server's reply, however often it must be asked."""
        first_failure, pauses, tries = None, 0, 0
        while True:
            try:
                async with time_limit(self._settings.request_timeout_seconds):
                    reply = await ask()
            except self._openai.APIError as error:
                tries += self._blames_request(error)
                if tries == TRIES:
                    raise RequestFailed(
                        f"the server failed at it {TRIES} times: {line(error)}", lasting=True
                    ) from error
                first_failure = first_failure or time.monotonic()
                await self._pause(error, first_failure, request_id, pauses)
                pauses += 1
            else:
                self._is_back()
                return reply

    def _blames_request(self, error: Any) -> bool:
        """Whether the request may have caused it. Raises what no pause can mend."""
        if not isinstance(error, self._openai.APIStatusError):
            reached = not type(error.__cause__).__name__.startswith("Connect")  # ConnectError, ConnectTimeout
            self._seen = self._seen or reached
            return reached
        self._seen = True
        server = f"synthesizer.server {self._settings.server}"
        if error.status_code in (401, 403):
            raise UserError(f"{server}: refuses the key ({error.status_code}); put the right one into {KEY}") from error
        if error.status_code == 404:
            raise UserError(f"{server}: {line(error)}; give the base URL, which mostly ends in /v1") from error
        if error.status_code < 500 and error.status_code not in (408, 429):
            self._is_back()
            raise RequestFailed(line(error), "refused") from error
        return error.status_code not in OVERLOADED

    async def _pause(self, error: Any, first_failure: float, request_id: str, pauses: int) -> None:
        """Waits before the next try. Raises EngineDied when nobody was answered for too long, and UserError soon where
        there was never a server."""
        if not self._seen and pauses + 1 == KNOCKS:
            raise UserError(
                f"synthesizer.server {self._settings.server}: cannot be reached ({line(error)}); start it, or give the "
                "address of one that runs"
            ) from error
        patience = self._settings.server_patience_seconds
        if time.monotonic() - max(first_failure, self._answered) > patience:
            raise EngineDied(
                f"server {self._settings.server} answered nobody for {patience:g} s ({line(error)})"
            ) from error
        if self._seen and not self._away:
            self._away = True
            log.warning("server %s: %s; waiting up to %g s for it", self._settings.server, line(error), patience)
        longest = min(FIRST_PAUSE * 2 ** min(pauses, 20), LONGEST_PAUSE)
        # Scattered, so that requests that failed together do not come back together.
        pause = longest * (0.5 + 0.5 * uniform(0, "pause", request_id, pauses))
        await asyncio.sleep(max(pause, retry_after(error)))

    def _is_back(self) -> None:
        if self._away:
            self._away = False
            log.warning("server %s answers again", self._settings.server)
        self._seen = True
        self._answered = time.monotonic()

    def _completion(self, reply: Any, prompt_ids: list[int]) -> Completion:
        choices = getattr(reply, "choices", None)  # a reply that is no JSON comes as a string
        if not choices:
            raise RequestFailed(f"the server's reply holds no completion: {str(reply)[:100]}")
        if choices[0].finish_reason not in ("stop", "length"):
            raise RequestFailed(f"the server finished with {choices[0].finish_reason!r}")
        ids = getattr(choices[0], "token_ids", None)
        recoded = ids is None
        if ids is None:
            ids = self.tokenizer.encode(choices[0].text, continuing=True)
        kept = without_eos(list(ids), self.tokenizer.eos_id)
        details = getattr(reply.usage, "prompt_tokens_details", None)
        cached = getattr(details, "cached_tokens", None) or 0
        return Completion(kept, choices[0].finish_reason, len(prompt_ids), cached, recoded)

    async def close(self) -> None:
        await self._client.close()


def line(error: Any) -> str:
    """What the server said; where it said nothing, what the connection did."""
    told = error if hasattr(error, "response") else error.__cause__ or error
    return " ".join(str(told).split())[:200]


def retry_after(error: Any) -> float:
    """The seconds that the server asks to be left alone; 0 where it does not say, or gives a date."""
    response = getattr(error, "response", None)
    asked = response.headers.get("retry-after", "") if response is not None else ""
    return min(float(asked), LONGEST_RETRY_AFTER) if asked.isdigit() else 0.0
