"""Any OpenAI-compatible server: token prompts or conversations out over HTTP, token ids back if it returns them.

Guaranteed: a server that is down, overloaded or restarting is retried with growing, scattered pauses, longer if it
sends `Retry-After`, and requests in flight are sent again. A server that cannot be reached at startup is a UserError.
One that answers no request for `server_patience_seconds` is an EngineDied. A request that the server refuses fails
alone. The key is read from the environment variable IPT_API_KEY and written nowhere.

vLLM servers return token ids. Others return text, which is encoded here: `Completion.recoded`. The ids may then differ
from the sampled ones, which only costs prefix-cache hits. A server that refuses a prompt of token ids gets text from
then on: `Completion.text_prompt`. vLLM counts cached tokens with `--enable-prompt-tokens-details`.
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
from synth.engine.base import (
    FAILURES,
    Completion,
    EngineDied,
    GenerationRequest,
    Places,
    RequestFailed,
    cut_at_stop,
    time_limit,
    without_eos,
)
from synth.format.chat import chat_format

KEY = "IPT_API_KEY"
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds
LONGEST_RETRY_AFTER = 120.0
CONNECT_SECONDS = 10.0
STARTUP_TRIES = 4  # to reach the server; about three seconds with the pauses between
TRIES = 5  # of a request at which the server fails or closes the connection
OVERLOADED = (429, 502, 503, 504)  # the server itself, or a gateway in front of it
FINISHED = {  # servers' words for the two usual ends
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_token"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "max_length", "model_length"), "length"),
}
FAILED = {*FAILURES, "abort", "aborted", "cancelled"}  # finish reasons without an answer
log = logging.getLogger(__name__)


class Served(msgspec.Struct):
    """A model in a server's list."""

    id: str
    owned_by: str | None = None
    max_model_len: int | None = None


class ServedModels(msgspec.Struct):
    data: list[Served]


