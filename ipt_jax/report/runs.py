"""Reads the inputs of a report: run directories (run.json, metrics.jsonl) and results of `ipt eval -o`.

Guarantees: a run without logs, or with damaged lines, is read up to the damage, and the page reports it. Where a
resumed run logged a step twice, the later line counts. A directory without a run is a UserError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.text_files import read_jsonl


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

    def held_out(self, what: str) -> list[tuple[float, float]]:
        """The validated `loss`, `answer_loss`, or loss of a kind."""

        def read(step: dict[str, Any]) -> Any:
            found = step.get("validation") or {}
            return found.get(what, (found.get("loss_by_kind") or {}).get(what))

        return self.series(read)

    @property
    def plan(self) -> dict[str, Any]:
        plan = self.info.get("plan")
        return plan if isinstance(plan, dict) else {}


@dataclass
class Entrant:
    """The evaluation of one model: of a run on this page, or of another model."""

    name: str
    colour: int
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # task -> question id -> row


def read_runs(paths: Sequence[Path]) -> list[Run]:
    if not paths:
        raise UserError("report: no run directories; give at least one")
    return [_read_run(path, name, colour) for colour, (path, name) in enumerate(zip(paths, _names(paths), strict=True))]


def read_entrants(paths: Sequence[Path], runs: Sequence[Run]) -> list[Entrant]:
    """Evaluations in the order of the runs they belong to, then those of other models."""
    entrants = {run.name: Entrant(run.name, run.colour) for run in runs}
    for path in paths:
        result = _read_result(path)
        name = _owner(result, path, runs)
        entrant = entrants.setdefault(name, Entrant(name, len(entrants)))
        entrant.tasks.update(result["tasks"])
        entrant.rows.update(_read_rows(path))
    return [entrant for entrant in entrants.values() if entrant.tasks]


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ: `vanilla` and `instruct`, or `a/run` and `b/run`."""
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise UserError("report: the same run directory is given twice; give each once")
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
        raise UserError(f"run {path}: has neither run.json nor metrics.jsonl; give the run_dir of a training recipe")
    info = _read_json(info_file) if info_file.is_file() else {}
    steps, damaged = _read_metrics(metrics_file) if metrics_file.is_file() else ([], 0)
    return Run(name, path, colour, info, steps, damaged)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: invalid JSON ({error}); give a file that this project wrote") from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: must be a JSON object, got {type(value).__name__}; give a file that this project wrote"
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
        raise UserError(f"evaluation {path}: no such file; give the output of `ipt eval --output`")
    result = _read_json(path)
    tasks = result.get("tasks")
    complete = isinstance(tasks, dict) and all(
        isinstance(task, dict) and "metric" in task and isinstance(task.get("value"), int | float)
        for task in tasks.values()
    )
    if not complete:
        raise UserError(
            f"evaluation {path}: has no tasks with metric and value; give the output of `ipt eval --output`"
        )
    return result


def _owner(result: dict[str, Any], path: Path, runs: Sequence[Run]) -> str:
    """The run that holds the evaluated model, else the run of the model's or the file's name, else the model's name."""
    model = Path(str(result.get("model", path.stem)))
    for run in runs:
        if model.resolve().is_relative_to(run.path.resolve()):
            return run.name
    for name in (model.name, path.stem, path.parent.name):
        if name in {run.name for run in runs}:
            return name
    return model.name or path.stem


def _read_rows(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The results per question, which `ipt eval --output` writes beside its summary."""
    rows_file = path.with_suffix(".rows.jsonl")
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    if rows_file.is_file():
        for number, row in read_jsonl(rows_file):
            if not {"task", "id"} <= row.keys():
                raise UserError(f"{rows_file}: line {number} has no task and id; rerun `ipt eval`")
            rows.setdefault(str(row["task"]), {})[str(row["id"])] = row
    return rows
