"""`ipt report`: training runs side by side on one self-contained HTML page.

Guarantees: the page loads nothing, runs no script and holds no clock time, so the same inputs give the same bytes. It
is written atomically. Sections without data are omitted, and the page states which data a run lacks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ipt_jax.core.html import render_page, write_page
from ipt_jax.core.manifest import flatten
from ipt_jax.corpus.records import SynthGroup, decode
from ipt_jax.corpus.shards import Shards
from ipt_jax.report.results import all_metrics, answers, scaling, task_scores
from ipt_jax.report.runs import Run, read_entrants, read_runs
from ipt_jax.report.training import curves, mixes, overview

GROUPS = 3  # shown
PAIRS = 6  # shown of one text
CHARACTERS = 1200  # shown of one text


def run_report(
    runs: Sequence[Path | str],
    output: Path | str,
    *,
    evals: Sequence[Path | str] = (),
    groups: Path | str | None = None,
    title: str = "Training report",
) -> dict[str, Any]:
    """Writes the page. `evals`: files of `ipt eval --output`; those named eval*.json in a run directory are found."""
    found = read_runs([Path(run) for run in runs])
    inside = [path for run in found for path in sorted(run.path.glob("eval*.json"))]
    files = {path.resolve(): path for path in [*inside, *(Path(path) for path in evals)]}
    entrants = read_entrants(list(files.values()), found)
    names = " · ".join(run.name for run in found)
    page = render_page(
        Path(__file__).with_name("report.html.j2"),
        title=title,
        subtitle=names if len(found) > 1 or names != title else None,
        overview=overview(found),
        tasks=task_scores(entrants),
        metrics=all_metrics(entrants),
        scaling=scaling(found, entrants),
        mixes=mixes(found),
        curves=curves(found),
        answers=answers(entrants),
        groups=None if groups is None else sample_groups(Path(groups)),
        max_pairs=PAIRS,
        max_characters=CHARACTERS,
        runs=found,
        differences=differences(found),
        json=partial(json.dumps, indent=2, ensure_ascii=False),
    )
    size = write_page(Path(output), page)
    steps = {run.name: run.steps[-1]["step"] if run.steps else 0 for run in found}
    return {"output": str(output), "bytes": size, "runs": steps, "evaluations": len(files)}


def sample_groups(path: Path) -> dict[str, Any]:
    """{shown, total}: the first, the middle and the last group."""
    shards = Shards(path, verify=False)
    chosen = sorted({0, len(shards) // 2, len(shards) - 1}) if len(shards) else []
    shown = [decode(record, SynthGroup) for record in shards.__getitems__(chosen[:GROUPS])]
    return {"shown": shown, "total": len(shards)}


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of a table: a setting that differs, and its value in each run."""
    infos = [flatten({key: run.info[key] for key in run.info if not key.startswith("plan")}) for run in runs]
    flat = [{k: json.dumps(v, ensure_ascii=False) for k, v in info.items() if v not in ({}, [])} for info in infos]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = [[key, *(each.get(key, "null") for each in flat)] for key in keys]
    return [["–" if cell == "null" else cell for cell in row] for row in rows if len(set(row[1:])) > 1]
