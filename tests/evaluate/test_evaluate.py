"""Evaluation: what the model is asked, how its answers are scored, and what a mistaken task file is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from extras import need
from hypothesis import given
from hypothesis import strategies as st
from token_shards import save_tokenizer
from tokenizers import Tokenizer as JsonTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

import ipt_jax
from ipt_jax.core.errors import UserError
from ipt_jax.evaluate import run_eval
from ipt_jax.evaluate.perplexity import windows
from ipt_jax.evaluate.run import first_line, join
from ipt_jax.evaluate.tasks import (
    Question,
    answer_f1,
    mean_and_stderr,
    normalise,
    read_tasks,
    score_answer,
    score_choices,
)


class Letters:
    """A token a letter; BOS is 1."""

    bos_id = 1

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids if i != self.bos_id)


class FakeModel:
    """Likes a continuation by its number of vowels; answers every prompt with its last word."""

    def __init__(self) -> None:
        self.tokenizer = Letters()
        self.config = SimpleNamespace(max_positions=40)
        self.batches: list[list[str]] = []

    def encode(self, text: str, continuing: bool = False) -> list[int]:
        return [ord(letter) for letter in text] if continuing else [1, *self.encode(text, continuing=True)]

    def loglikelihood(self, prompts: list[list[int]], continuations: list[list[int]]) -> list[SimpleNamespace]:
        assert all(prompt[0] == 1 for prompt in prompts)
        texts = [self.tokenizer.decode(ids) for ids in continuations]
        self.batches.append([self.tokenizer.decode(a) + text for a, text in zip(prompts, texts, strict=True)])
        sums = [sum(letter in "aeiou" for letter in text) - len(text) for text in texts]
        return [SimpleNamespace(logprob=total, tokens=len(ids)) for total, ids in zip(sums, continuations, strict=True)]

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        assert all(len(prompt) + max_new_tokens <= 40 for prompt in prompts)
        words = [self.tokenizer.decode(prompt).split()[-1] for prompt in prompts]
        return [self.encode(f" {word}\nQuestion: more", continuing=True) for word in words]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    model = FakeModel()
    monkeypatch.setattr(ipt_jax, "load", lambda path, dtype: model)
    return model


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def choice(key: str, gold: int = 0, **more: Any) -> dict[str, Any]:
    return {"id": key, "prompt": "Where is it?", "choices": ["rhythm", "aeiou"], "gold": gold, **more}


def test_a_choice_task(tmp_path: Path, model: FakeModel) -> None:
    tasks = write(
        tmp_path / "places.jsonl", [choice("a", 1), choice("b", 1), choice("c", 0), choice("d", 1, topic="x")]
    )
    result = run_eval("some/model", [tasks], output=tmp_path / "out" / "eval.json", batch_size=3)
    task = result["tasks"]["places"]
    assert (task["metric"], task["value"], task["n"], task["chance"]) == ("acc_norm", 0.75, 4, 0.5)
    assert task["stderr"] == pytest.approx(0.5 / math.sqrt(4))  # sample sd of 1, 1, 0, 1 is 0.5
    assert set(task["metrics"]) == {"acc", "acc_norm", "acc_token"}
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == result
    rows = [json.loads(line) for line in (tmp_path / "out" / "eval.rows.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a", "b", "c", "d"]
    assert rows[0] == {
        **{"task": "places", "id": "a", "prompt": "Where is it?", "prediction": "aeiou", "answer": "aeiou"},
        **{
            "correct": True,
            "truncated": False,
            "acc_norm": 1.0,
            "acc": 1.0,
            "acc_token": 1.0,
            "logprobs": [-7, -1],
            "tokens": [7, 6],
        },
    }
    assert [len(batch) for batch in model.batches] == [3, 3, 2]
    assert model.batches[0][0] == "Where is it? rhythm"  # the longest first


def test_an_answer_task(tmp_path: Path, model: FakeModel) -> None:
    rows = [
        {"id": 1, "prompt": "Say Velmoor", "answer": "velmoor."},
        {"id": 2, "prompt": "Say no", "answer": ["yes", "No"]},
        {"id": 3, "prompt": "Say Issel", "answer": "river Issel"},
    ]
    result = run_eval("m", ["names=" + write(tmp_path / "t.jsonl", rows)], max_new_tokens=20)
    task = result["tasks"]["names"]
    assert (task["metric"], task["n"], task["chance"]) == ("exact_match", 3, None)
    assert task["value"] == pytest.approx(2 / 3)
    assert task["metrics"]["f1"]["value"] == pytest.approx((1 + 1 + 2 / 3) / 3)


def test_several_tasks_and_a_limit(tmp_path: Path, model: FakeModel) -> None:
    first = write(tmp_path / "a.jsonl", [choice(str(i)) for i in range(5)])
    second = write(tmp_path / "b.jsonl", [{"id": "q", "prompt": "x", "answer": "x"}])
    result = run_eval("m", [f"{first},other={second}"], limit=2, max_new_tokens=9)
    assert {name: task["n"] for name, task in result["tasks"].items()} == {"a": 2, "other": 1}
    assert result["tasks"]["other"]["stderr"] is None


def test_a_prompt_too_long_keeps_its_end_and_is_counted(tmp_path: Path, model: FakeModel) -> None:
    long = "x" * 100 + " Where is it?"
    path = write(tmp_path / "t.jsonl", [choice("a") | {"prompt": long}, choice("b")])
    assert run_eval("m", [path])["tasks"]["t"]["truncated"] == 1
    assert model.batches[0][0] == long[-(40 - 1 - 7) :] + " rhythm"  # BOS and 7 letters of the choice fill 40
    rows = [{"id": 1, "prompt": long, "answer": "it?"}]
    task = run_eval("m", [write(tmp_path / "g.jsonl", rows)], max_new_tokens=20)["tasks"]["g"]
    assert (task["value"], task["truncated"]) == (1.0, 1)
    with pytest.raises(UserError, match="leave no room"):
        run_eval("m", [str(tmp_path / "g.jsonl")], max_new_tokens=40)


@pytest.mark.parametrize(
    ("prompt", "continuation", "joined"),
    [
        ("Where?", "Velmoor", ("Where?", " Velmoor")),
        ("Where?  ", "Velmoor", ("Where?", " Velmoor")),
        ("Where?", " Velmoor", ("Where?", " Velmoor")),
        ("Where?", "\nVelmoor", ("Where?", "\nVelmoor")),
        ("Where?\n", "Velmoor", ("Where?\n", "Velmoor")),
    ],
)
def test_one_space_joins(prompt: str, continuation: str, joined: tuple[str, str]) -> None:
    assert join(prompt, continuation) == joined


def test_the_three_accuracies_differ_by_what_they_divide_by() -> None:
    # log-likelihoods -4, -6, -7; bytes 2, 6, 10 -> -2, -1, -0.7; tokens 4, 9, 7 -> -1, -0.67, -1
    question = Question("q", "p", ("ab", "éab12", "abcdefghij"), gold=1)
    metrics, pick = score_choices(question, [-4.0, -6.0, -7.0], [4, 9, 7])
    assert metrics == {"acc": 0.0, "acc_norm": 0.0, "acc_token": 1.0}
    assert pick == 2
    assert score_choices(question, [-1.0, -3.0, -5.0], [1, 3, 5])[0]["acc_token"] == 0.0  # a tie goes to the first


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("The  Guild of\tLanterns.", ["the guild of lanterns"], 1.0, 1.0),
        ("guild", ["the guild of lanterns"], 0.0, 0.4),
        ("", ["x"], 0.0, 0.0),
        ("a a b", ["a b b"], 0.0, 2 / 3),
        ("U.S.A.", ["u.s.a"], 1.0, 1.0),
        ("B", ["A", "b"], 1.0, 1.0),
    ],
)
def test_answers_are_compared_without_case_space_and_full_stop(
    prediction: str, answers: list[str], exact: float, f1: float
) -> None:
    assert score_answer(prediction, answers) == {"exact_match": exact, "f1": pytest.approx(f1)}


@given(st.text(max_size=40), st.text(max_size=40))
def test_scores_are_symmetric_and_bounded(left: str, right: str) -> None:
    assert 0.0 <= answer_f1(left, right) <= 1.0
    assert answer_f1(left, right) == answer_f1(right, left)
    assert normalise(normalise(left) + " ") in (normalise(left), normalise(left).removesuffix(".").rstrip())


def test_a_generation_ends_at_its_first_newline() -> None:
    assert first_line(" Orsa Tamblin\nQuestion: next") == "Orsa Tamblin"
    assert first_line("\nlate") == ""


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=50))
def test_the_standard_error_of_a_proportion(values: list[float]) -> None:
    mean, stderr = mean_and_stderr(values)
    assert stderr == pytest.approx(math.sqrt(mean * (1 - mean) / (len(values) - 1)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [choice("a"), {"id": "b", "prompt": "x", "answer": "y"}],
            r"line 2 has 'answer', earlier lines have 'choices'",
        ),
        ([choice("a"), choice("a")], r"line 2: duplicate id 'a', also on line 1"),
        ([{"id": "a", "choices": ["x", "y"], "gold": 0}], r"line 1: no field 'prompt'"),
        ([{"prompt": "a", "answer": "x"}], r"line 1: no field 'id'"),
        ([choice("a", 2)], r"line 1: gold is 2, expected an index from 0 to 1"),
        ([choice("a", -1)], r"gold is -1"),
        ([choice("a", True)], r"gold is True"),
        ([{"id": "a", "prompt": "p", "choices": ["x", "y"]}], r"choices without gold"),
        ([choice("a", choices=["x"])], r"at least two"),
        ([choice("a", choices=["x", " "])], r"not a text or is empty"),
        ([choice("a", answer="x")], r"both choices and answer"),
        ([{"id": "a", "prompt": "p"}], r"neither choices nor answer"),
        ([{"id": "a", "prompt": "p", "answer": " . "}], r"answer is ' \. '"),
        ([{"id": "a", "prompt": "p", "answer": []}], r"answer is \[\]"),
        ([{"id": "a", "prompt": " ", "answer": "x"}], r"prompt is ' '"),
        ([{"id": None, "prompt": "p", "answer": "x"}], r"id is None"),
        ([choice("a"), "{broken"], r"line 2 is not valid JSON"),
        ([choice("a"), r'{"id": "b", "prompt": "\ud800", "answer": "x"}'], r"line 2: has a lone surrogate"),
        ([""], r"no questions"),
    ],
)
def test_a_mistaken_file_is_named_with_its_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_tasks([write(tmp_path / "t.jsonl", rows)])
    assert str(tmp_path / "t.jsonl") in str(error.value) and "\n" not in str(error.value)


def test_mistakes_are_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    good = write(tmp_path / "t.jsonl", [choice("a")])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "t.jsonl", [choice("a")])
    for tasks, message in [
        ([str(tmp_path / "none.jsonl")], "no such file"),
        ([str(tmp_path / "empty.jsonl")], "empty"),
        ([good, str(tmp_path / "sub" / "t.jsonl")], "2 files are named 't'"),
        ([], "no tasks"),
    ]:
        with pytest.raises(UserError, match=message):
            run_eval("no/such/model", tasks)
    with pytest.raises(UserError, match="a directory"):
        run_eval("no/such/model", [good], output=tmp_path)
    with pytest.raises(UserError, match="limit 0"):
        run_eval("no/such/model", [good], limit=0)


def test_a_broken_model_is_told(tmp_path: Path, model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = SimpleNamespace(logprob=math.nan, tokens=1)
    monkeypatch.setattr(model, "loglikelihood", lambda prompts, continuations: [broken] * len(prompts))
    with pytest.raises(UserError, match="not numbers"):
        run_eval("m", [write(tmp_path / "t.jsonl", [choice("a")])])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model of this project behind its own door, with a byte-level tokenizer that has a BOS."""
    import jax

    from ipt_jax.corpus.tokenizer import load_tokenizer
    from ipt_jax.inference.language_model import LanguageModel
    from ipt_jax.model.config import ModelConfig
    from ipt_jax.model.decoder import init_params

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = JsonTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["Where does the guild meet? In the Glass Hall."], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {"hidden_size": 32, "layers": 2, "q_heads": 4, "kv_heads": 2, "head_dim": 8, "intermediate_size": 48}
    config = ModelConfig(vocab_size=300, max_positions=96, bos_id=0, eos_id=1, **sizes)
    params = jax.tree.map(lambda x: 4 * x, init_params(config, jax.random.key(0)))
    return LanguageModel(config, params, load_tokenizer(folder))


