"""Generation and scoring against the plain forward pass; a row's result against its company."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.tokenizer import load_tokenizer
from ipt_jax.inference.language_model import BatchGenerator, LanguageModel
from ipt_jax.model.config import ModelConfig
from ipt_jax.model.decoder import init_params

CONFIG = ModelConfig(
    vocab_size=53, hidden_size=32, layers=2, q_heads=4, kv_heads=2, head_dim=8, intermediate_size=48, max_positions=160,
    initializer_range=0.4,
)  # fmt: skip
WORDS = ["<s>", "</s>", "<unk>", "the", "cat", "sat", "on", "a", "mat", *(f"word{n}" for n in range(44))]
ROWS, LENGTH, NEW = 8, 96, 24  # what `generate` comes to for six prompts: every test that can shares the compiled code


def language_model(**changes: object) -> LanguageModel:
    config = CONFIG.model_copy(update=changes)
    return LanguageModel(config, init_params(config, jax.random.key(0)))


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    draw = np.random.default_rng(7)
    return [draw.integers(3, 53, size=int(n)).tolist() for n in draw.integers(1, longest, size=count)]


def row_logits(model: LanguageModel, ids: list[int]) -> np.ndarray:
    """Logits of one row, at a length that is compiled once."""
    return model.logits(ids + [0] * (96 - len(ids)))[: len(ids)]


def without_cache(model: LanguageModel, prompt: list[int], new: int) -> list[int]:
    """Greedy, running the whole row for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + new:
        best = int(row_logits(model, ids)[-1].argmax())
        if best == model.config.eos_id:
            break
        ids.append(best)
    return ids[len(prompt) :]


@pytest.mark.parametrize("window", [None, 8])
def test_greedy_equals_the_argmax_without_a_cache(window: int | None) -> None:
    model = language_model(sliding_window=window, eos_id=None)
    asked = prompts(6)
    assert model.generate(asked, NEW) == [without_cache(model, prompt, NEW) for prompt in asked]


def test_eos_ends_a_row_and_is_left_out() -> None:
    asked = prompts(6)
    free = language_model(eos_id=None).generate(asked, NEW)
    end = next(token for token in free[0] if free[0].index(token) > 2)  # a token that first stands past the start
    model = language_model(eos_id=end)
    cut = [ids[: ids.index(end)] if end in ids else ids for ids in free]
    assert model.generate(asked, NEW) == cut != free
    assert model.generate(asked, NEW, eos=False) == free
    done = BatchGenerator(model, ROWS, LENGTH, NEW).run([(prompt, 0) for prompt in asked])
    assert [one.ids for one in done] == cut
    assert [one.finish_reason for one in done] == ["stop" if end in ids else "length" for ids in free]


def test_a_row_depends_on_its_own_prompt_and_seed_alone() -> None:
    model = language_model(eos_id=None)
    requests = [(prompt, (number << 33) + 5) for number, prompt in enumerate(prompts(13))]
    together = BatchGenerator(model, ROWS, LENGTH, NEW).run(requests, temperature=1.0)
    backwards = BatchGenerator(model, 4, LENGTH, NEW).run(requests[::-1], temperature=1.0)[::-1]
    assert [one.ids for one in together] == [one.ids for one in backwards]
    again = BatchGenerator(model, ROWS, LENGTH, NEW).run([(requests[0][0], 6)], temperature=1.0)
    assert again[0].ids != together[0].ids


def test_temperature_draws_from_the_models_distribution() -> None:
    model = language_model(eos_id=None)
    prompt, temperature, count = prompts(1)[0], 0.7, 512
    generator = BatchGenerator(model, ROWS, LENGTH, NEW)
    for seed in range(count):
        generator.add(prompt, seed, max_new_tokens=1, temperature=temperature)
    drawn: list[int] = []
    while generator.pending:
        drawn += [done.ids[0] for done in generator.step()]
    shares = np.bincount(drawn, minlength=53) / count
    logits = row_logits(model, prompt)[-1] / temperature
    expected = np.exp(logits - logits.max())
    assert np.abs(shares - expected / expected.sum()).sum() < 0.25


def test_limits_are_per_request_and_cut_at_the_context() -> None:
    model = language_model(eos_id=None)
    generator = BatchGenerator(model, ROWS, LENGTH, NEW)
    generator.add([5] * 93)  # three places are left
    generator.add([5] * 4, max_new_tokens=7)
    generator.add([5] * 4, max_new_tokens=1000)
    lengths = {}
    while generator.pending:
        lengths |= {done.number: len(done.ids) for done in generator.step()}
    assert lengths == {0: 3, 1: 7, 2: NEW}
    with pytest.raises(UserError, match="prompt of 96 tokens"):
        generator.add([5] * LENGTH)


