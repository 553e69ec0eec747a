"""The training sections of a report: what each run is, its token mix, its curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from ipt_jax.core.html import Markup, draw
from ipt_jax.core.progress import format_duration
from ipt_jax.core.svg import Line, Point, line_chart, share_bar, short
from ipt_jax.corpus.records import KINDS
from ipt_jax.report.runs import Run

COLOURS = 8
LAST_STEPS = 10  # logged ones, whose mean loss is shown
KIND_LABELS = {
    "raw": "raw text",
    "augmented": "instruction-augmented text",
    "task": "tuning tasks",
    "instruction": "instructions",
}


def run_style(colour: int) -> str:
    """The class of the page's style that sets the colour of a run."""
    return f"c{colour % COLOURS}"


def kind_style(source: dict[str, Any]) -> str:
    """The class of the page's style that sets the colour of a source's kind."""
    return f"k-{source['kind'] if source.get('kind') in KINDS else 'other'}"


def mix_bar(title: str, sources: Sequence[dict[str, Any]]) -> Markup:
    words = "{name}: {share:.1%} of tokens"
    return share_bar(title, [(kind_style(one), float(one["share"]), words.format_map(one)) for one in sources])


def overview(runs: Sequence[Run]) -> dict[str, Any]:
    """{head, rows, notes}: a table with one column per run, without the rows that no run can fill."""
    rows = []
    for label, read in OVERVIEW:
        cells = [read(run) for run in runs]
        if any(cell is not None for cell in cells):
            rows.append([label, *("–" if cell is None else cell for cell in cells)])
    head = ["", *(draw("named", style=run_style(run.colour), words=run.name) for run in runs)]
    return {"head": head, "rows": rows, "notes": [note for run in runs if (note := _note(run))]}


def _note(run: Run) -> str:
    if not run.steps:
        return f"{run.name} has logged no step yet."
    lines = "line" if run.damaged == 1 else "lines"
    return f"{run.name}: {run.damaged} unreadable {lines} in metrics.jsonl left out." if run.damaged else ""


def _progress(run: Run, plan_key: str, step_key: str, format_number: Callable[[int], str]) -> str | None:
    """Steps or tokens, and how many are planned."""
    planned, seen = run.plan.get(plan_key), run.steps[-1][step_key] if run.steps else 0
    return f"{format_number(seen)} of {format_number(planned)}" if planned else format_number(seen) if seen else None


def _speed(run: Run) -> str | None:
    values = [value for _, value in run.series("tokens_per_second")]
    return f"{median(values):,.0f}" if values else None


def _time(run: Run) -> str | None:
    """Time in steps, without compilation and checkpoints. Steps between two logged ones took what the later one did."""
    total, before = 0.0, 0
    for step in run.steps:
        total += float(step.get("step_seconds") or 0.0) * (step["step"] - before)
        before = step["step"]
    return format_duration(total) if total else None


def _loss(points: list[Point]) -> str | None:
    """Mean of the last finite values, because the loss of one step depends on its batch."""
    values = [value for _, value in points if math.isfinite(value)][-LAST_STEPS:]
    return f"{math.fsum(values) / len(values):.3f}" if values else None


def _last(points: list[Point]) -> str | None:
    return f"{points[-1][1]:.3f}" if points else None


def _lowest(run: Run) -> str | None:
    """`2.345 at step 1,500`"""
    found = run.info.get("best")
    return f"{found['held_out_loss']:.3f} at step {found['step']:,}" if found else None


def _kind_row(kind: str) -> tuple[str, Callable[[Run], str | None]]:
    return f"loss on {KIND_LABELS[kind]}", lambda run: _loss(run.loss_of(kind))


OVERVIEW: list[tuple[str, Callable[[Run], str | None]]] = [
    ("parameters", lambda run: short(run.info["parameters"]) if "parameters" in run.info else None),
    ("devices", lambda run: run.info.get("devices")),
    ("attention", lambda run: run.info.get("attention")),
    ("steps", lambda run: _progress(run, "steps", "step", "{:,}".format)),
    ("tokens seen", lambda run: _progress(run, "tokens", "tokens", short)),
    ("loss", lambda run: _loss(run.series("loss"))),
    *(_kind_row(kind) for kind in KINDS),
    ("held-out loss, last", lambda run: _last(run.held_out("loss"))),
    ("held-out loss, lowest", _lowest),
    ("tokens per second (median)", _speed),
    ("time in steps", _time),
]


