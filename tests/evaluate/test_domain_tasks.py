"""The domain suite in configs/evals: each of the ten tasks on rows written here, with scores computed by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from extras import ROOT, need

from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import parse_yaml

pytestmark = pytest.mark.extra
EVALS = ROOT / "configs" / "evals"
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need("lm_eval", extra="test")
    monkeypatch.setenv("IPT_EVAL_DATA", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def scoring() -> Any:
    _import_func_in_yml = need("lm_eval.tasks._yaml_loader", extra="test")._import_func_in_yml

    class Module:
        def __getattr__(self, name: str) -> Any:
            return _import_func_in_yml(f"scoring.{name}", EVALS)

    return Module()


class Score(tuple[float, bool]):
    """What `ipt eval` returns for a log-likelihood."""

    tokens: int

    def __new__(cls, logprob: float, tokens: int) -> Score:
        made = super().__new__(cls, (logprob, False))
        made.tokens = tokens
        return made


def evaluate(task: str, logprob: Callable[[str, str], Any] | None = None, answers: list[str] | None = None) -> Any:
    """The harness's results of one task. `answers`: what the model generates, in the order of the rows."""
    simple_evaluate = need("lm_eval", extra="test").simple_evaluate
    LM = need("lm_eval.api.model", extra="test").LM
    TaskManager = need("lm_eval.tasks", extra="test").TaskManager

    class Model(LM):
        asked: list[tuple[Any, ...]] = []

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            assert logprob is not None
            self.asked.extend(request.args for request in requests)
            return [logprob(*request.args) for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            assert answers is not None
            self.asked.extend(request.args for request in requests)
            return answers

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise AssertionError("no task of the suite scores plain text")

    model = Model()
    tasks = TaskManager(include_path=str(EVALS), include_defaults=False)
    results = simple_evaluate(model=model, tasks=[task], task_manager=tasks, num_fewshot=3, bootstrap_iters=10)
    found = {name.removesuffix(",none"): value for name, value in results["results"][task].items()}
    return found, model.asked, results


def write(folder: Path, name: str, rows: list[Row]) -> None:
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def questions(options: list[str], golds: list[int], **more: list[Any]) -> list[Row]:
    rows = [{"id": i, "input": f"Question {i}:", "options": options, "gold_index": g} for i, g in enumerate(golds)]
    return [row | {key: values[row["id"]] for key, values in more.items()} for row in rows]


def picks(options: list[str], chosen: list[int]) -> Callable[[str, str], Score]:
    """A model that gives the option `chosen[i]` of question i the best mean, through a worse sum of more tokens."""

    def logprob(context: str, continuation: str) -> Score:
        assert continuation.startswith(" ")
        is_pick = options[chosen[int(context.split()[1].rstrip(":"))]] == continuation[1:]
        return Score(-3.0, 3) if is_pick else Score(-2.0, 1)

    return logprob


# ---- the ten tasks


@pytest.mark.parametrize(
    ("task", "name", "options"),
    [
        ("medicine_pubmedqa", "PubMedQA", ["No", "Maybe", "Yes"]),
        ("medicine_mqp", "MQP", ["No", "Yes"]),
        ("medicine_usmle", "USMLE", ["an opiate", "iron", "rest", "a splint"]),
    ],
)
def test_accuracy_by_mean_log_probability_per_token(task: str, name: str, options: list[str], tmp_path: Path) -> None:
    # Picks 1 0 1 0 against golds 1 1 1 0: three of four. By sums the one-token options would win: none is right.
    write(tmp_path, name, questions(options, [1, 1, 1, 0]))
    scores, asked, results = evaluate(task, picks(options, [1, 0, 1, 0]))
    assert scores["acc_token"] == 0.75
    assert asked[:2] == [("Question 0:", f" {options[0]}"), ("Question 0:", f" {options[1]}")]  # no shots are added
    assert [sample["acc_token"] for sample in results["samples"][task]] == [1, 0, 1, 1]


@pytest.mark.parametrize(("task", "name", "count"), [("medicine_chemprot", "ChemProt", 13), ("medicine_rct", "RCT", 5)])
def test_micro_f1(task: str, name: str, count: int, tmp_path: Path) -> None:
    # One label a question, so micro-F1 is the share of right picks: golds 0 1 2 4 4, picks 0 1 1 4 0: three of five.
    options = [f"relation {i}" for i in range(count)]
    write(tmp_path, name, questions(options, [0, 1, 2, 4, 4]))
    scores, *_ = evaluate(task, picks(options, [0, 1, 1, 4, 0]))
    assert scores["micro_f1"] == pytest.approx(0.6)
    assert scores["acc_token"] == pytest.approx(0.6)


@pytest.mark.parametrize(("task", "name"), [("finance_fpb", "FPB"), ("finance_fiqa_sa", "FiQA_SA")])
def test_weighted_f1(task: str, name: str, tmp_path: Path) -> None:
    # golds 0 0 0 1 2, picks 0 0 1 1 1.
    # Class 0: precision 2/2, recall 2/3, F1 4/5. Class 1: precision 1/3, recall 1/1, F1 1/2. Class 2: never picked, 0.
    # Weighted by 3, 1 and 1 questions: (3 * 4/5 + 1/2 + 0) / 5 = 0.58. Accuracy 3/5.
    options = ["negative", "neutral", "positive"]
    write(tmp_path, name, questions(options, [0, 0, 0, 1, 2]))
    scores, *_ = evaluate(task, picks(options, [0, 0, 1, 1, 1]))
    assert scores["weighted_f1"] == pytest.approx(0.58)
    assert scores["acc_token"] == pytest.approx(0.6)


def test_headline_is_the_mean_over_nine_classes(tmp_path: Path) -> None:
    # Class 0 has three questions: golds 0 0 1, picks 0 1 1. No: precision 1/1, recall 1/2, F1 2/3. Yes: precision 1/2,
    # recall 1/1, F1 2/3. Weighted 2/3. Classes 1 to 7 have one right pick each: 1. Class 8 has one wrong pick: 0.
    # Mean (2/3 + 7 + 0) / 9 = 0.851852. Over all questions at once it would differ: 9 of 11 are right.
    options, classes = ["No", "Yes"], [0, 0, 0, *range(1, 9)]
    golds, chosen = [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    write(tmp_path, "Headline", questions(options, golds, class_id=classes))
    scores, *_ = evaluate("finance_headline", picks(options, chosen))
    assert scores["headline_f1"] == pytest.approx((2 / 3 + 7) / 9)
    assert scores["acc_token"] == pytest.approx(9 / 11)


def test_convfinqa_accepts_a_number_within_a_hundredth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["0.12", "1250.5", "-3", "7", "0.5"]
    # 12.4% is 0.124, within 0.01 of 0.12. The comma of 1,250.5 is dropped. +3 is not -3. The 7 is on the second line.
    # 0.52 is off by 0.02: two of five are right.
    answers = [" it grew by 12.4%", " $1,250.5 million", " 3", " six\n7", " 0.52"]
    rows = [{"id": i, "input": f"Q{i}", "label": label} for i, label in enumerate(labels)]
    write(tmp_path, "ConviFinQA/test", rows)  # the folder as it is published
    scores, asked, results = evaluate("finance_convfinqa", answers=answers)
    assert scores["number_match"] == pytest.approx(0.4)
    assert [sample["number_match"] for sample in results["samples"]["finance_convfinqa"]] == [1, 1, 0, 0, 0]
    wanted = {"until": ["\n"], "max_gen_toks": 100, "do_sample": False, "max_prompt_tokens": 1948}
    assert asked[0][0] == "Q0" and asked[0][1].items() >= wanted.items()
    assert "tuned" in capsys.readouterr().err  # ConvFinQA is in the synthesizer's tuning list


def test_ner_has_a_true_score_beside_that_of_the_authors(tmp_path: Path) -> None:
    rows = [
        {"id": 0, "input": "T0", "label": ["Ann Lee (PER), Acme (ORG)"]},
        {"id": 1, "input": "T1", "label": ["Oslo (LOC)"]},
        {"id": 2, "input": "T2", "label": ["Oslo (LOC)"]},
    ]
    # Row 0, entities: {Ann Lee PER, Acme ORG} against {Bob Lee PER, Acme ORG}: 2 * 1 / 4 = 0.5.
    #   The authors read one word: Lee PER and Acme ORG on both sides, all right: 1.
    # Row 1: Oslo against Bergen, both LOC: 0. The authors count the type, half a point: (0 + 1) / (1 + 1) = 0.5.
    # Row 2: no entity in the answer: 0 and 0.
    answers = [" Bob Lee (PER), Acme (ORG)", " Bergen (LOC)", " none"]
    write(tmp_path, "finance-tasks/NER/test", rows)
    scores, *_ = evaluate("finance_ner", answers=answers)
    assert scores["entity_f1"] == pytest.approx(0.5 / 3)
    assert scores["ner_adaptllm"] == pytest.approx(1.5 / 3)


# ---- the rules


def test_f1_equals_that_of_scikit_learn(scoring: Any) -> None:
    from sklearn.metrics import f1_score

    draw = random.Random(7)
    for classes in (2, 3, 13):
        pairs = [(draw.randrange(4), draw.randrange(classes), draw.randrange(classes)) for _ in range(200)]
        gold, pick = [pair[1] for pair in pairs], [pair[2] for pair in pairs]
        assert scoring.micro_f1(pairs) == f1_score(gold, pick, average="micro")
        assert scoring.weighted_f1(pairs) == f1_score(gold, pick, average="weighted")


def test_equal_options_give_the_first(scoring: Any) -> None:
    doc = {"id": 1, "input": "Q", "options": ["a", "b", "c"], "gold_index": 1}
    assert scoring.accuracy(doc, [Score(-4, 2), Score(-2, 1), Score(-2, 1)]) == {"acc_token": 0.0}
    assert scoring.accuracy(doc, [Score(-4.1, 2), Score(-2, 1), Score(-2, 1)]) == {"acc_token": 1.0}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("up 1,250.5 or 12%", [1250.5, 0.12]),
        ("-.5 and +3e2 and 1.", [-0.5, 300.0, 1.0]),
        ("007", [7.0]),
        ("$ 1,23 - 1,2345", [1.0, 23.0, 12345.0]),  # as the authors' expression reads it
        (".5.", []),
        ("1e999", []),
        ("__import__('os').getcwd()", []),
        ("none\n5", []),
        ("", []),
    ],
)
def test_numbers_are_parsed(scoring: Any, text: str, found: list[float]) -> None:
    assert scoring.numbers(text) == found


