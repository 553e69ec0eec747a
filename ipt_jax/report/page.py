"""`ipt report`: training runs side by side on one self-contained HTML page.

The page loads nothing (its own content policy forbids it), runs no script and holds no clock time: the same inputs
give the same bytes. It is written under a temporary name and renamed. What a run has not got yet is left out, and
said.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipt_jax.corpus.files import write_whole, writing
from ipt_jax.corpus.markup import Markup, tag, whole_page
from ipt_jax.corpus.settings import UserError
from ipt_jax.report.details import samples, settings
from ipt_jax.report.results import answers, results
from ipt_jax.report.runs import Entrant, Run, read_entrants, read_runs
from ipt_jax.report.training import curves, mixes, overview


def run_report(
    runs: Sequence[Path | str],
    output: Path | str,
    *,
    evals: Sequence[Path | str] = (),
    groups: Path | str | None = None,
    title: str = "Training report",
) -> dict[str, Any]:
    """Writes the page. `evals`: files of `ipt eval --output`; those named eval*.json in a run directory are found."""
    output = Path(output)
    if output.is_dir():
        raise UserError(
            f"report output {output}: a directory; give the path of a file, such as {output / 'report.html'}"
        )
    found = read_runs([Path(run) for run in runs])
    inside = [path for run in found for path in sorted(run.path.glob("eval*.json"))]
    files = {path.resolve(): path for path in [*inside, *(Path(path) for path in evals)]}
    entrants = read_entrants(list(files.values()), found)
    page = _page(title, found, entrants, Path(groups) if groups is not None else None)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, page.encode())
    steps = {run.name: run.steps[-1]["step"] if run.steps else 0 for run in found}
    return {"output": str(output), "bytes": len(page.encode()), "runs": steps, "evaluations": len(files)}


def _page(title: str, runs: Sequence[Run], entrants: Sequence[Entrant], groups: Path | None) -> str:
    subtitle = " · ".join(run.name for run in runs)
    sections: list[Markup | None] = [
        tag(
            "header",
            tag("h1", title),
            tag("p", subtitle, class_="note") if len(runs) > 1 or subtitle != title else None,
        ),
        overview(runs),
        results(entrants),
        mixes(runs),
        curves(runs),
        answers(entrants),
        samples(groups) if groups is not None else None,
        settings(runs),
        tag("footer", "Written by ipt report. This page loads nothing from elsewhere."),
    ]
    return whole_page(title, sections)
