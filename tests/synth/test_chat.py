"""Chat models: the prompt file, the chat template as token ids, few-shot turns, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from extras import need
from fakeserver import FakeServer, serving
from synthkit import BOS, EOS, settings, write_tokenizer

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth import read_groups
from synth.config import RunSettings
from synth.engine import synthesizer_identity
from synth.format.chat import DEFAULT, ChatFormat, ChatPrompt, read_chat_template
from synth.format.wire import wire_pair
from synth.generate.run import run_synth

TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant: {% endif %}{{ extra | default('') }}"
)
PROMPT = """
system: "Be brief."
user: "{% if round == 1 %}Text: {% endif %}{{ text }}"
answers: lines
template_options: {extra: "!"}
"""


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    folder = write_tokenizer(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(folder)


@pytest.fixture
def chat(tmp_path: Path, tokenizer: Tokenizer) -> ChatFormat:
    (tmp_path / "prompt.yaml").write_text(PROMPT)
    return ChatFormat(tmp_path / "prompt.yaml", tokenizer, on_server=False)


def test_turns_are_the_templates_tokens(chat: ChatFormat, tokenizer: Tokenizer) -> None:
    prompt = ChatPrompt(chat)
    first = prompt.open("One </s> text </CON>.")

    def said(text: str) -> list[int]:
        return [BOS, *tokenizer.encode(text), EOS]

    opened = [BOS, *tokenizer.encode("assistant: !")]
    system, user = said("system: Be brief."), said("user: Text: One < /s> text < /CON>.")
    assert first == system + user + opened
    pairs = [wire_pair("Who?", "Ann"), wire_pair("Where?", "Rome", ["Rome", "Oslo"])]
    answer = "Q: Who?\nA: Ann\n\nQ: Where?\nOptions:\n- Rome\n- Oslo\nA: Rome"
    lost = prompt.close(tokenizer.encode(answer[:5] + " " + answer[5:]), pairs)
    assert lost == len(tokenizer.encode(answer)) - 5
    second = prompt.open("Two.")
    assert second == system + user + said(f"assistant: {answer}") + said("user: Two.") + opened
    assert prompt.open("Two.", max_tokens=len(second) - 1) == system + said("user: Two.") + opened
    assert prompt.messages[1:] == [{"role": "user", "content": "Two."}]
    assert chat.answer([wire_pair("Who </s>?", "Ann")]) == "Q: Who < /s>?\nA: Ann"


def test_a_turn_without_accepted_pairs_is_not_shown(chat: ChatFormat) -> None:
    prompt = ChatPrompt(chat)
    prompt.open("One.")
    assert prompt.close([5, 6], []) == 0
    assert [message["role"] for message in (prompt.open("Two."), prompt.messages)[1]] == ["system", "user"]


def test_a_template_that_refuses_system_messages_gets_it_in_the_first_turn(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(refuses + TEMPLATE)
    (tmp_path / "prompt.yaml").write_text(PROMPT)
    chat = ChatFormat(tmp_path / "prompt.yaml", load_tokenizer(tmp_path / "model"), on_server=False)
    text = tokenizer.decode(ChatPrompt(chat).open("One."))
    assert text == "user: Be brief.\n\nText: One.assistant: !"


def test_template_is_found_in_the_config_too(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "other")
    tokenizer, config = load_tokenizer(folder), json.loads((folder / "tokenizer_config.json").read_text())
    assert read_chat_template(tokenizer) is None
    for stored in ("abc", [{"name": "tool", "template": "no"}, {"name": "default", "template": "abc"}]):
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": stored}))
        assert read_chat_template(tokenizer) == "abc"


@pytest.mark.extra
def test_ids_equal_those_of_transformers(tmp_path: Path) -> None:
    transformers = need("transformers", extra="test")
    folder = write_tokenizer(tmp_path / "model")
    trimming = TEMPLATE.replace("{{ m.content }}", "\n  {%- if m.content %}\n{{ m.content | trim }}\n  {%- endif %}")
    (folder / "chat_template.jinja").write_text(trimming)
    tokenizer, theirs = load_tokenizer(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    prompt = ChatPrompt(ChatFormat(DEFAULT, tokenizer, on_server=False))
    prompt.open("One text.")
    prompt.close([], [wire_pair("Who?", "Ann")])
    ids = prompt.open("  Two texts. ")
    expected = theirs.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=False)
    assert ids == list(expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user: '{{ txt }}'", "'txt' is undefined; correct the template"),
        ("user: '{{ text'", "correct the template"),
        ("usr: a", "unknown key 'usr'; did you mean 'user'"),
        ("{answers: tags}", "user is missing; add it"),
    ],
)
def test_mistakes_of_the_prompt_file_are_one_line(
    tmp_path: Path, tokenizer: Tokenizer, content: str, message: str
) -> None:
    (tmp_path / "prompt.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        run_synth(chat_run(tmp_path, synthesizer__prompt_file=str(tmp_path / "prompt.yaml")))
    assert not (tmp_path / "groups").exists()


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no chat template .*; use prompt: completion"):
        run_synth(chat_run(tmp_path))


def chat_run(folder: Path, **changes: object) -> RunSettings:
    return settings(folder, **{"synthesizer__prompt": "chat", "synthesizer__max_model_len": 5000, **changes})


def test_a_run_on_the_scripted_engine(tmp_path: Path, tokenizer: Tokenizer) -> None:
    result = run_synth(chat_run(tmp_path))
    assert (result["texts"], result["failed"], result["rejected"].keys() - {"duplicate_question"}) == (30, {}, set())
    assert result["pairs"] > 30
    assert all(text.prompt_tokens <= 4400 for group in read_groups(tmp_path / "groups") for text in group.texts)


def test_long_texts_are_cut_and_split_to_the_conversations_room(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": "a", "text": "Anna walks. " * 400}) + "\n")
    small = {"synthesizer__max_model_len": 2500, "rounds": 1}
    result = run_synth(chat_run(tmp_path, long_texts="split", **small))
    texts = [text for group in read_groups(tmp_path / "groups") for text in group.texts]
    assert result["texts_cut"] == 0 and result["texts"] == len(texts) > 3
    assert sum(text.end - text.start for text in texts) == 4800
    assert all(text.prompt_tokens <= 1900 for text in texts)


def test_scores_that_need_the_wire_format_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="agreement: need a synthesizer with prompt: completion"):
        run_synth(chat_run(tmp_path, verify=["agreement", "grounded"]))
    assert run_synth(chat_run(tmp_path, verify=["options", "grounded"]))["scores"].keys() == {"grounded", "options"}


def test_the_prompt_decides_the_identity(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def identity(**changes: object) -> object:
        given = chat_run(tmp_path, **{f"synthesizer__{name}": value for name, value in changes.items()}).synthesizer
        return synthesizer_identity(given, load_tokenizer(tmp_path / "model"))

    (tmp_path / "a.yaml").write_text(PROMPT)
    (tmp_path / "b.yaml").write_text(PROMPT + "\n# the same\n")
    (tmp_path / "c.yaml").write_text(PROMPT.replace("brief", "long"))
    a, b, c = (identity(prompt_file=str(tmp_path / f"{name}.yaml")) for name in "abc")
    assert a == b != c
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE + " ")
    assert identity(prompt_file=str(tmp_path / "a.yaml")) != a


@pytest.mark.extra
def test_a_chat_server_gets_turns_and_its_wrapped_answers_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    need("openai", extra="openai")
    (tmp_path / "prompt.yaml").write_text(PROMPT)
    wrap = "<think>Names first.</think>\nHere you are:\n```\n{}\n```"
    with serving(FakeServer(tokenizer, owner="them", wrap=wrap, finish="eos_token")) as server:
        run = chat_run(
            tmp_path,
            texts=9,
            synthesizer__engine="openai",
            synthesizer__server=server.url,
            synthesizer__max_model_len=2000,
            synthesizer__prompt_file=str(tmp_path / "prompt.yaml"),
            synthesizer__top_p=0.9,
            synthesizer__top_k=40,
            synthesizer__stop=["\n\n\n"],
        )
        result = run_synth(run)
    assert (result["texts"], result["finished"], result["failed"]) == (9, {"stop": 9}, {})
    assert result["pairs"] >= 9 and set(result["rejected"]) <= {"duplicate_question"}
    assert (result["chat_thinking"], result["chat_code_fences"], result["chat_remarks"]) == (9, 9, 9)
    asked = max(server.requests, key=lambda one: len(one["messages"]))
    assert [one["role"] for one in asked["messages"]] == "system user assistant user assistant user".split()
    assert asked["messages"][2]["content"].startswith("Q: ")
    assert {name: asked[name] for name in ("top_p", "top_k", "stop")} == {"top_p": 0.9, "top_k": 40, "stop": ["\n\n\n"]}
    assert asked["chat_template_kwargs"] == {"extra": "!"} and "prompt" not in asked