class OpenAIEngine:
    """One server with up to `max_num_seqs` concurrent requests. Further requests wait here."""

    def __init__(self, settings: SynthesizerSettings, tokenizer: Tokenizer) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise UserError("synthesizer.engine: openai is not installed here; launch/setup.sh openai") from error
        assert settings.server is not None
        self._name = f"synthesizer.server {settings.server}"
        if "@" in settings.server:
            raise UserError(f"synthesizer.server: contains a password or key; remove it and set {KEY}")
        self._openai, self._settings, self.tokenizer = openai, settings, tokenizer
        self.places = settings.max_num_seqs
        self._places = Places(self.places)
        self._client = openai.AsyncOpenAI(
            base_url=settings.server,
            api_key=os.environ.get(KEY) or "none",
            max_retries=0,
            timeout=openai.Timeout(None, connect=CONNECT_SECONDS),
        )
        self._extras: dict[str, Any] | None = None  # unknown before the first request
        self._takes_text: bool | None = None  # in place of token ids; unknown before the first completion
        self._checking, self._deciding = asyncio.Lock(), asyncio.Lock()
        chat = chat_format(settings, tokenizer)
        self._template_options = chat.settings.template_options if chat else {}
        self._answered = 0.0  # time of the server's last answer
        self._seen = self._away = False

    async def generate(self, request: GenerationRequest) -> Completion:
        extras = await self._known_extras()
        asked = {"max_tokens": request.max_new_tokens, **self._sampling(request)}
        body = {**extras, **self._body}
        if request.messages is not None:
            if self._template_options:
                body["chat_template_kwargs"] = self._template_options
            body.pop("return_token_ids", None)  # answers are parsed as the text that the server makes of them
            asked = {"messages": request.messages, **asked, "extra_body": body}
            return self._reply(await self._complete(asked, request.id, request.priority), request)
        return await self._from_prompt({**asked, "extra_body": body}, request)

    def _sampling(self, request: GenerationRequest) -> dict[str, Any]:
        found: dict[str, Any] = {"temperature": request.temperature}
        if request.temperature > 0:
            found["seed"] = request.seed
        if self._settings.top_p < 1:
            found["top_p"] = self._settings.top_p
        if self._settings.stop:
            found["stop"] = self._settings.stop
        return found

    @property
    def _body(self) -> dict[str, Any]:
        """Sampling fields that OpenAI's own API lacks, where they are set."""
        return self._settings.stated({"top_k", "min_p", "repetition_penalty"})

    async def _from_prompt(self, asked: dict[str, Any], request: GenerationRequest) -> Completion:
        """The completion of a prompt. The first one decides whether the server takes token ids."""
        if self._takes_text is None:
            async with self._deciding:
                if self._takes_text is None:
                    return await self._decide(asked, request)
        prompt = self._spelled(request.prompt_ids) if self._takes_text else request.prompt_ids
        reply = await self._complete({"prompt": prompt, **asked}, request.id, request.priority)
        return self._reply(reply, request)

    async def _decide(self, asked: dict[str, Any], request: GenerationRequest) -> Completion:
        try:
            reply = await self._complete({"prompt": request.prompt_ids, **asked}, request.id, request.priority)
            self._takes_text = False
        except RequestFailed as failure:
            text = {"prompt": self._spelled(request.prompt_ids), **asked}
            try:
                reply = await self._complete(text, request.id, request.priority)
            except RequestFailed:
                raise failure from None
            self._takes_text = True
            log.warning("server %s: refuses token ids (%s); prompts are sent as text", self._settings.server, failure)
        return self._reply(reply, request)

    def _spelled(self, ids: list[int]) -> str:
        """The prompt as text with its control tokens spelled; without the first BOS, which servers add."""
        tokenizer, pieces, start = self.tokenizer, [], 0
        controls = {tokenizer.bos_id, tokenizer.eos_id}
        for place, token in enumerate([*ids, None]):
            if token is None or token in controls:
                pieces.append(tokenizer.spell(ids[start:place], first=True))
                pieces.append("" if token is None or not place else tokenizer.control_name(token))
                start = place + 1
        return "".join(pieces)

    async def score(self, prompt_ids: list[int], answer_ids: list[int], *, request_id: str) -> float:
        """Needs a vLLM server: others return no log-probabilities of a prompt's tokens."""
        if not await self._known_extras():
            raise UserError(f"{self._name}: is not a vLLM server, which scores require; remove them or use one")
        asked = {"prompt": prompt_ids + answer_ids, "max_tokens": 1, "temperature": 0.0}
        reply = await self._complete({**asked, "extra_body": {"prompt_logprobs": 0}}, request_id, 0)
        found = getattr(reply.choices[0], "prompt_logprobs", None) or []
        if len(found) != len(prompt_ids) + len(answer_ids):
            raise RequestFailed("the server's reply holds no log-probabilities")
        places = zip(found[len(prompt_ids) :], answer_ids, strict=True)
        return sum(float(place[str(token)]["logprob"]) for place, token in places)

    async def _complete(self, asked: dict[str, Any], request_id: str, priority: int) -> Any:
        """The server's reply, requested when a place is free."""
        client = self._client
        create: Any = client.chat.completions.create if "messages" in asked else client.completions.create
        async with self._places.hold(priority):
            return await self._answer(lambda: create(model=self._settings.served_name, **asked), request_id)

    async def _known_extras(self) -> dict[str, Any]:
        """The server's own request fields: none unless it is vLLM. Checks the server once."""
        async with self._checking:
            if self._extras is None:
                is_vllm = (await self._served_model()).owned_by == "vllm"
                self._extras = {"return_token_ids": True, "stop_token_ids": [self.tokenizer.eos_id]} if is_vllm else {}
                self._takes_text = False if is_vllm else None
        return self._extras

    async def _served_model(self) -> Served:
        """Raises UserError if the server has another model or API, or a smaller context."""
        reply = await self._answer(self._client.models.with_raw_response.list, "models")
        try:
            served = msgspec.json.decode(reply.content, type=ServedModels).data
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self._name}: its /models is not a list of models ({error}); set the base URL of an "
                "OpenAI-compatible server, which mostly ends in /v1"
            ) from error
        name, longest = self._settings.served_name, self._settings.max_model_len
        found = next((model for model in served if model.id == name), None)
        if found is None:
            names = ", ".join(model.id for model in served) or "nothing"
            raise UserError(f"{self._name}: serves {names}, not {name}; set synthesizer.served_model")
        if found.max_model_len is not None and longest > found.max_model_len:
            raise UserError(f"synthesizer.max_model_len: {longest}, the server's is {found.max_model_len}; lower it")
        return found

    async def _answer(self, ask: Callable[[], Awaitable[Any]], request_id: str) -> Any:
        """The server's reply, after retries."""
        first_failure, pauses, tries = None, 0, 0
        while True:
            try:
                async with time_limit(self._settings.request_timeout_seconds):
                    reply = await ask()
            except self._openai.APIError as error:
                tries += self._blames_request(error)
                if tries == TRIES:
                    raise RequestFailed(f"the server failed {TRIES} times: {line(error)}", lasting=True) from error
                first_failure = first_failure or time.monotonic()
                await self._pause(error, first_failure, request_id, pauses)
                pauses += 1
            else:
                self._is_back()
                return reply

    def _blames_request(self, error: Any) -> bool:
        """Whether the request may be the cause. Raises errors that no retry repairs."""
        if not isinstance(error, self._openai.APIStatusError):
            reached = not type(error.__cause__).__name__.startswith("Connect")  # ConnectError, ConnectTimeout
            self._seen = self._seen or reached
            return reached
        self._seen = True
        if error.status_code in (401, 403):
            raise UserError(f"{self._name}: refuses the key ({error.status_code}); set another {KEY}") from error
        if error.status_code == 404:
            raise UserError(f"{self._name}: {line(error)}; set the base URL, which mostly ends in /v1") from error
        if error.status_code < 500 and error.status_code not in (408, 429):
            self._is_back()
            raise RequestFailed(line(error), "refused") from error
        return error.status_code not in OVERLOADED

    async def _pause(self, error: Any, first_failure: float, request_id: str, pauses: int) -> None:
        """Waits before the next try. Raises EngineDied after too long, and UserError soon if no server was reached."""
        if not self._seen and pauses + 1 == STARTUP_TRIES:
            raise UserError(f"{self._name}: cannot be reached ({line(error)}); start it, or set another URL") from error
        server, patience = self._settings.server, self._settings.server_patience_seconds
        if time.monotonic() - max(first_failure, self._answered) > patience:
            raise EngineDied(f"server {server} answered no request for {patience:g} s ({line(error)})") from error
        if self._seen and not self._away:
            self._away = True
            log.warning("server %s: %s; waiting up to %g s for it", server, line(error), patience)
        longest = min(FIRST_PAUSE * 2 ** min(pauses, 20), LONGEST_PAUSE)
        # Scattered, so that requests that failed together are not retried together.
        pause = longest * (0.5 + 0.5 * uniform(0, "pause", request_id, pauses))
        await asyncio.sleep(max(pause, retry_after(error)))

    def _is_back(self) -> None:
        if self._away:
            self._away = False
            log.warning("server %s answers again", self._settings.server)
        self._seen = True
        self._answered = time.monotonic()

    def _reply(self, reply: Any, request: GenerationRequest) -> Completion:
        choices = getattr(reply, "choices", None)  # a reply that is not JSON is a string
        if not choices:
            raise RequestFailed(f"the server's reply holds no completion: {str(reply)[:100]}")
        choice, tokenizer, usage = choices[0], self.tokenizer, reply.usage
        reason = finish_reason(choice.finish_reason)
        details = getattr(usage, "prompt_tokens_details", None)
        cached = getattr(details, "cached_tokens", None) or 0
        if request.messages is not None:
            text = answer_text(choice.message)
            text = min((text.partition(one)[0] for one in self._settings.stop), key=len, default=text)
            ids, counted = tokenizer.encode(text, continuing=True), getattr(usage, "prompt_tokens", None)
            return Completion(ids, reason, counted or len(request.prompt_ids), cached, recoded=True, text=text)
        sampled = getattr(choice, "token_ids", None)
        ids = tokenizer.encode(choice.text or "", continuing=True) if sampled is None else sampled
        kept = cut_at_stop(tokenizer, without_eos(list(ids), tokenizer.eos_id), self._settings.stop)
        return Completion(
            kept, reason, len(request.prompt_ids), cached, recoded=sampled is None, text_prompt=bool(self._takes_text)
        )

    async def close(self) -> None:
        await self._client.close()


def finish_reason(said: Any) -> str:
    """`stop`, `length`, or the server's word; `null` if it says none. Raises RequestFailed for an aborted request."""
    if said is None:
        return "null"
    word = str(said).lower()
    if word in FAILED:
        raise RequestFailed(f"the server finished with {said!r}")
    return FINISHED.get(word, word if word.replace("_", "").isalpha() and len(word) < 40 else "other")


def answer_text(message: Any) -> str:
    """The content of a chat answer, with the thinking that a server returns apart, so that it is counted."""
    thinking = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    return (f"<think>{thinking}</think>" if thinking else "") + (message.content or "")


def line(error: Any) -> str:
    """The server's message, else that of the connection."""
    source = error if hasattr(error, "response") else error.__cause__ or error
    return " ".join(str(source).split())[:200]


def retry_after(error: Any) -> float:
    """The seconds of `Retry-After`; 0 if it is missing or a date."""
    response = getattr(error, "response", None)
    asked = response.headers.get("retry-after", "") if response is not None else ""
    return min(float(asked), LONGEST_RETRY_AFTER) if asked.isdigit() else 0.0
