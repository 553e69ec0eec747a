"""The training sections of a report: what each run is, its token mix, its curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from ipt_jax.core.html import Child, Markup, join, tag
from ipt_jax.core.progress import format_duration
from ipt_jax.core.svg import BarSegment, Line, line_chart, share_bar, short
from ipt_jax.report.runs import KINDS, Run, last

COLOURS = 8
KIND_NAMES = {
    "raw": "raw text",
    "augmented": "instruction-augmented text",
    "task": "tuning tasks",
    "instruction": "instructions",
}


def swatch(style: str) -> Markup:
    return tag("span", class_=f"swatch {style}")


def colour(run_colour: int) -> str:
    return f"c{run_colour % COLOURS}"


def table(head: Sequence[Child], rows: Sequence[Sequence[Child]]) -> Markup:
    """First column headings; the rest as given."""
    header = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    return tag("div", tag("table", header, tag("tbody", *body)), class_="scroll")


def run_heading(run: Run) -> Markup:
    return join([swatch(colour(run.colour)), run.name])


def overview(runs: Sequence[Run]) -> Markup:
    """One column a run; a row that no run can fill is left out."""
    rows: list[list[Child]] = []
    for label, read in OVERVIEW:
        cells = [read(run) for run in runs]
        if any(cell is not None for cell in cells):
            rows.append([label, *("–" if cell is None else cell for cell in cells)])
    notes = [_note(run) for run in runs]
    return join(
        [
            tag("h2", "Runs"),
            tag("p", "Losses are means over the last ten logged steps, in nats a token.", class_="note"),
            tag("div", table(["", *(run_heading(run) for run in runs)], rows), *notes, class_="card"),
        ]
    )


def _note(run: Run) -> Markup | None:
    if not run.steps:
        return tag("p", f"{run.name} has logged no step yet.", class_="note")
    if run.damaged:
        lines = "line" if run.damaged == 1 else "lines"
        return tag("p", f"{run.name}: {run.damaged} unreadable {lines} in metrics.jsonl left out.", class_="note")
    return None


def _tokens(run: Run) -> str | None:
    planned = run.plan.get("tokens")
    seen = run.steps[-1]["tokens"] if run.steps else 0
    return f"{short(seen)} of {short(planned)}" if planned else short(seen) if seen else None


def _steps(run: Run) -> str | None:
    planned = run.plan.get("steps")
    seen = run.steps[-1]["step"] if run.steps else 0
    return f"{seen:,} of {planned:,}" if planned else f"{seen:,}" if seen else None


def _speed(run: Run) -> str | None:
    values = [value for _, value in run.series("tokens_per_second")]
    return f"{median(values):,.0f}" if values else None


def _time(run: Run) -> str | None:
    """Steps between two logged ones took what the later one did; compilation and checkpoints are not in it."""
    total, before = 0.0, 0
    for step in run.steps:
        total += float(step.get("step_seconds") or 0.0) * (step["step"] - before)
        before = step["step"]
    return format_duration(total) if total else None


def _loss(points: list[tuple[float, float]]) -> str | None:
    value = last(points)
    return None if value is None else f"{value:.3f}"


def _kind_row(kind: str) -> tuple[str, Callable[[Run], str | None]]:
    return f"loss on {KIND_NAMES[kind]}", lambda run: _loss(run.loss_of(kind))


OVERVIEW: list[tuple[str, Callable[[Run], str | None]]] = [
    ("parameters", lambda run: short(run.info["parameters"]) if "parameters" in run.info else None),
    ("devices", lambda run: run.info.get("devices")),
    ("attention", lambda run: run.info.get("attention")),
    ("steps", _steps),
    ("tokens seen", _tokens),
    ("loss", lambda run: _loss(run.series("loss"))),
    *(_kind_row(kind) for kind in KINDS),
    ("tokens a second (median)", _speed),
    ("time in steps", _time),
]


def mixes(runs: Sequence[Run]) -> Markup | None:
    cards = [_mix(run) for run in runs if run.plan.get("sources")]
    if not cards:
        return None
    words = "Shares of real tokens, BOS and EOS included, as the plan of each run counts them."
    return join(
        [
            tag("h2", "The mix"),
            tag("p", words, class_="note"),
            tag("div", *cards, class_="cards"),
        ]
    )


def _mix(run: Run) -> Markup:
    sources = run.plan["sources"]
    parts = [
        BarSegment(
            source["name"], _kind(source), float(source["share"]), f"{source['name']}: {source['share']:.1%} of tokens"
        )
        for source in sources
    ]
    rows = [
        [
            join([swatch(f"k-{_kind(source)}"), source["name"]]),
            f"{source['documents']:,}",
            short(source["tokens"]),
            f"{source['epochs']:.2f}",
            f"{source['share']:.1%}",
        ]
        for source in sources
    ]
    plan = run.plan
    facts = [
        f"{plan['rows']:,} rows of {plan['seq_len']:,}" if "rows" in plan and "seq_len" in plan else None,
        f"{plan['padding_fraction']:.1%} padding" if "padding_fraction" in plan else None,
        f"{plan['truncated_tokens']:,} tokens cut off" if plan.get("truncated_tokens") else None,
    ]
    return tag(
        "div",
        tag("h3", run.name),
        share_bar(f"Token mix of {run.name}", parts),
        table(["source", "docs", "tokens", "epochs", "share"], rows),
        tag("p", ", ".join(fact for fact in facts if fact), class_="note"),
        class_="card",
    )


def _kind(source: dict[str, Any]) -> str:
    return source["kind"] if source.get("kind") in KINDS else "other"


def curves(runs: Sequence[Run]) -> Markup | None:
    logged = [run for run in runs if run.steps]
    if not logged:
        return None
    cards = [
        _card(logged, "Loss", "all target tokens", "nats a token", lambda run: run.series("loss")),
        _card(
            logged, "Loss, second half", "the end of training, enlarged", "nats a token", _later(logged, "loss", 0.5)
        ),
        *(_kind_card(logged, kind) for kind in KINDS),
        _card(logged, "Learning rate", None, "", lambda run: run.series("learning_rate"), smooth=False, zero=True),
        _card(logged, "Gradient norm", "before clipping", "", lambda run: run.series("grad_norm"), zero=True),
        _card(logged, "Speed", None, "tokens/s", lambda run: run.series("tokens_per_second"), smooth=False, zero=True),
        _card(logged, "Model FLOP utilisation", None, "share of peak", lambda run: run.series("mfu"), zero=True),
    ]
    words = (
        "Over tokens seen. Thick: smoothed, thin: as logged. Runs with different mixes average their total loss over "
        "different tokens: compare them kind by kind."
    )
    return join(
        [
            tag("h2", "Training"),
            tag("p", words, class_="note"),
            tag("div", *(card for card in cards if card), class_="cards"),
        ]
    )


def _kind_card(runs: Sequence[Run], kind: str) -> Markup | None:
    """The first tenth is left out: its fall would press the part that tells runs apart into a line."""
    note = "after the first tenth of training"
    return _card(runs, f"Loss on {KIND_NAMES[kind]}", note, "nats a token", _later(runs, kind, 0.1))


def _later(runs: Sequence[Run], what: str, fraction: float) -> Callable[[Run], list[tuple[float, float]]]:
    """The loss (of a kind) after `fraction` of the tokens that the longest run has seen."""
    start = fraction * max(run.steps[-1]["tokens"] for run in runs)

    def read(run: Run) -> list[tuple[float, float]]:
        points = run.series("loss") if what == "loss" else run.loss_of(what)
        return [point for point in points if point[0] >= start]

    return read


def _card(
    runs: Sequence[Run],
    title: str,
    note: str | None,
    unit: str,
    read: Callable[[Run], list[tuple[float, float]]],
    *,
    smooth: bool = True,
    zero: bool = False,
) -> Markup | None:
    """A chart of what the runs have; None when none has a finite value."""
    lines = [Line(run.name, run.colour % COLOURS, points) for run in runs if (points := read(run))]
    lines = [line for line in lines if any(math.isfinite(value) for _, value in line.points)]
    if not lines:
        return None
    chart = line_chart(lines, title=title, x_label="tokens", y_label=unit, smooth=smooth, zero=zero)
    legend = tag("ul", *(tag("li", swatch(f"c{line.colour}"), line.name) for line in lines), class_="legend")
    return tag("div", tag("h3", title), tag("p", note, class_="note") if note else None, legend, chart, class_="card")
