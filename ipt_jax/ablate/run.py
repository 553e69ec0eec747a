"""`ipt ablate`: trains the arms of an ablation over several seeds, evaluates them, and writes what differs.

The base is a recipe of `ipt train`. An arm changes some of its fields or adds sources to its mix. A seed sets the
order of rows and, without `model.from`, the new weights, so that arms of one seed start equal. Arms must train on equal
tokens in equal steps.

Runs are in `output/runs/ARM/SEED`, evaluations in `output/evals`. A rerun skips what is finished, resumes a killed
training run from its checkpoint, and writes `ablation.json` and `ablation.html` when all is done. One process trains
and evaluates all runs, one after the other.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np
import pydantic
from pydantic import Field

from ipt_jax.ablate.comparison import TaskScores, arm_value, compare_arms, write_results
from ipt_jax.config import Recipe, last_step
from ipt_jax.core.errors import UserError
from ipt_jax.core.files import lock_directory, write_whole, writing
from ipt_jax.core.hashing import digest, file_digest
from ipt_jax.core.progress import format_duration
from ipt_jax.core.settings import Settings, check_settings, load_settings
from ipt_jax.corpus.text_files import read_jsonl
from ipt_jax.data.mixture import SourceMix
from ipt_jax.evaluate.run import run_eval
from ipt_jax.evaluate.tasks import Task, read_tasks
from ipt_jax.train.segments import plan_of_run

ARM_NAME = re.compile(r"[\w.-]+")
ADD = "add"  # in an arm: sources that join the mix of the base


class AblateSettings(Settings):
    """An ablation: what is trained, how often, and on what it is measured."""

    base: str
    """Recipe of `ipt train`. Its `run_dir`, `data.seed` and `train.seed` are set by the ablation."""
    arms: dict[str, dict[str, Any]] = Field(min_length=2)
    """Per arm, fields of the base to change, and `add`: sources to add to its mix. `{}` is the base itself."""
    baselines: list[str] | None = Field(default=None, min_length=1)
    """Arms that every later arm is compared with. null: the first arm."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """Seeds. Every arm is trained once per seed."""
    tasks: list[str] = Field(min_length=1)
    """Tasks, as in `ipt eval --tasks`: `FILE` or `NAME=FILE`."""
    limit: int | None = Field(default=None, gt=0)
    """Maximum questions per task. null: all."""
    points: int = Field(default=1, gt=0)
    """Checkpoints per run that are evaluated, at equal distances. The last is the end of the run."""
    allow_unequal: bool = False
    """Compare arms that differ in tokens or steps."""
    output: str
    """Directory to write: runs, evaluations, `ablation.json` and `ablation.html`."""

    @pydantic.model_validator(mode="after")
    def _names(self) -> Self:
        if odd := [name for name in self.arms if not ARM_NAME.fullmatch(name)]:
            raise ValueError(f"arm {odd[0]!r}: use letters, digits, dots, hyphens and underscores")
        for name in self.baselines or ():
            if name not in self.arms:
                raise ValueError(f"baseline {name!r} is not an arm; arms are {', '.join(self.arms)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} has duplicates; remove them")
        return self

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(arm, baseline) of each comparison, in the order of the arms."""
        names = list(self.arms)
        baselines = self.baselines or names[:1]
        return [(arm, one) for i, arm in enumerate(names) for one in names[:i] if one in baselines]


@dataclass(frozen=True)
class AblationRun:
    """One arm with one seed. `steps`: those that are evaluated, ascending. `key`: what the scores depend on."""

    arm: str
    seed: int
    recipe: Recipe
    steps: list[int]
    key: str
    evals: Path

    def scores_file(self, step: int) -> Path:
        return self.evals / f"{self.arm}.{self.seed}.{step}.json"

    def mark_evaluated(self, step: int) -> None:
        write_whole(self.scores_file(step).with_suffix(".key"), self.key.encode())

    def missing(self) -> list[int]:
        """Steps without scores of this run and these tasks."""

        def known(step: int) -> bool:
            file = self.scores_file(step).with_suffix(".key")
            return file.is_file() and file.read_text(encoding="utf-8") == self.key

        return [step for step in self.steps if not known(step)]


def run_ablate(settings: AblateSettings) -> tuple[dict[str, Any], bool]:
    """The results, and whether all runs are finished. A signal ends the run in training and leaves the others."""
    tasks, names = read_tasks(settings.tasks, settings.limit)
    if names:
        raise UserError(f"tasks: {names[0]!r} is not a task file; an ablation evaluates JSON Lines and text files")
    planned = {arm: plan_arm(settings, arm) for arm in settings.arms}
    if not settings.allow_unequal:
        refuse_unequal(planned)
    runs = [plan_run(settings, arm, seed, planned[arm], tasks) for seed, arm in product(settings.seeds, settings.arms)]
    output = Path(settings.output)
    with writing(output):
        (output / "evals").mkdir(parents=True, exist_ok=True)
        lock = lock_directory(output)
    try:
        if not train_and_evaluate(settings, runs):
            finished = sum(not run.missing() for run in runs)
            return {"output": settings.output, "runs": len(runs), "finished": finished}, False
        results = summarize(settings, planned, tasks, runs)
        write_results(output, results)
        return results, True
    finally:
        os.close(lock)


