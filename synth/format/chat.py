"""Prompts of chat models: the prompt file, few-shot turns, and the model's chat template as token ids.

Guaranteed: a text cannot end its turn: spellings of the tokenizer's control tokens and of the format's tags are broken
in it. The clock is not read: templates that ask for a date get none.
Not guaranteed: exact budgets for a server whose chat template is not beside the tokenizer; then a turn counts
TURN_TOKENS more than its text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import digest
from ipt_jax.core.settings import Settings, load_settings
from ipt_jax.corpus.records import Pair
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import SynthesizerSettings
from synth.format.prompt import common_prefix, context_tokens
from synth.format.wire import final_answer, pairs_text, question_stem, shown

DEFAULT = Path(__file__).with_name("chat_prompt.yaml")
TURN_TOKENS = 16  # of a turn beside its content, where the chat template is not known
GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # marks targets, for training
Message = dict[str, str]
Turn = tuple[str, str]  # the user's text and the assistant's answer


class ChatPromptSettings(Settings):
    """The prompt file of a chat model."""

    system: str = ""
    """Jinja template of the system message. Empty: none."""
    user: str
    """Jinja template of a text's turn. Variables: text, round."""
    answers: Literal["tags", "lines", "json"] = "tags"
    """Form of the assistant's answers in earlier turns."""
    template_options: dict[str, Any] = {}
    """Variables of the model's chat template."""


class ChatFormat:
    """The prompt file and the chat template of a run."""

    def __init__(self, path: Path, tokenizer: Tokenizer, *, on_server: bool) -> None:
        self.path, self.tokenizer, self.on_server = path, tokenizer, on_server
        self.settings = load_settings(ChatPromptSettings, path)
        self.template = read_chat_template(tokenizer)
        if self.template is None and not on_server:
            raise UserError(
                f"synthesizer.prompt: chat, but {tokenizer.directory} has no chat template (chat_template.jinja, or "
                "chat_template in tokenizer_config.json); use prompt: completion, or copy the template there"
            )
        controls = sorted(tokenizer.control_spellings, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, controls)) or r"(?!)")
        self.user("", 1)  # a mistake in the file is an error before the first request

    def __reduce__(self) -> Any:
        return _rebuilt, (self.path, self.tokenizer, self.on_server)

    @property
    def digest(self) -> str:
        return digest([self.settings.model_dump(), self.template])

    @cached_property
    def _file_templates(self) -> dict[str, jinja2.Template]:
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
        try:
            stored = {"system": self.settings.system, "user": self.settings.user}
            return {name: environment.from_string(text) for name, text in stored.items()}
        except jinja2.TemplateError as error:
            raise UserError(f"prompt_file {self.path}: {error}; correct the template") from error

    def user(self, text: str, number: int) -> str:
        """The user's message for a text, the `number`-th of its group."""
        return self._render("user", text=self._harmless(shown(text)), round=number)

    def _harmless(self, text: str) -> str:
        """'</s>' -> '< /s>': the text without spellings of control tokens."""
        return self._controls.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def _render(self, name: str, **variables: object) -> str:
        try:
            return self._file_templates[name].render(**variables)
        except jinja2.TemplateError as error:
            raise UserError(f"prompt_file {self.path}: {name}: {error}; correct the template") from error

    def answer(self, pairs: Sequence[Pair]) -> str:
        """The assistant's answer with these pairs."""
        if self.settings.answers == "json":
            written = json.dumps([json_pair(pair) for pair in pairs], ensure_ascii=False, indent=1)
        elif self.settings.answers == "lines":
            written = "\n\n".join(f"Q: {pair.question}\nA: {pair.answer}" for pair in pairs)
        else:
            written = pairs_text(pairs)
        return self._harmless(written)

    def messages(self, turns: Sequence[Turn], last: str) -> list[Message]:
        """The system message, the earlier turns and the open one."""
        system = self._render("system").strip()
        found = [{"role": "system", "content": system}] if system else []
        for user, answer in turns:
            found += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        return [*found, {"role": "user", "content": last}]

    def encode(self, messages: list[Message]) -> list[int]:
        """The prompt's token ids; without a chat template about as many ids as a server will count."""
        if self.template is None:
            return [
                token for message in messages for token in [0] * TURN_TOKENS + self.tokenizer.encode(message["content"])
            ]
        try:
            return self.tokenizer.encode_rendered(self._chat(messages))
        except jinja2.TemplateError as error:
            if messages[0]["role"] != "system":
                raise UserError(f"{self.tokenizer.directory}: its chat template fails: {error}") from error
            first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            return self.encode([first, *messages[2:]])  # Gemma's template refuses system messages

    @cached_property
    def _chat(self) -> Callable[[list[Message]], str]:
        """Renders messages as transformers does."""

        def fail(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = fail
        assert self.template is not None
        template = environment.from_string(GENERATION_TAG.sub("", self.template))
        tokenizer = self.tokenizer
        names = {
            f"{name}_token": "" if token is None else tokenizer.control_name(token)
            for name, token in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id))
        }
        options = {**names, "add_generation_prompt": True, **self.settings.template_options}
        return lambda messages: template.render(messages=messages, **options)

    def count(self, text: str, tokenizer: Tokenizer) -> int:
        """Tokens of a prompt with this text alone."""
        return len(self.encode(self.messages([], self.user(text, 1))))