def test_loglikelihood_sums_the_continuations_own_tokens() -> None:
    model = language_model()
    asked, answers = prompts(7), [prompt[:9] for prompt in prompts(7)]
    answers[0] = without_cache(language_model(eos_id=None), asked[0], 6)
    for prompt, answer, score in zip(asked, answers, model.loglikelihood(asked, answers), strict=True):
        logits = row_logits(model, prompt + answer).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(answer))
        assert score.logprob == pytest.approx(expected, abs=1e-4) == float(score)
        assert score.tokens == len(answer)
    assert model.loglikelihood(asked[:1], answers[:1])[0].greedy
    assert not model.loglikelihood(asked[:1], [[3, 4, 5, 6]])[0].greedy


@pytest.fixture
def worded(tmp_path: Path) -> LanguageModel:
    """A model with a tokenizer of whole words."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<s>", "</s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    model = language_model(bos_id=0, eos_id=1)
    model.tokenizer = load_tokenizer(tmp_path)
    return model


def test_text_prompts_get_bos_and_give_text(worded: LanguageModel) -> None:
    tokenizer = worded.tokenizer
    assert tokenizer is not None
    texts = ["the cat sat", "the cat", "cat", "a mat", "the", " ".join(WORDS[3:40])]
    ids = [[0, *tokenizer.encode(text)] for text in texts]
    assert [worded.encode(text) for text in texts] == ids
    assert worded.generate(texts, NEW) == [tokenizer.decode(new) for new in worded.generate(ids, NEW)]
    score = worded.loglikelihood(["the cat sat"], ["on a mat"])[0]
    assert score.tokens == 3
    assert score == worded.loglikelihood([ids[0]], [worded.encode("on a mat", continuing=True)])[0]


def test_mistakes_are_told(worded: LanguageModel) -> None:
    model = language_model()
    with pytest.raises(UserError, match="no tokenizer files"):
        model.generate(["text"], 4)
    with pytest.raises(UserError, match="prompt 0 has no tokens"):
        model.loglikelihood([[]], [[4]])
    with pytest.raises(UserError, match="context has 160"):
        model.generate([[5] * 150], 11)
    with pytest.raises(UserError, match="1 prompts for 2 continuations"):
        worded.loglikelihood(["a"], ["b", "c"])
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        model.generate([[5]], 0)


def test_the_model_is_a_flax_module() -> None:
    """`load(path).model` is called, differentiated and updated by flax.nnx; `logits` and `generate` see the update."""
    loaded = language_model(layers=1)
    tokens = jnp.arange(1, 13).reshape(2, 6)
    np.testing.assert_allclose(loaded.model(tokens), loaded.logits(tokens), atol=1e-5)
    assert loaded.model.layers.attention.query.axes == ("layers", "embed", "q_heads", "head_dim")
    optimizer = nnx.Optimizer(loaded.model, optax.sgd(1.0), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda model: jnp.square(model(tokens)).mean())(model)
        optimizer.update(model, grads)
        return loss

    before = loaded.logits(tokens)
    first, second = step(loaded.model, optimizer), step(loaded.model, optimizer)
    assert second < first
    np.testing.assert_allclose(first, np.square(before).mean(), rtol=1e-5)
    np.testing.assert_allclose(loaded.model(tokens), loaded.logits(tokens), atol=1e-5)


def test_bad_arguments_are_refused_by_name() -> None:
    model = language_model()
    for call, message in (
        (lambda: model.generate("the cat", 4), "prompts is a string; pass a list, such as ['the cat']"),
        (lambda: model.loglikelihood(["a"], "b"), "continuations is a string; pass a list, such as ['b']"),
        (lambda: model.generate([[5, 53]], 4), "prompts: token id 53; expected integers from 0 to 52"),
        (lambda: model.generate([[5, -1]], 4), "prompts: token id -1; expected integers from 0 to 52"),
        (lambda: model.generate([[5, 1.5]], 4), "prompts: token id 1.5; expected integers from 0 to 52"),
        (lambda: model.logits([5, 53]), "tokens: token id np.int32(53); expected integers from 0 to 52"),
        (lambda: model.generate([[5]], 4, temperature=-1), "temperature is -1; expected a finite number, 0 or more"),
        (lambda: model.generate([[5]], 4, temperature=np.nan), "temperature is nan; expected a finite number"),
        (lambda: model.generate([[5]], 2.5), "max_new_tokens is 2.5; expected an integer, 1 or more"),
        (lambda: model.generate([[5]], 0), "max_new_tokens is 0; expected an integer, 1 or more"),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value).startswith(message)