# ---- what is trained


@dataclass(frozen=True)
class PlannedArm:
    """`summary`: that of the plan; its tokens and steps, those of the run. Every seed has the same."""

    recipe: Recipe
    summary: dict[str, Any]
    fingerprint: str
    tokens: int
    steps: int


def plan_arm(settings: AblateSettings, arm: str) -> PlannedArm:
    """The plan of an arm with the first seed."""
    recipe = arm_recipe(settings, arm, settings.seeds[0])
    if recipe.train.branch_from and (len(settings.seeds) > 1 or settings.points > 1):
        raise UserError(
            f"arm {arm!r}: train.branch_from fixes the seeds of its run; set one seed and points: 1, or start from its "
            "weights alone with model.from"
        )
    plan, _ = plan_of_run(recipe)
    planned = last_step(recipe, plan.steps)
    steps = min(planned, recipe.train.stop_at_step or planned)
    tokens = plan.tokens if steps == plan.steps else steps * recipe.train.batch_tokens
    if steps < settings.points:
        raise UserError(
            f"points is {settings.points}, but arm {arm!r} has {steps} steps; set points to {steps} at most"
        )
    return PlannedArm(recipe, plan.summary(), plan.fingerprint, tokens, steps)


def arm_recipe(settings: AblateSettings, arm: str, seed: int) -> Recipe:
    """The base with the changes of an arm, for one seed."""
    own = {"run_dir": str(Path(settings.output, "runs", arm, str(seed))), "train.seed": seed, "data.seed": seed}
    changes = dict(_fields({name: value for name, value in settings.arms[arm].items() if name != ADD}))
    if taken := [name for name in changes if name in own]:
        raise UserError(f"arm {arm!r}: {taken[0]} is set by the ablation; remove it")
    overrides = [f"{name}={json.dumps(value)}" for name, value in {**changes, **own}.items()]
    try:
        recipe = load_settings(Recipe, settings.base, overrides)
        if ADD not in settings.arms[arm]:
            return recipe
        listed = settings.arms[arm][ADD]
        added = [check_settings(SourceMix, one, ADD) for one in (listed if isinstance(listed, list) else [listed])]
        sources = [one.model_dump(exclude_defaults=True) for one in join_sources(recipe.data.sources, added)]
        return load_settings(Recipe, settings.base, [*overrides, f"data.sources={json.dumps(sources)}"])
    except UserError as error:
        raise UserError(f"arm {arm!r}: {error}") from error


