"""Evaluation: what the model is asked, how its answers are scored, and what a mistaken task file is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from extras import need
from hypothesis import given
from hypothesis import strategies as st

from ipt_jax.core.errors import UserError
from ipt_jax.evaluate import run, run_eval
from ipt_jax.evaluate.lm_eval_ import LogLikelihood
from ipt_jax.evaluate.run import join
from ipt_jax.evaluate.tasks import (
    Question,
    answer_f1,
    mean_and_stderr,
    normalise,
    read_tasks,
    score_answer,
    score_choices,
)


class FakeModel:
    """Likes a continuation by its number of vowels; answers every prompt with its last word. A token a letter."""

    max_length = 40

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def tok_encode(self, text: str, add_special_tokens: bool | None = None) -> list[str]:
        return [*text] if add_special_tokens is False else ["<s>", *text]

    def loglikelihood(self, requests: list[Any]) -> list[LogLikelihood]:
        self.asked += [request.args for request in requests]
        return [self.score(text, len(prompt) + len(text) > 40) for prompt, text in self.asked[-len(requests) :]]

    def score(self, text: str, cut: bool = False) -> LogLikelihood:
        return LogLikelihood(float(sum(letter in "aeiou" for letter in text) - len(text)), False, len(text), cut)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return [self.score(request.args[0])[0] for request in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        assert all(request.args[1]["until"] == ["\n"] for request in requests)
        return [" " + request.args[0].split()[-1] for request in requests]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    model = FakeModel()
    monkeypatch.setattr(run, "resolve_checkpoint", lambda path: None)
    monkeypatch.setattr(run, "_load_jax", lambda *_: model)
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
    result = run_eval("some/model", [tasks], output=tmp_path / "out" / "eval.json")
    task = result["tasks"]["places"]
    assert (task["metric"], task["value"], task["n"], task["chance"]) == ("acc_norm", 0.75, 4, 0.5)
    assert task["stderr"] == pytest.approx(0.5 / math.sqrt(4))  # sample sd of 1, 1, 0, 1 is 0.5
    assert set(task["metrics"]) == {"acc", "acc_norm", "acc_bytes", "acc_token"}
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == result
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["eval.json", "eval.rows.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "eval.rows.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a", "b", "c", "d"]
    assert rows[0] == {
        **{"task": "places", "id": "a", "filter": "none", "prompt": "Where is it?"},
        **{"prediction": "aeiou", "answer": "aeiou", "correct": True, "truncated": False},
        **{"metrics": ["acc_norm", "acc", "acc_bytes", "acc_token"]},
        **{"acc_norm": 1.0, "acc": 1.0, "acc_bytes": 1.0, "acc_token": 1.0, "logprobs": [-7.0, -1.0], "tokens": [7, 6]},
    }
    assert model.asked[:2] == [("Where is it?", " rhythm"), ("Where is it?", " aeiou")]


def test_the_results_have_the_shape_of_the_harness(tmp_path: Path, model: FakeModel) -> None:
    tasks = write(tmp_path / "places.jsonl", [choice("a", 1), choice("b", 0), choice("c", 1)])
    result = run_eval("m", [tasks], limit=2)
    assert result["results"]["places"] == {
        **{"name": "places", "alias": "places", "sample_len": 2},
        **{f"{name},none": 0.5 for name in ("acc_norm", "acc", "acc_bytes", "acc_token")},
        **{f"{name}_stderr,none": 0.5 for name in ("acc_norm", "acc", "acc_bytes", "acc_token")},
    }
    assert result["n-samples"]["places"] == {"original": 3, "effective": 2}
    assert result["higher_is_better"]["places"]["acc"] is True
    assert (result["versions"]["places"], result["n-shot"]["places"]) == (1.0, 0)
    assert result["configs"]["places"]["output_type"] == "multiple_choice"


@pytest.mark.extra
def test_the_harness_prints_the_results_of_task_files(tmp_path: Path, model: FakeModel) -> None:
    make_table = need("lm_eval.utils", extra="evals").make_table
    files = [write(tmp_path / "places.jsonl", [choice("a", 1), choice("b", 0)])]
    files += [write(tmp_path / "texts.jsonl", [{"text": "ab cd"}])]
    table = make_table(run_eval("m", files))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert ["places", "1", "none", "0", "acc", "↑", "0.5000", "±", "0.5"] in cells
    assert ["", "", "none", "0", "byte_perplexity", "↓", "2.2255", "±", "N/A"] in cells


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
    result = run_eval("m", [f"{first},other={second}", write(tmp_path / "c.jsonl", [choice("x")])], limit=2)
    assert list(result["tasks"]) == ["a", "other", "c"]
    assert {name: task["n"] for name, task in result["tasks"].items()} == {"a": 2, "other": 1, "c": 1}
    assert result["tasks"]["other"]["stderr"] is None


def test_prompts_that_are_cut_are_counted(tmp_path: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 100 + " Where is it?"
    path = write(tmp_path / "t.jsonl", [choice("a") | {"prompt": long}, choice("b")])
    assert run_eval("m", [path])["tasks"]["t"]["truncated"] == 1
    assert "1 questions are longer than the model's context" in capsys.readouterr().err
    rows = [{"id": 1, "prompt": long, "answer": "it?"}, {"id": 2, "prompt": "short", "answer": "it?"}]
    task = run_eval("m", [write(tmp_path / "g.jsonl", rows)], max_new_tokens=20)["tasks"]["g"]
    assert (task["value"], task["truncated"]) == (0.5, 1)


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


def test_the_accuracies_differ_by_what_they_divide_by() -> None:
    # sums -4, -6, -7.5; characters 2, 5, 6 -> -2, -1.2, -1.25; bytes 2, 5, 9 -> -2, -1.2, -0.83; tokens 4, 9, 7
    question = Question("q", "p", (" ab ", "abc12", "abcééé"), gold=1)
    metrics, pick = score_choices(question, [-4.0, -6.0, -7.5], [4, 9, 7])
    assert metrics == {"acc": 0.0, "acc_norm": 1.0, "acc_bytes": 0.0, "acc_token": 1.0}
    assert pick == 1
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


def test_mistakes_are_found_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "resolve_checkpoint", lambda path: None)
    good = write(tmp_path / "t.jsonl", [choice("a")])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "t.jsonl", [choice("a")])
    for tasks, message in [
        ([str(tmp_path / "none.jsonl")], "no such file"),
        ([good, "other=none.txt"], "none.txt: no such file"),
        ([str(tmp_path / "empty.jsonl")], "empty"),
        ([good, str(tmp_path / "sub" / "t.jsonl")], "2 files are named 't'"),
        ([], "no tasks"),
    ]:
        with pytest.raises(UserError, match=message):
            run_eval("no/such/model", tasks)
    with pytest.raises(UserError, match="a directory"):
        run_eval("no/such/model", [good], output=tmp_path)
    (tmp_path / "file").touch()
    options: list[tuple[dict[str, Any], str]] = [
        ({"limit": 0}, "limit 0"),
        ({"backend": "tpu"}, "backend is 'tpu'; expected jax, hf, vllm"),
        ({"backend": "hf", "mesh": "1,2,1"}, "mesh is for backend jax"),
        ({"num_fewshot": -1}, "num_fewshot is -1"),
        ({"log_samples": True}, "log_samples needs an output"),
        ({"output": tmp_path / "file" / "eval.json"}, "file/eval.json: cannot be written"),
    ]
    for option, message in options:
        with pytest.raises(UserError, match=message):
            run_eval("no/such/model", [good], **option)


def test_tasks_by_name_need_the_extra(tmp_path: Path, model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="'arc_easy': tasks by name need .*; run pip install"):
        run_eval("m", [write(tmp_path / "t.jsonl", [choice("a")]), "arc_easy"])


def test_perplexity_of_texts(tmp_path: Path, model: FakeModel) -> None:
    """The model gives a vowel log-likelihood 0, any other letter -1. `ä` has two bytes."""
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