def test_the_real_model_scores_as_its_logits_say(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipt_jax, "load", lambda path, dtype: tiny)
    choices = ["In the Glass Hall.", "guild", "Where? Where?"]
    rows = [choice("a", 0, choices=choices), choice("b", 2, choices=choices, prompt="Does the guild meet? " * 40)]
    result = run_eval("m", [write(tmp_path / "t.jsonl", rows)], output=tmp_path / "eval.json")
    assert result["tasks"]["t"]["truncated"] == 1
    found = [json.loads(line) for line in (tmp_path / "eval.rows.jsonl").read_text().splitlines()]
    for text, logprob, tokens in zip(choices, found[0]["logprobs"], found[0]["tokens"], strict=True):
        prompt = [0, *tiny.tokenizer.encode("Where is it?")]
        more = tiny.tokenizer.encode(" " + text)
        assert tokens == len(more)
        logits = tiny.logits(prompt + more).astype(np.float64)[len(prompt) - 1 : -1]
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert logprob == pytest.approx(logprobs[np.arange(tokens), more].sum(), abs=2e-3)


def test_the_real_model_answers_with_its_likeliest_tokens(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ipt_jax, "load", lambda path, dtype: tiny)
    prompt = [0, *tiny.tokenizer.encode("Where does it meet?")]
    ids = list(prompt)
    for _ in range(6):
        padded = ids + [0] * (32 - len(ids))  # one shape to compile; what follows is not seen
        ids.append(int(tiny.logits(padded)[len(ids) - 1].argmax()))
    expected = first_line(tiny.tokenizer.decode(ids[len(prompt) :]))
    rows = [{"id": 1, "prompt": "Where does it meet? ", "answer": expected or "x"}]
    task = run_eval("m", [write(tmp_path / "t.jsonl", rows)], max_new_tokens=6)["tasks"]["t"]
    assert task["value"] == (1.0 if normalise(expected) else 0.0)


