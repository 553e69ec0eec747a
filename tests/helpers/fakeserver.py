"""An OpenAI-compatible server on a thread, which answers as the scripted engine does, or fails as told."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import SynthesizerSettings
from synth.engine.base import GenerationRequest
from synth.engine.scripted import ScriptedEngine

# One request's fate: a status, a status with headers, 'drop' (closed without a reply), 'leave' (the same, and `left` is
# set), 'hang', 'filter' (cut by policy).
Fate = int | tuple[int, dict[str, str]] | str


class FakeServer(ThreadingHTTPServer):
    """`fates` befall the next completions one after the other, then all goes well; `requests` are the bodies seen."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        port: int = 0,
        name: str = "model",
        owner: str = "vllm",
        key: str | None = None,
        takes_ids: bool = True,
        finish: str | None = "",
        wrap: str = "{}",
    ) -> None:
        """`takes_ids`: else prompts must be text. `finish`: the word of every finish reason. `wrap`: around a chat."""
        super().__init__(("127.0.0.1", port), Handler)
        self.engine = ScriptedEngine(SynthesizerSettings(model="m", engine="scripted"), tokenizer)
        self.name, self.owner, self.key = name, owner, key
        self.takes_ids, self.finish, self.wrap = takes_ids, finish, wrap
        self.fates: list[Fate] = []
        self.left = Event()
        self.requests: list[dict[str, Any]] = []
        self.models: tuple[str, str] | None = None  # type and body of another service's reply to /models
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the play."""


@contextmanager
def serving(server: FakeServer) -> Any:
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, format: str, *arguments: Any) -> None: ...

    def reply(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.reply(401, {"error": {"message": "wrong key"}})
        elif self.server.models:
            self.send(200, self.server.models[1].encode(), {"Content-Type": self.server.models[0]})
        elif self.path == "/v1/models":
            card = {"id": self.server.name, "object": "model", "owned_by": self.server.owner, "max_model_len": 2000}
            self.reply(200, {"object": "list", "data": [card]})
        else:
            self.reply(404, {"error": {"message": "Not Found"}})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(asked)
        fate = self.server.fates.pop(0) if self.server.fates else 200
        if fate in ("drop", "leave"):
            self.close_connection = True
            if fate == "leave":
                self.server.left.set()
        elif fate == "hang":
            time.sleep(5)
        elif isinstance(fate, tuple):
            self.reply(fate[0], {"error": {"message": "later"}}, fate[1])
        elif isinstance(fate, int) and fate != 200:
            self.reply(fate, {"error": {"message": f"told to say {fate}"}})
        elif isinstance(asked.get("prompt"), list) and not self.server.takes_ids:
            self.reply(422, {"error": {"message": "prompt: expected a string"}})
        else:
            self.reply(200, self.completion(asked, cut=fate == "filter"))

    def completion(self, asked: dict[str, Any], *, cut: bool) -> dict[str, Any]:
        engine, messages = self.server.engine, asked.get("messages")
        prompt = asked.get("prompt", [])
        if isinstance(prompt, str):  # as servers do: control tokens are read from the text, and BOS is added
            first, *others = prompt.split("</s><s>")
            prompt = [1, *engine.tokenizer.encode(first)]
            for other in others:
                prompt += [2, 1, *engine.tokenizer.encode(other)]
        answer = asyncio.run(
            engine.generate(GenerationRequest("g/1/1", prompt, max_new_tokens=asked["max_tokens"], messages=messages))
        )
        ids = answer.ids + [engine.tokenizer.eos_id] * (answer.finish_reason == "stop")
        choice: dict[str, Any] = {"index": 0, "text": engine.tokenizer.decode(answer.ids), "logprobs": None}
        choice["finish_reason"] = "content_filter" if cut else answer.finish_reason
        if self.server.finish != "":
            choice["finish_reason"] = self.server.finish
        if messages:
            choice["message"] = {"role": "assistant", "content": self.server.wrap.format(choice.pop("text"))}
        if asked.get("return_token_ids"):
            choice["token_ids"] = ids
        if asked.get("prompt_logprobs") == 0:
            told = [{str(token): {"logprob": -token / 8, "rank": 1}} for token in asked["prompt"]]
            choice["prompt_logprobs"] = [None, *told[1:]]
        usage = {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": len(ids),
            "total_tokens": answer.prompt_tokens + len(ids),
            "prompt_tokens_details": {"cached_tokens": 7},
        }
        return {
            "id": "c",
            "object": "chat.completion" if messages else "text_completion",
            "created": 0,
            "model": "model",
            "choices": [choice],
            "usage": usage,
        }