def mixes(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """{name, chart, rows, facts} of each run with a plan."""
    return [_mix(run.name, run.plan) for run in runs if run.plan.get("sources")]


def _mix(name: str, plan: dict[str, Any]) -> dict[str, Any]:
    facts = [
        f"{plan['rows']:,} rows of {plan['seq_len']:,}" if "rows" in plan and "seq_len" in plan else None,
        f"{plan['padding_fraction']:.1%} padding" if "padding_fraction" in plan else None,
        f"{plan['truncated_tokens']:,} tokens cut off" if plan.get("truncated_tokens") else None,
    ]
    rows = [
        [
            draw("named", style=kind_style(source), words=source["name"]),
            f"{source['documents']:,}",
            short(source["tokens"]),
            f"{source['epochs']:.2f}",
            f"{source['share']:.1%}",
        ]
        for source in plan["sources"]
    ]
    chart = mix_bar(f"Token mix of {name}", plan["sources"])
    return {"name": name, "chart": chart, "rows": rows, "facts": ", ".join(fact for fact in facts if fact)}


def curves(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """{title, note, legend, chart} of each quantity that a run has logged."""
    logged = [run for run in runs if run.steps]
    if not logged:
        return []
    per_token = "nats per token"
    zero, plain, drawn = {"zero": True}, {"zero": True, "smooth": False}, {"smooth": False}
    charts: list[tuple[str, str | None, str, Callable[[Run], list[Point]], dict[str, Any]]] = [
        ("Loss", "all target tokens", per_token, lambda run: run.series("loss"), {}),
        ("Held-out loss", "documents that training leaves out", per_token, lambda run: run.held_out("loss"), drawn),
        ("Held-out loss on answers", "targets that answer", per_token, lambda run: run.held_out("answer_loss"), drawn),
        ("Loss, second half", "the end of training, enlarged", per_token, _later(logged, "loss", 0.5), {}),
        *(
            (f"Held-out loss on {name}", None, per_token, _held_out_on(kind), drawn)
            for kind, name in KIND_LABELS.items()
        ),
        # the fall in the first tenth would press the part that distinguishes runs into a line
        *(
            (f"Loss on {name}", "after the first tenth of training", per_token, _later(logged, kind, 0.1), {})
            for kind, name in KIND_LABELS.items()
        ),
        ("Learning rate", None, "", lambda run: run.series("learning_rate"), plain),
        ("Gradient norm", "before clipping", "", lambda run: run.series("grad_norm"), zero),
        ("Speed", None, "tokens/s", lambda run: run.series("tokens_per_second"), plain),
        ("Model FLOP utilisation", None, "share of peak", lambda run: run.series("mfu"), zero),
    ]
    cards = []
    for title, note, unit, read, options in charts:
        lines = [Line(run.name, run.colour % COLOURS, read(run)) for run in logged]
        lines = [line for line in lines if any(math.isfinite(value) for _, value in line.points)]
        if lines:
            chart = line_chart(lines, title=title, x_label="tokens", y_label=unit, **options)
            legend = [(run_style(line.colour), line.name) for line in lines]
            cards.append({"title": title, "note": note, "legend": legend, "chart": chart})
    return cards


def _held_out_on(kind: str) -> Callable[[Run], list[Point]]:
    return lambda run: run.held_out(kind)


def _later(runs: Sequence[Run], what: str, fraction: float) -> Callable[[Run], list[Point]]:
    """The loss (of a kind) after `fraction` of the tokens that the longest run has seen."""
    start = fraction * max(run.steps[-1]["tokens"] for run in runs)

    def read(run: Run) -> list[Point]:
        points = run.series("loss") if what == "loss" else run.loss_of(what)
        return [point for point in points if point[0] >= start]

    return read