@given(st.lists(st.integers(3, 99), min_size=1, max_size=40), st.integers(1, 12))
def test_windows_score_every_token_once(ids: list[int], context: int) -> None:
    pairs = list(windows(ids, 1, context))
    assert [token for _, continuation in pairs for token in continuation] == ids
    joined, end = [1, *ids], 1
    for prompt, continuation in pairs:
        end += len(continuation)
        assert joined[: end - len(continuation)][-len(prompt) :] == prompt, "what precedes it"
        assert len(prompt) + len(continuation) == min(end, context + 1), "as much as the context holds"


def test_the_text_that_windows_show() -> None:
    assert list(windows([5, 6, 7, 8, 9], 1, 3)) == [([1], [5, 6, 7]), ([6, 7], [8, 9])]
    assert list(windows([5, 6, 7], 1, 3)) == [([1], [5, 6, 7])]


def test_perplexity_of_texts(tmp_path: Path, model: FakeModel) -> None:
    """The model gives a vowel log-likelihood 0, any other letter -1. `ä` has two bytes."""
    model.config.max_positions = 200
    texts = write(tmp_path / "texts.jsonl", [{"text": "ab cd"}, {"id": "long", "text": "bä" * 50}])
    (tmp_path / "book.txt").write_text("bcd\n")
    result = run_eval("m", [texts, str(tmp_path / "book.txt")], output=tmp_path / "eval.json")
    task = result["tasks"]["texts"]
    assert (task["loglikelihood"], task["tokens"], task["bytes"], task["words"], task["n"]) == (-104, 105, 155, 3, 2)
    values = {name: found["value"] for name, found in task["metrics"].items()}
    assert values == pytest.approx({
        "bits_per_byte": 104 / 155 / math.log(2), "byte_perplexity": math.exp(104 / 155),
        "word_perplexity": math.exp(104 / 3), "token_perplexity": math.exp(104 / 105),
    })  # fmt: skip
    assert (task["metric"], task["value"], task["stderr"]) == ("bits_per_byte", values["bits_per_byte"], None)
    rows = [json.loads(line) for line in (tmp_path / "eval.rows.jsonl").read_text().splitlines()]
    assert [(row["task"], row["id"], row["tokens"]) for row in rows] == [
        ("texts", "1", 5), ("texts", "long", 100), ("book", "book", 4),
    ]  # fmt: skip
    assert result["tasks"]["book"]["words"] == 2, "as the harness counts: the end after a newline is a word"


