"""`ipt report`: training runs side by side on one self-contained HTML page.

The page loads nothing (its own content policy forbids it), runs no script and holds no clock time: the same inputs
give the same bytes. It is written under a temporary name and renamed. What a run has not got yet is left out, and
said.

The last sections of a report: synthesized groups, what differs between the runs' settings, and every setting.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import write_whole, writing
from ipt_jax.core.html import Markup, join, tag, whole_page
from ipt_jax.corpus.records import GroupText, Pair, SynthGroup, decode
from ipt_jax.corpus.shards import Shards
from ipt_jax.report.results import answers, results
from ipt_jax.report.runs import Entrant, Run, read_entrants, read_runs
from ipt_jax.report.training import curves, mixes, overview, run_heading, table

GROUPS = 3
PAIRS = 6  # shown of one text
CHARACTERS = 1200  # shown of one text


def samples(groups: Path) -> Markup:
    """The first, the middle and the last group: enough to see what the synthesizer makes, the same at each call."""
    shards = Shards(groups, verify=False)
    chosen = sorted({0, len(shards) // 2, len(shards) - 1}) if len(shards) else []
    found = [decode(record, SynthGroup) for record in shards.__getitems__(chosen[:GROUPS])]
    words = f"{len(found)} of {len(shards):,} groups, with the pairs that the parser or a filter refused."
    return join(
        [
            tag("h2", "Synthesized groups"),
            tag("p", words, class_="note"),
            tag("div", *(_group(group) for group in found), class_="cards narrow"),
        ]
    )


def _group(group: SynthGroup) -> Markup:
    return tag("div", tag("h3", group.id), *(_text(text) for text in group.texts), class_="card")


def _text(text: GroupText) -> Markup:
    shown = text.text if len(text.text) <= CHARACTERS else text.text[:CHARACTERS] + " …"
    more = len(text.pairs) - PAIRS
    return tag(
        "div",
        tag("span", f"round {text.round}: {text.raw_id}", class_="tag"),
        tag("div", shown, class_="passage"),
        tag("ul", *(_pair(pair) for pair in text.pairs[:PAIRS]), class_="pairs"),
        tag("p", f"and {more} more", class_="note") if more > 0 else None,
        class_="text",
    )


def _pair(pair: Pair) -> Markup:
    note = pair.format.replace("_", " ") if pair.accepted else f"rejected: {pair.reason}"
    return tag(
        "li",
        tag("div", pair.question, " ", tag("span", note, class_="tag"), class_="question"),
        tag("div", pair.answer, class_="answer"),
        class_=None if pair.accepted else "rejected",
    )


def settings(runs: Sequence[Run]) -> Markup:
    return join(
        [
            tag("h2", "Settings"),
            _differences(runs) if len(runs) > 1 else None,
            *(_fold(run) for run in runs),
        ]
    )


def _differences(runs: Sequence[Run]) -> Markup:
    flat = [flatten({key: run.info[key] for key in run.info if not key.startswith("plan")}) for run in runs]
    every = dict.fromkeys(key for each in flat for key in each)
    keys = [key for key in every if len({each.get(key, "null") for each in flat}) > 1]
    if not keys:
        return tag("p", "The runs' settings are equal.", class_="note")
    rows = [[key, *("–" if each.get(key, "null") == "null" else each[key] for each in flat)] for key in keys]
    head = ["", *(run_heading(run) for run in runs)]
    return tag("div", tag("h3", "What differs"), table(head, rows), class_="card")


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Leaves by dotted key: {"a": {"b": [1]}} gives {"a.b.0": "1"}."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: json.dumps(value, ensure_ascii=False)}
    return {k: v for key, inner in items for k, v in flatten(inner, f"{prefix}.{key}" if prefix else str(key)).items()}


def _fold(run: Run) -> Markup:
    text = json.dumps(run.info, indent=2, ensure_ascii=False) if run.info else "no run.json in this run directory"
    return tag("details", tag("summary", f"{run.name}: resolved config, versions, mesh"), tag("pre", text))


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