def _rebuilt(path: Path, tokenizer: Tokenizer, on_server: bool) -> ChatFormat:
    return ChatFormat(path, tokenizer, on_server=on_server)


class ChatPrompt:
    """The growing conversation of a group, with the interface of `Prompt`. An example is a turn."""

    def __init__(self, chat: ChatFormat, examples: Sequence[Turn] = ()) -> None:
        self.chat, self.examples = chat, list(examples)
        self.messages: list[Message] = []
        self._open, self._rounds = "", 0

    def sized_example(self, text: str, pairs: Sequence[Pair]) -> tuple[Turn, int]:
        """A turn and the tokens that it adds to a prompt."""
        turn, chat = (self.chat.user(text, 1), self.chat.answer(pairs)), self.chat
        return turn, len(chat.encode(chat.messages([turn], ""))) - len(chat.encode(chat.messages([], "")))

    def open(self, text: str, max_tokens: int | None = None) -> list[int]:
        """The prompt for this text's pairs. Drops the oldest turns if it would exceed max_tokens."""
        self._rounds += 1
        self._open = self.chat.user(text, self._rounds)
        while True:
            self.messages = self.chat.messages(self.examples, self._open)
            ids = self.chat.encode(self.messages)
            if max_tokens is None or len(ids) <= max_tokens or not self.examples:
                return ids
            self.examples.pop(0)

    def close(self, completion_ids: Sequence[int], pairs: Sequence[Pair]) -> int:
        """Appends the accepted pairs as a turn; returns how many of its tokens a prefix cache cannot reuse."""
        accepted = [pair for pair in pairs if pair.accepted]
        if not accepted:
            return 0
        answer = self.chat.answer(accepted)
        self.examples.append((self._open, answer))
        ids = self.chat.tokenizer.encode(answer, continuing=True)
        return len(ids) - common_prefix(ids, completion_ids)


def read_chat_template(tokenizer: Tokenizer) -> str | None:
    """The Jinja text in `chat_template.jinja`, else in tokenizer_config.json. Of several, the default one."""
    file, config = (tokenizer.directory / name for name in ("chat_template.jinja", "tokenizer_config.json"))
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}.get("default")
    return found


def json_pair(pair: Pair) -> dict[str, Any]:
    found: dict[str, Any] = {"question": question_stem(pair)}
    if pair.options:
        found["options"] = pair.options
    if pair.rationale is not None:
        found["rationale"] = pair.rationale
    return {**found, "answer": final_answer(pair)}


@lru_cache(maxsize=4)
def _chat_format(path: Path, tokenizer: Tokenizer, on_server: bool) -> ChatFormat:
    return ChatFormat(path, tokenizer, on_server=on_server)


def chat_format(synthesizer: SynthesizerSettings, tokenizer: Tokenizer) -> ChatFormat | None:
    """The format of `prompt: chat`, read once. None for `prompt: completion`. Raises UserError."""
    if synthesizer.prompt == "completion":
        return None
    return _chat_format(Path(synthesizer.prompt_file or DEFAULT), tokenizer, synthesizer.engine == "openai")


def text_tokens(synthesizer: SynthesizerSettings, tokenizer: Tokenizer) -> Callable[[str, Tokenizer], int]:
    """The function that counts the tokens of a text's prompt."""
    chat = chat_format(synthesizer, tokenizer)
    return chat.count if chat else context_tokens