def test_entities(scoring: Any) -> None:
    assert scoring.entities("Ann  Lee (PER), the Bank of X (Org); Oslo(LOC)\nBob (PER)") == {
        ("Ann Lee", "per"),
        ("the Bank of X", "org"),
        ("Oslo", "loc"),
    }
    assert scoring.entity_f1("", "nothing") == 1.0
    # The authors' score of two different locations for two others: only the first is matched, by type, twice.
    assert scoring.ner_adaptllm("A (LOC), B (LOC)", "C (LOC), D (LOC)") == 0.5
    assert scoring.ner_adaptllm("", "") == 0.0


# ---- mistakes


def test_token_counts_are_required(tmp_path: Path) -> None:
    write(tmp_path, "MQP", questions(["No", "Yes"], [1]))
    with pytest.raises(UserError, match="token counts.*ipt eval"):
        evaluate("medicine_mqp", lambda context, continuation: (-1.0, False))


def test_bad_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"MQP: IPT_EVAL_DATA=.* has neither MQP.jsonl"):
        evaluate("medicine_mqp")
    write(tmp_path, "MQP", [{"id": 1, "input": "Q", "options": ["No", "Yes"]}])
    with pytest.raises(UserError, match="no column 'gold_index'"):
        evaluate("medicine_mqp")
    write(tmp_path, "USMLE", questions(["No", "Yes"], [2]))
    with pytest.raises(UserError, match="question 0 has gold_index 2"):
        evaluate("medicine_usmle")


def test_an_absent_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = need("datasets", extra="test")

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.delenv("IPT_EVAL_DATA")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="AdaptLLM/medicine-tasks cannot be read.*offline.*set IPT_EVAL_DATA"):
        evaluate("medicine_mqp")


def test_groups_name_tasks_that_exist() -> None:
    general = Path(str(need("lm_eval.tasks", extra="test").__file__)).parent
    known = {path.stem for path in EVALS.glob("*.yaml")}
    folders = "arc super_glue/boolq siqa winogrande piqa openbookqa hellaswag mmlu/default".split()
    for path in (path for folder in folders for path in (general / folder).glob("*.yaml")):
        known |= set(
            line.split(": ")[1] for line in path.read_text().splitlines() if line.startswith(("task: ", "group: "))
        )
    for path in EVALS.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# Command:  ipt eval MODEL --include-path configs/evals --tasks " + path.stem), path
        assert all(f"# {word}:" in text for word in ("Hardware", "Expect", "Paper")), path
        if "group" in (members := parse_yaml(text.replace("!function ", ""))):
            assert set(members["task"]) <= known, path
    assert len(list(EVALS.glob("*.yaml"))) == 13
