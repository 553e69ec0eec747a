"""`ipt compare`: two results of `ipt eval`, question by question, with a paired test.

Questions are paired by task and id; a question whose text differs is an error, one that only one model answered is
counted and left out. Scores of 0 and 1 are compared by McNemar's exact test: among the questions that exactly one model
got right, how likely is a split at least so uneven. Other scores (F1, bits per byte) are compared by a paired
permutation test: how often does the mean difference reach its size if the two scores of each question are swapped at
random. `p_holm` corrects for the number of tasks (Holm). Over all tasks, the mean of their differences is tested by
permutation within each task. All p values are two-sided.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ipt_jax.core.errors import UserError
from ipt_jax.core.seeding import draw
from ipt_jax.corpus.text_files import read_jsonl

FLIPS = 20_000  # random signs of a permutation test
CHUNK = 1 << 22  # signs drawn at a time
EPSILON = 1e-12  # of sums that are equal but for rounding
Key = tuple[str, str]  # filter and id of a question


def run_compare(first: Path, second: Path) -> dict[str, Any]:
    """The differences `second` minus `first`, by task and over the tasks whose metric is better when higher."""
    results, rows = zip(*(_read(Path(path)) for path in (first, second)), strict=True)
    shared = [name for name in results[0]["tasks"] if name in results[1]["tasks"]]
    if not shared:
        raise UserError(f"{first} and {second} have no task in common; evaluate both models on the same tasks")
    tasks, differences = {}, {}
    for name in shared:
        metric = _metric(results[0]["tasks"][name]["metric"], rows[0].get(name, {}))
        paired = _pairs(name, metric, rows[0].get(name, {}), rows[1].get(name, {}), second)
        tasks[name] = _compared(name, metric, paired, *(len(each.get(name, {})) for each in rows))
        better = results[0].get("higher_is_better", {}).get(name, {}).get(metric.partition(",")[0], True)
        if better:
            differences[name] = paired[1] - paired[0]
    for name, p in zip(tasks, holm([task["p"] for task in tasks.values()]), strict=True):
        tasks[name]["p_holm"] = p
    return {
        "first": str(results[0].get("model", first)), "second": str(results[1].get("model", second)), "tasks": tasks,
        "overall": _overall(differences) if len(differences) > 1 else None,
        "unpaired_tasks": sorted({*results[0]["tasks"], *results[1]["tasks"]} - set(shared)),
    }  # fmt: skip


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[Key, dict[str, Any]]]]:
    """A results file, and its rows by task and question."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); give the output of `ipt eval -o`") from error
    if not isinstance(result, dict) or not isinstance(result.get("tasks"), dict):
        raise UserError(f"{path}: has no tasks; give the output of `ipt eval -o`")
    beside = path.with_suffix(".rows.jsonl")
    if not beside.is_file():
        raise UserError(f"{path}: its questions, {beside.name}, are not beside it; copy both files")
    rows: dict[str, dict[Key, dict[str, Any]]] = {}
    for _, row in read_jsonl(beside):
        rows.setdefault(str(row["task"]), {})[str(row.get("filter", "none")), str(row["id"])] = row
    return result, rows


def _metric(headline: str, rows: dict[Key, dict[str, Any]]) -> str:
    """The headline, or the first metric that each question has, where the headline is of all questions together."""
    known = next((row.get("metrics") or [headline] for row in rows.values()), [headline])
    return headline if headline.partition(",")[0] in known else known[0]


def _pairs(
    task: str, metric: str, first: dict[Key, dict[str, Any]], second: dict[Key, dict[str, Any]], path: Path
) -> np.ndarray:
    """float64 [2, questions] of the scores that both models have."""
    name, _, kept = metric.partition(",")
    found = []
    for key, row in first.items():
        other = second.get(key)
        if other is None or key[0] != (kept or "none") or name not in row or name not in other:
            continue
        same = ("doc_hash",) if "doc_hash" in row else ("prompt", "answer", "bytes")
        if any(row.get(what) != other.get(what) for what in same):
            raise UserError(
                f"{path}: task {task!r}, question {key[1]!r} has another text; evaluate both on the same file"
            )
        found.append((row[name], other[name]))
    if not found:
        raise UserError(f"{path}: task {task!r} has no question with {metric} in common with the other result")
    return np.array(found, np.float64).T


