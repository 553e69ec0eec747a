"""Two results question by question: pairing, the exact test, the permutation test, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ipt_jax.core.errors import UserError
from ipt_jax.evaluate.compare import holm, mcnemar, run_compare, show_comparison, sign_flip_test


def result(path: Path, values: dict[str, list[float]], metric: str = "acc", **row: Any) -> Path:
    """A result with these scores by task."""
    tasks = {name: {"metric": metric, "value": float(np.mean(found))} for name, found in values.items()}
    path.write_text(json.dumps({"model": path.stem, "tasks": tasks}))
    rows = [
        {"task": name, "id": str(i), "filter": "none", "prompt": f"p{i}", metric: score, **row}
        for name, found in values.items()
        for i, score in enumerate(found)
    ]
    path.with_suffix(".rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 2 / 32), (1, 9, 2 * 11 / 1024), (9, 1, 2 * 11 / 1024), (0, 1, 1.0)],
)
def test_mcnemar_is_the_binomial_tail(only_first: int, only_second: int, p: float) -> None:
    assert mcnemar(only_first, only_second) == pytest.approx(p)


def test_mcnemar_of_many_questions_is_finite() -> None:
    assert mcnemar(900, 900) == 1.0
    assert mcnemar(800, 1000) == pytest.approx(2.6e-6, rel=0.05)  # z = 199 / sqrt(1800) = 4.69 after the correction


def test_the_sign_flip_of_equal_gaps_is_the_share_of_equal_signs() -> None:
    """Four gaps of one sign: 2 of the 16 sign patterns reach the sum, 1/8."""
    assert sign_flip_test(np.ones(4), "x") == pytest.approx(0.125, abs=0.02)
    assert sign_flip_test(np.zeros(4), "x") == 1.0
    assert sign_flip_test(np.ones(30), "x") == pytest.approx(1 / 20_001)
    assert sign_flip_test(np.ones(1), "x") == 1.0


def test_holm_keeps_the_order_and_is_monotone() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_two_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = result(tmp_path / "a.json", {"one": [0.0] * 9 + [1.0], "two": [1.0, 0.0, 0.0, 1.0], "only": [1.0]})
    b = result(tmp_path / "b.json", {"one": [1.0] * 9 + [0.0], "two": [1.0, 0.0, 1.0]})
    found = run_compare(a, b)
    one, two = found["tasks"]["one"], found["tasks"]["two"]
    assert (one["n"], one["first"], one["second"], one["difference"]) == (10, 0.1, 0.9, pytest.approx(0.8))
    assert (one["first_higher"], one["second_higher"], one["test"]) == (1, 9, "McNemar")
    assert one["p"] == pytest.approx(22 / 1024) and one["p_holm"] == pytest.approx(44 / 1024)
    assert (two["n"], two["unpaired"], two["p"]) == (3, 1, 1.0)
    assert found["overall"]["difference"] == pytest.approx((0.8 + 1 / 3) / 2)
    assert found["unpaired_tasks"] == ["only"]
    show_comparison(found)
    text = capsys.readouterr().out
    assert "+0.8000" in text and "3 of 4" in text and "mean of 2 tasks" in text and "in one result only: only" in text


def test_scores_between_right_and_wrong_are_permuted(tmp_path: Path) -> None:
    a = result(tmp_path / "a.json", {"names": [0.5] * 12}, "f1")
    b = result(tmp_path / "b.json", {"names": [0.75] * 12}, "f1")
    (task,) = run_compare(a, b)["tasks"].values()
    assert (task["test"], task["difference"], task["stderr"]) == ("permutation", 0.25, 0.0)
    assert task["p"] < 0.002


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    good = result(tmp_path / "good.json", {"one": [1.0, 0.0]})
    other = result(tmp_path / "other.json", {"two": [1.0, 0.0]})
    changed = result(tmp_path / "changed.json", {"one": [1.0, 0.0]}, prompt="another")
    bare = tmp_path / "bare.json"
    bare.write_text(good.read_text())
    for second, message in (
        (other, "no task in common"),
        (changed, "question '0' has another text"),
        (bare, "its questions, bare.rows.jsonl, are not beside it"),
        (tmp_path / "none.json", "cannot be read as JSON"),
    ):
        with pytest.raises(UserError, match=message):
            run_compare(good, second)
