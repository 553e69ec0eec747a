"""`ipt eval`: a model, task files, and a table of scores with standard errors.

Task files are read and checked before the model is loaded. `--output FILE.json` gets the summary, and FILE.rows.jsonl
beside it one line a question (prediction, right answer, every metric), from which two models can be compared question
by question. Both are written under a temporary name and renamed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import write_whole, writing
from ipt_jax.evaluate.scoring import run_task
from ipt_jax.evaluate.tasks import HEADLINE, Task, mean_and_stderr, read_tasks


def run_eval(
    model: str,
    tasks: Sequence[str],
    *,
    output: Path | str | None = None,
    limit: int | None = None,
    batch_size: int = 128,
    max_new_tokens: int = 64,
    dtype: str = "float32",
) -> dict[str, Any]:
    """`model` is what `ipt_jax.load` takes; a task is FILE.jsonl or NAME=FILE.jsonl, or several joined by commas."""
    found = read_tasks(tasks, limit)
    if output is not None and Path(output).is_dir():
        raise UserError(f"eval output {output}: a directory; give the path of a file, such as {output}/eval.json")
    from ipt_jax import load  # a mistaken task file is told without the seconds that jax takes to import

    loaded = load(model, dtype=dtype)
    rows = {task.name: run_task(loaded, task, batch_size=batch_size, max_new_tokens=max_new_tokens) for task in found}
    result = {"model": str(model), "tasks": {task.name: summarise(task, rows[task.name]) for task in found}}
    if output is not None:
        write_result(Path(output), result, rows)
    return result


def write_result(output: Path, result: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> None:
    lines = [json.dumps({"task": name, **row}, ensure_ascii=False) for name in rows for row in rows[name]]
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output.with_suffix(".rows.jsonl"), "".join(line + "\n" for line in lines).encode())
        write_whole(output, json.dumps(result, ensure_ascii=False, indent=1).encode())


def summarise(task: Task, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The headline metric first, every metric under `metrics`."""
    names = ("acc_norm", "acc", "acc_token") if task.sort == "choices" else ("exact_match", "f1")
    metrics = {}
    for name in names:
        value, stderr = mean_and_stderr([row[name] for row in rows])
        metrics[name] = {"value": value, "stderr": stderr}
    headline = HEADLINE[task.sort]
    return {
        "metric": headline,
        **metrics[headline],
        "n": len(rows),
        "chance": task.chance,
        "truncated": sum(row["truncated"] for row in rows),
        "metrics": metrics,
    }