def _fields(changes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{'train': {'z_loss': 1}, 'data.tokens': 5} -> ('train.z_loss', 1), ('data.tokens', 5)"""
    for name, value in changes.items():
        if isinstance(value, dict) and value:
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def join_sources(sources: Sequence[SourceMix], added: Sequence[SourceMix]) -> list[SourceMix]:
    """The mix of both. Shares of `sources` shrink in proportion, to make room for the shares of `added`."""
    left = 1 - sum(one.share or 0.0 for one in added)
    shrunk = [one if one.share is None else one.model_copy(update={"share": one.share * left}) for one in sources]
    return [*shrunk, *added]


def refuse_unequal(planned: Mapping[str, PlannedArm]) -> None:
    """Raises UserError for the first arm whose tokens or steps are not those of the first arm."""
    (first, wanted), *others = planned.items()
    for arm, found in others:
        if (found.tokens, found.steps) != (wanted.tokens, wanted.steps):
            raise UserError(
                f"arm {arm!r} trains on {found.tokens:,} tokens in {found.steps:,} steps, arm {first!r} on "
                f"{wanted.tokens:,} in {wanted.steps:,}; make data.tokens and train.batch_tokens equal, or set "
                "allow_unequal: true"
            )


def plan_run(settings: AblateSettings, arm: str, seed: int, planned: PlannedArm, tasks: Sequence[Task]) -> AblationRun:
    recipe, every = arm_recipe(settings, arm, seed), planned.steps // settings.points
    if settings.points > 1:
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"keep_every": every})})
    meaning = {
        "plan": planned.fingerprint,
        "seed": seed,
        "model": recipe.model.model_dump(),
        "optimizer": recipe.optimizer.model_dump(),
        "train": recipe.train.model_dump(include={"z_loss", "skip_steps", "compute_dtype", "branch_from"}),
        "tasks": {task.name: file_digest(task.path) for task in tasks},
        "limit": settings.limit,
    }
    steps = [*(every * number for number in range(1, settings.points)), planned.steps]
    return AblationRun(arm, seed, recipe, steps, digest(meaning), Path(settings.output, "evals"))


# ---- training and evaluation


def train_and_evaluate(settings: AblateSettings, runs: Sequence[AblationRun]) -> bool:
    """Whether all runs are finished. Prints which run begins and when the last one will end."""
    waiting = [run for run in runs if run.missing()]
    done, begun = len(runs) - len(waiting), time.monotonic()
    if done:
        report(f"{done} of {len(runs)} runs are finished and skipped")
    for number, run in enumerate(waiting):
        mean = (time.monotonic() - begun) / max(number, 1)
        eta = f", ETA {format_duration(mean * (len(waiting) - number))}" if number else ""
        report(f"run {done + number + 1} of {len(runs)}: {run.arm}, seed {run.seed}{eta}")
        if not train_run(run):
            return False
        for step in run.missing():
            scores = run_eval(
                str(Path(run.recipe.run_dir, "checkpoints", str(step))),
                settings.tasks,
                output=run.scores_file(step),
                limit=settings.limit,
            )
            run.mark_evaluated(step)
            values = ", ".join(f"{name} {task['value']:.4g}" for name, task in scores["tasks"].items())
            report(f"{run.arm}, seed {run.seed}, step {step}: {values}")
        gc.collect()  # the weights of this run, before those of the next
    return True


def train_run(run: AblationRun) -> bool:
    """Trains or resumes. Whether the run has reached its last step."""
    from ipt_jax.train.trainer import run_train  # importing jax takes seconds

    try:
        result = run_train(run.recipe)
    except UserError as error:
        raise UserError(f"arm {run.arm!r}, seed {run.seed}: {error}") from error
    return bool(result["step"] >= result["steps"])


def report(line: str) -> None:
    print(f"ipt ablate: {line}", file=sys.stderr, flush=True)


# ---- results


def summarize(
    settings: AblateSettings, planned: Mapping[str, PlannedArm], tasks: Sequence[Task], runs: Sequence[AblationRun]
) -> dict[str, Any]:
    """The content of ablation.json."""
    from ipt_jax.train.run_info import git_commit, versions

    scores = {task.name: task_scores(task, runs) for task in tasks}
    arms = {
        arm: {
            "changes": settings.arms[arm],
            "tokens": one.tokens,
            "steps": one.steps,
            "sources": one.summary["sources"],
            "tasks": {name: arm_value(task, arm, settings.seeds) for name, task in scores.items()},
            "curves": curves([run for run in runs if run.arm == arm], one, scores),
        }
        for arm, one in planned.items()
    }
    described = {
        name: {"metric": one.metric, "chance": one.chance, "n": len(one.weights), "clusters": one.count}
        for name, one in scores.items()
    }
    return {
        "output": settings.output,
        "base": settings.base,
        "seeds": settings.seeds,
        "tasks": described,
        "arms": arms,
        "comparisons": compare_arms(scores, settings.pairs, settings.seeds),
        "git_commit": git_commit(),
        "versions": versions(),
    }


def curves(
    runs: Sequence[AblationRun], planned: PlannedArm, scores: Mapping[str, TaskScores]
) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Per task and seed of one arm: (tokens, value) of each evaluated step."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {name: {} for name in scores}
    for run in runs:
        for step in run.steps:
            tokens = min(step * run.recipe.train.batch_tokens, planned.tokens)
            result = json.loads(run.scores_file(step).read_text(encoding="utf-8"))
            for name, by_seed in found.items():
                by_seed.setdefault(str(run.seed), []).append((tokens, result["tasks"][name]["value"]))
    return found


def task_scores(task: Task, runs: Sequence[AblationRun]) -> TaskScores:
    """The scores of all runs at their last step, question by question."""
    clusters = _clusters(task)
    by_arm: dict[str, list[Any]] = {}
    for run in runs:
        file = run.scores_file(run.steps[-1])
        summary = json.loads(file.read_text(encoding="utf-8"))["tasks"][task.name]
        rows = {row["id"]: row for _, row in read_jsonl(file.with_suffix(".rows.jsonl")) if row["task"] == task.name}
        found = [rows[question.id] for question in task.questions]
        weights = np.array([row.get("bytes", 1.0) for row in found])
        by_arm.setdefault(run.arm, []).append(np.array([row[summary["metric"]] for row in found]) * weights)
    names = [clusters.get(question.id, question.id) for question in task.questions]
    _, numbers = np.unique(names, return_inverse=True)
    return TaskScores(
        summary["metric"], summary["chance"], weights, numbers, {arm: np.stack(one) for arm, one in by_arm.items()}
    )


def _clusters(task: Task) -> dict[str, str]:
    """By question id, the field `cluster` of its row in the task file, where it has one."""
    if task.path.suffix == ".txt":
        return {}
    rows = (row for _, row in read_jsonl(task.path))
    return {str(row["id"]): str(row["cluster"]) for row in rows if "cluster" in row and "id" in row}