def test_texts_that_cannot_be_scored(tmp_path: Path, model: FakeModel) -> None:
    for rows, message in (([{"text": " "}], "text is ' '"), ([{"text": "a"}, choice("b")], "write the two sorts")):
        with pytest.raises(UserError, match=message):
            read_tasks([write(tmp_path / "t.jsonl", rows)])
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=r"empty.txt: has no text"):
        read_tasks([str(tmp_path / "empty.txt")])
    model.tokenizer.bos_id = model.tokenizer.eos_id = None  # type: ignore[assignment, attr-defined]
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        run_eval("m", [write(tmp_path / "t.jsonl", [{"text": "a"}])])


@pytest.mark.extra
def test_rolling_log_likelihood_is_that_of_the_harness(tmp_path: Path) -> None:
    """Texts shorter and longer than the context of 48, and one of exactly 48 tokens."""
    Instance = need("lm_eval.api.instance", extra="evals").Instance
    HFLM = need("lm_eval.models.huggingface", extra="evals").HFLM
    torch, transformers = need("torch", extra="test"), need("transformers", extra="test")
    directory = save_tokenizer(tmp_path / "model")
    controls = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **controls})
    )
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=48, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
        sliding_window=None,
    )  # fmt: skip
    transformers.MistralForCausalLM(config).save_pretrained(directory)
    ours = ipt_jax.load(directory)
    words = " ".join(f"w{number % 7} and the text" for number in range(60))
    exact = next(words[:end] for end in range(len(words)) if len(ours.encode(words[:end])) == 49)
    texts = ["short text", exact, words, words + " é 東京\n more"]
    tasks = write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    run_eval(str(directory), [tasks], output=tmp_path / "eval.json")
    rows = [json.loads(line) for line in (tmp_path / "eval.rows.jsonl").read_text().splitlines()]
    harness = HFLM(str(directory), device="cpu", dtype="float32", batch_size=1, add_bos_token=False, max_length=48)
    asked = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    theirs = harness.loglikelihood_rolling(asked, disable_tqdm=True)
    assert [row["loglikelihood"] for row in rows] == pytest.approx(theirs, rel=1e-5)
