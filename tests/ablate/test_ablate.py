"""`ipt ablate`: which runs are trained and skipped, equal tokens, literal differences, and one ablation end to end."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from token_shards import random_documents, save_tokenizer, write_tokens
from trainkit import SMALL
from typer.testing import CliRunner

from ipt_jax.ablate import comparison
from ipt_jax.ablate import run as ablate
from ipt_jax.ablate.comparison import TaskScores, compare_arms, print_results, results_page
from ipt_jax.ablate.run import AblateSettings, arm_recipe, join_sources, run_ablate
from ipt_jax.cli import app
from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import check_settings
from ipt_jax.data.mixture import SourceMix
from ipt_jax.data.tokenize import TokenizeSettings, run_tokenize
from ipt_jax.evaluate import compare
from ipt_jax.train import trainer

SOURCES = [{"name": "raw", "path": "raw", "share": 1.0}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sources of 1,600 tokens, a base recipe of 800 tokens in 10 steps, and a task."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("raw", "extra")):
        write_tokens(tmp_path / name, random_documents([32] * 50, seed))
    write_base()
    rows = [{"id": str(i), "prompt": "Q", "choices": ["a", "b"], "gold": 0, "cluster": f"p{i // 2}"} for i in range(8)]
    Path("quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def write_base(**blocks: dict[str, Any]) -> None:
    base: dict[str, Any] = {
        "model": SMALL,
        "data": {"seq_len": 16, "tokens": 800, "sources": SOURCES},
        "train": {"batch_tokens": 80},
        "run_dir": "unused",
    }
    Path("base.yaml").write_text(yaml.safe_dump({**base, **{name: base[name] | blocks[name] for name in blocks}}))


def settings(**fields: Any) -> AblateSettings:
    candidate = {"add": {"name": "extra", "path": "extra", "share": 0.25}}
    stated = {
        "base": "base.yaml",
        "arms": {"base": {}, "candidate": candidate},
        "seeds": [0, 1],
        "tasks": ["quiz.jsonl"],
    }
    return check_settings(AblateSettings, {**stated, "output": "out", **fields}, where="test")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trains and evaluates nothing; lists what was asked for. The candidate answers all questions, the base half."""
    asked: list[str] = []

    def train(recipe: Any) -> dict[str, Any]:
        asked.append(f"train {recipe.run_dir}")
        return {"step": 10, "steps": 10}

    def evaluate(model: str, tasks: list[str], *, output: Path, limit: int | None) -> dict[str, Any]:
        asked.append(f"eval {model}")
        right = [1.0] * 8 if "candidate" in model else [1.0, 0.0] * 4
        rows = [{"task": "quiz", "id": str(i), "acc_norm": value} for i, value in enumerate(right)]
        result = {"tasks": {"quiz": {"metric": "acc_norm", "value": float(np.mean(right)), "chance": 0.5}}}
        output.write_text(json.dumps(result))
        output.with_suffix(".rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return result

    monkeypatch.setattr(trainer, "run_train", train)
    monkeypatch.setattr(ablate, "run_eval", evaluate)
    return asked


# ---- which runs


def test_each_arm_is_trained_once_per_seed_and_a_rerun_trains_nothing(folder: Path, fake: list[str]) -> None:
    results, finished = run_ablate(settings())
    assert finished
    runs = [f"out/runs/{arm}/{seed}" for seed, arm in product((0, 1), ("base", "candidate"))]
    assert fake == [line for run in runs for line in (f"train {run}", f"eval {run}/checkpoints/10")]
    fake.clear()
    assert run_ablate(settings()) == (results, True) and fake == []
    run_ablate(settings(seeds=[0, 1, 2]))
    assert [line for line in fake if line.startswith("train")] == [
        f"train out/runs/{a}/2" for a in ("base", "candidate")
    ]
    fake.clear()
    run_ablate(settings(limit=4, arms={"base": {}, "candidate": settings().arms["candidate"]}))
    assert len(fake) == 8, "other questions: evaluated again"


def test_several_points_of_a_run_are_evaluated(folder: Path, fake: list[str]) -> None:
    results, _ = run_ablate(settings(points=3, seeds=[5]))
    steps = [line.rpartition("/")[2] for line in fake if line.startswith("eval out/runs/base")]
    assert steps == ["3", "6", "10"]
    assert results["arms"]["base"]["curves"]["quiz"] == {"5": [(240, 0.5), (480, 0.5), (800, 0.5)]}
    with pytest.raises(UserError, match="points is 11, but arm 'base' has 10 steps"):
        run_ablate(settings(points=11))


def test_a_stopped_run_leaves_the_rest_for_a_rerun(
    folder: Path, fake: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_full, stopped = trainer.run_train, iter([10, 4])
    monkeypatch.setattr(trainer, "run_train", lambda recipe: {"step": next(stopped), "steps": 10})
    Path("ablate.yaml").write_text(yaml.safe_dump(settings().model_dump()))
    done = CliRunner().invoke(app, ["ablate", "ablate.yaml", "--json"])
    assert done.exit_code == 143 and not Path("out/ablation.json").exists()
    monkeypatch.setattr(trainer, "run_train", in_full)
    fake.clear()
    assert run_ablate(settings())[1]
    assert fake[0] == "train out/runs/candidate/0" and len(fake) == 6


# ---- what an arm is


def test_an_arm_changes_fields_of_the_base(folder: Path) -> None:
    arm = {"optimizer": {"learning_rate": 1e-05}, "train.z_loss": 0.5, "data.sources.0.max_epochs": 9}
    found = arm_recipe(settings(arms={"base": {}, "other": arm}), "other", 7)
    assert found.optimizer.learning_rate == 1e-05 and found.train.z_loss == 0.5 and found.train.seed == 7
    assert found.data.seed == 7 and found.data.sources[0].max_epochs == 9 and found.run_dir == "out/runs/other/7"
    for changes, message in (
        ({"run_dir": "x"}, "arm 'other': run_dir is set by the ablation; remove it"),
        ({"optimizer.learning_rte": 1}, "arm 'other': config base.yaml: unknown key 'optimizer.learning_rte'"),
        ({"add": {"name": "x", "share": 0.5}}, "arm 'other': add: path is missing"),
        ({"add": [{"name": "raw", "path": "x", "share": 0.5}]}, "two sources have the name 'raw'"),
    ):
        with pytest.raises(UserError, match=message):
            run_ablate(settings(arms={"base": {}, "other": changes}))


def test_a_source_that_joins_makes_the_shares_of_the_others_smaller() -> None:
    sources = [SourceMix(name="a", path="a", share=0.5), SourceMix(name="b", path="b", share=0.5)]
    sources += [SourceMix(name="c", path="c", tokens=9), SourceMix(name="d", path="d")]
    added = [SourceMix(name="e", path="e", share=0.2)]
    found = join_sources(sources, added)
    assert [(one.name, one.share, one.tokens) for one in found] == [
        ("a", 0.4, None), ("b", 0.4, None), ("c", None, 9), ("d", None, None), ("e", 0.2, None)
    ]  # fmt: skip


def test_unequal_arms_are_refused_unless_they_are_meant(folder: Path, fake: list[str]) -> None:
    arms = {"base": {}, "longer": {"data.tokens": 960}}
    with pytest.raises(UserError, match="'longer' trains on 960 tokens in 12 steps, arm 'base' on 800 in 10"):
        run_ablate(settings(arms=arms))
    assert fake == [] and not Path("out").exists()
    with pytest.raises(UserError, match="on 800 tokens in 5 steps, arm 'base' on 800 in 10"):
        run_ablate(settings(arms={"base": {}, "larger": {"train.batch_tokens": 160}}))
    results, _ = run_ablate(settings(arms=arms, allow_unequal=True))
    assert [arm["tokens"] for arm in results["arms"].values()] == [800, 960]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arms": {"one": {}}}, "at least 2 items"),
        ({"arms": {"a/b": {}, "c": {}}}, "arm 'a/b': use letters"),
        ({"baselines": ["none"]}, "baseline 'none' is not an arm; arms are base, candidate"),
        ({"seeds": [1, 1]}, "has duplicates"),
        ({"tasks": ["absent.jsonl"]}, "absent.jsonl: no such file"),
        ({"arms": {"base": {}, "b": {"train.branch_from": "x"}}}, "train.branch_from fixes the seeds"),
    ],
)
def test_mistakes_are_reported_before_training(folder: Path, fake: list[str], fields: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_ablate(settings(**fields))
    assert fake == []


# ---- differences


def scores(base: list[list[float]], other: list[list[float]], clusters: list[int], weights: Any = 1.0) -> TaskScores:
    arrays = {"base": np.array(base), "other": np.array(other)}
    size = len(clusters)
    return TaskScores("acc_norm", 0.5, np.ones(size) * weights, np.array(clusters), arrays)


def test_differences_are_means_over_questions_and_seeds(folder: Path, fake: list[str]) -> None:
    results, _ = run_ablate(settings())
    (found,) = results["comparisons"]
    assert (found["arm"], found["baseline"], found["task"]) == ("candidate", "base", "quiz")
    assert found["difference"] == 0.5 and {s: one["difference"] for s, one in found["seeds"].items()} == {
        "0": 0.5,
        "1": 0.5,
    }
    assert found["interval"] == [0.5, 0.5], "every cluster of two questions has one right and one wrong answer"
    assert (found["n"], found["clusters"]) == (8, 4)
    assert found["p"] == pytest.approx(1 / 8, abs=0.02) and found["p_holm"] == found["p"]  # 2 of 16 patterns of signs
    assert results["arms"]["base"]["tasks"]["quiz"]["value"] == 0.5
    assert json.loads(Path("out/ablation.json").read_text())["comparisons"] == results["comparisons"]
    page = Path("out/ablation.html").read_text()
    assert "candidate − base" in page and "+50.0 [50.0, 50.0]" in page and "http:" not in page and "https:" not in page
    assert page == results_page(json.loads(Path("out/ablation.json").read_text()))


def test_seeds_that_disagree_widen_the_interval() -> None:
    """One seed gains on every question, the other on none: questions alone cannot see that."""
    (found,) = compare_arms(
        {"t": scores([[0.0] * 40] * 2, [[1.0] * 40, [0.0] * 40], list(range(40)))}, [("other", "base")], [0, 1]
    )
    assert found["difference"] == 0.5 and found["interval_questions"] == [0.5, 0.5] and found["interval"] == [0.0, 1.0]
    assert found["p"] == pytest.approx(0.5, abs=0.02), "a fourth of the resamples has the second seed twice"


def test_questions_of_one_cluster_count_once() -> None:
    """Forty copies of four answers are four answers."""
    gains = [1.0] * 10 + [0.0] * 10 + [1.0] * 10 + [0.0] * 10
    alone, joined = (
        compare_arms({"t": scores([[0.0] * 40], [gains], clusters)}, [("other", "base")], [0])[0]
        for clusters in (list(range(40)), [i // 10 for i in range(40)])
    )
    assert alone["p"] < 1e-3 < 0.4 < joined["p"]
    widths = [found["interval"][1] - found["interval"][0] for found in (alone, joined)]
    assert widths[0] < 0.35 and widths[1] > 0.9


def test_the_interval_covers_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 draws of 60 paired questions with a true difference of 0.2."""
    monkeypatch.setattr(comparison, "RESAMPLES", 1000)
    monkeypatch.setattr(compare, "FLIPS", 100)
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        base = rng.random((1, 60)) < 0.5
        other = np.where(rng.random((1, 60)) < 0.4, True, base)
        task = scores(base.astype(float).tolist(), other.astype(float).tolist(), list(range(60)))
        low, high = compare_arms({"t": task}, [("other", "base")], [0])[0]["interval"]
        covered += low <= 0.2 <= high
    assert 88 <= covered <= 100


def test_a_text_counts_by_its_bytes() -> None:
    task = scores([[10.0, 300.0]], [[20.0, 300.0]], [0, 1], weights=np.array([10.0, 90.0]))
    assert compare_arms({"t": task}, [("other", "base")], [0])[0]["difference"] == pytest.approx(0.1)


def test_later_arms_are_compared_with_each_baseline() -> None:
    arms = {"vanilla": {}, "mix": {}, "instruct": {}}
    assert settings(arms=arms).pairs == [("mix", "vanilla"), ("instruct", "vanilla")]
    pairs = [("mix", "vanilla"), ("instruct", "vanilla"), ("instruct", "mix")]
    assert settings(arms=arms, baselines=["mix", "vanilla"]).pairs == pairs


# ---- end to end


def test_a_source_that_answers_the_questions_wins(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both arms train for real: the candidate reads the answers, the base random letters."""
    tokenizer = save_tokenizer(folder / "tokenizer")
    texts = {"noise": "qxv zkw jyx" * 2, "facts": "Q: cat? A: meow. Q: dog? A: woof."}
    for name, text in texts.items():
        Path(f"{name}.jsonl").write_text(
            "".join(json.dumps({"id": f"{name}{i}", "text": text}) + "\n" for i in range(40))
        )
        stated = {
            "inputs": [{"path": f"{name}.jsonl"}],
            "tokenizer": str(tokenizer),
            "output": f"tokens/{name}",
            "workers": 1,
        }
        run_tokenize(check_settings(TokenizeSettings, stated, where="test"))
    noise = {"name": "noise", "path": "tokens/noise", "share": 1.0, "max_epochs": 99}
    write_base(
        model={**SMALL, "vocab_size": 300, "layers": 1},
        data={"seq_len": 64, "tokens": 20_000, "sources": [noise]},
        train={"batch_tokens": 1024, "checkpoint_every": None},
    )
    rows = [("cat", 0), ("dog", 1)]
    questions = [
        {"id": one, "prompt": f"Q: {one}? A:", "choices": ["meow", "woof"], "gold": gold} for one, gold in rows
    ]
    Path("quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    facts = {"name": "facts", "path": "tokens/facts", "share": 0.9}
    changes = {"optimizer": {"learning_rate": 0.01}}
    arms = {"base": changes, "candidate": {**changes, "add": facts}}
    found, finished = run_ablate(settings(arms=arms, points=2, seeds=[3]))
    assert finished
    assert found["arms"]["candidate"]["tasks"]["quiz"]["value"] == 1.0
    assert [at for at, _ in found["arms"]["base"]["curves"]["quiz"]["3"]] == [10 * 1024, 20_000]
    print_results(found)
    assert "candidate − base" in capfd.readouterr().out