def _compared(task: str, metric: str, paired: np.ndarray, *answered: int) -> dict[str, Any]:
    first, second = paired
    gap = second - first
    binary = bool(np.isin(paired, (0.0, 1.0)).all())
    stderr = float(gap.std(ddof=1) / math.sqrt(len(gap))) if len(gap) > 1 else None
    only_first, only_second = int((gap < 0).sum()), int((gap > 0).sum())
    return {
        "metric": metric, "n": len(gap), "unpaired": max(answered) - len(gap), "first": float(first.mean()),
        "second": float(second.mean()), "difference": float(gap.mean()), "stderr": stderr,
        "first_higher": only_first, "second_higher": only_second, "test": "McNemar" if binary else "permutation",
        "p": mcnemar(only_first, only_second) if binary else sign_flip_test(gap, f"{task} {metric}"),
    }  # fmt: skip


def _overall(differences: dict[str, np.ndarray]) -> dict[str, Any]:
    gaps = list(differences.values())
    variances = [gap.var(ddof=1) / len(gap) if len(gap) > 1 else math.nan for gap in gaps]
    stderr = math.sqrt(sum(variances)) / len(gaps)
    return {
        "tasks": len(gaps), "n": sum(map(len, gaps)), "difference": float(np.mean([gap.mean() for gap in gaps])),
        "stderr": stderr if math.isfinite(stderr) else None, "test": "permutation",
        "p": sign_flip_test(np.concatenate([gap / len(gap) for gap in gaps]), " ".join(differences)),
    }  # fmt: skip


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p of so uneven a split of the questions that exactly one model got right."""
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


def sign_flip_test(gaps: np.ndarray, name: str) -> float:
    """Two-sided p of the sum of `gaps` against random signs, which depend on `name` alone. 1 where all are zero."""
    rng = np.random.default_rng(draw(0, "signs", name).getrandbits(128))
    gaps = gaps[gaps != 0]
    if not len(gaps):
        return 1.0
    observed, reached = abs(gaps.sum()) - EPSILON, 0
    for start in range(0, FLIPS, size := max(1, CHUNK // len(gaps))):
        signs = rng.integers(0, 2, (min(size, FLIPS - start), len(gaps)), np.int8) * 2.0 - 1.0
        reached += int((np.abs(signs @ gaps) >= observed).sum())
    return (1 + reached) / (1 + FLIPS)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: [0.01, 0.04, 0.03] -> [0.03, 0.06, 0.06]."""
    corrected, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = highest
    return corrected


def show_comparison(result: dict[str, Any]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in "task,metric,n,A,B,B - A,stderr,A higher,B higher,p,p (Holm),test".split(","):
        table.add_column(heading, justify="left" if heading in ("task", "metric", "test") else "right", no_wrap=True)
    for name, task in result["tasks"].items():
        n = f"{task['n']:,}" + (f" of {task['n'] + task['unpaired']:,}" if task["unpaired"] else "")
        table.add_row(
            name, task["metric"], n, f"{task['first']:.4f}", f"{task['second']:.4f}", *_difference(task),
            f"{task['first_higher']:,}", f"{task['second_higher']:,}", f"{task['p']:.4f}", f"{task['p_holm']:.4f}",
            task["test"],
        )  # fmt: skip
    if overall := result["overall"]:
        empty = ["", ""]
        table.add_row(
            f"mean of {overall['tasks']} tasks", "", f"{overall['n']:,}", *empty, *_difference(overall), *empty,
            f"{overall['p']:.4f}", "", overall["test"],
        )  # fmt: skip
    console = Console(highlight=False)
    console.width = max(console.width, Console(width=1000).measure(table).maximum)  # a pipe has 80 columns
    console.print(f"A {result['first']}\nB {result['second']}", markup=False)
    console.print(table)
    if result["unpaired_tasks"]:
        console.print(f"in one result only: {', '.join(result['unpaired_tasks'])}", markup=False)


def _difference(found: dict[str, Any]) -> tuple[str, str]:
    return f"{found['difference']:+.4f}", "" if found["stderr"] is None else f"± {found['stderr']:.4f}"
