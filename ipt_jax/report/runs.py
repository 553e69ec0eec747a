"""What a report reads: run directories (run.json, metrics.jsonl) and the results that `ipt eval -o` wrote.

A run that has not logged yet, or was killed in the middle of a line, is read as far as it goes, and what is missing
is said on the page; a directory that is no run at all is a UserError. When a resumed run logged a step twice, the
later line counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.sources import read_jsonl

KINDS = ("raw", "augmented", "task", "instruction")


@dataclass(frozen=True)
class Run:
    name: str
    path: Path
    colour: int
    info: dict[str, Any]  # run.json
    steps: list[dict[str, Any]]  # metrics.jsonl, steps ascending
    damaged: int  # lines that are not JSON

    def series(self, value: str | Callable[[dict[str, Any]], Any]) -> list[tuple[float, float]]:
        """(tokens, value) of the logged steps that have the value."""
        read = value if callable(value) else lambda step: step.get(value)
        pairs = ((float(step["tokens"]), read(step)) for step in self.steps)
        return [(at, float(found)) for at, found in pairs if isinstance(found, int | float)]

    def loss_of(self, kind: str) -> list[tuple[float, float]]:
        return self.series(lambda step: (step.get("loss_by_kind") or {}).get(kind))

    @property
    def plan(self) -> dict[str, Any]:
        plan = self.info.get("plan")
        return plan if isinstance(plan, dict) else {}


@dataclass
class Entrant:
    """One model's evaluation: a run's, or that of a model that is no run on this page."""

    name: str
    colour: int
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # task -> question id -> row


def read_runs(paths: Sequence[Path]) -> list[Run]:
    if not paths:
        raise UserError("report: no run directories given; name at least one")
    names = _names([Path(path) for path in paths])
    return [_read_run(Path(path), name, colour) for colour, (path, name) in enumerate(zip(paths, names, strict=True))]


def read_entrants(paths: Sequence[Path], runs: Sequence[Run]) -> list[Entrant]:
    """Evaluations in the order of the runs they belong to, then those of other models."""
    entrants = {run.name: Entrant(run.name, run.colour) for run in runs}
    for path in paths:
        result = _read_result(Path(path))
        name = _owner(result, Path(path), runs)
        entrant = entrants.setdefault(name, Entrant(name, len(entrants)))
        entrant.tasks.update(result["tasks"])
        entrant.rows.update(_read_rows(Path(path)))
    return [entrant for entrant in entrants.values() if entrant.tasks]


def _names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart: `vanilla` and `instruct`, or `a/run` and `b/run`."""
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise UserError("report: the same run directory is given twice; name each once")
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("distinct paths have distinct ends")


def _read_run(path: Path, name: str, colour: int) -> Run:
    if not path.is_dir():
        raise UserError(f"run {path}: no such directory; give the run_dir of a training recipe")
    info_file, metrics_file = path / "run.json", path / "metrics.jsonl"
    if not info_file.is_file() and not metrics_file.is_file():
        raise UserError(f"run {path}: neither run.json nor metrics.jsonl in it; give the run_dir of a training recipe")
    info = _read_json(info_file) if info_file.is_file() else {}
    steps, damaged = _read_metrics(metrics_file) if metrics_file.is_file() else ([], 0)
    return Run(name, path, colour, info, steps, damaged)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); give a file that this project wrote") from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: a JSON {type(value).__name__}, expected an object; give a file that this project wrote"
        )
    return value


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    steps: dict[int, dict[str, Any]] = {}
    damaged = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            step = json.loads(line)
            steps[int(step["step"])] = {**step, "tokens": int(step["tokens"])}
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            damaged += bool(line.strip())
    return [steps[number] for number in sorted(steps)], damaged


def _read_result(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"evaluation {path}: no such file; give what `ipt eval --output` wrote")
    result = _read_json(path)
    tasks = result.get("tasks")
    if not isinstance(tasks, dict) or not all(_is_result(task) for task in tasks.values()):
        raise UserError(f"evaluation {path}: no tasks with metric and value in it; give what `ipt eval --output` wrote")
    return result


def _is_result(task: Any) -> bool:
    return isinstance(task, dict) and "metric" in task and isinstance(task.get("value"), int | float)


def _owner(result: dict[str, Any], path: Path, runs: Sequence[Run]) -> str:
    """The run that holds the evaluated model, else the run named as the model or the file is, else its own name."""
    model = Path(str(result.get("model", path.stem)))
    for run in runs:
        if model.resolve().is_relative_to(run.path.resolve()):
            return run.name
    for name in (model.name, path.stem, path.parent.name):
        if name in {run.name for run in runs}:
            return name
    return model.name or path.stem


def _read_rows(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The questions' own results, which `ipt eval --output` writes beside its summary."""
    rows_file = path.with_suffix(".rows.jsonl")
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    if rows_file.is_file():
        for number, row in read_jsonl(rows_file):
            if not {"task", "id"} <= row.keys():
                raise UserError(f"{rows_file}: line {number} has no task and id; run `ipt eval` again")
            rows.setdefault(str(row["task"]), {})[str(row["id"])] = row
    return rows


def last(points: list[tuple[float, float]], count: int = 10) -> float | None:
    """Mean of the last finite values: one step's loss says more about its batch than about the model."""
    values = [value for _, value in points if math.isfinite(value)][-count:]
    return math.fsum(values) / len(values) if values else None
