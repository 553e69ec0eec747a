"""The evaluation section of a report: scores with standard errors, differences question by question, and answers.

Two runs that answered the same questions are compared in pairs: the standard error of their difference is that of the
mean per-question difference, which is smaller than what the two error bars suggest when they fail on the same
questions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from ipt_jax.core.html import Child, Markup, join, tag
from ipt_jax.core.svg import Bar, score, score_bars
from ipt_jax.report.runs import Entrant
from ipt_jax.report.training import COLOURS, colour, swatch, table

METRIC_NAMES = {
    "acc": "accuracy by summed log-probability",
    "acc_norm": "accuracy by log-probability a byte",
    "acc_token": "accuracy by log-probability a token",
    "exact_match": "exact match",
    "f1": "token F1",
}
SHOWN = 4  # answered questions a task


def results(entrants: Sequence[Entrant]) -> Markup | None:
    if not entrants:
        return None
    tasks = list(dict.fromkeys(name for entrant in entrants for name in entrant.tasks))
    words = "Bars show the headline metric, whiskers one standard error, the dashed line what guessing scores."
    return join(
        [
            tag("h2", "Evaluation"),
            tag("p", words, class_="note"),
            tag("div", *(_task_card(name, entrants) for name in tasks), _all_metrics(tasks, entrants), class_="cards"),
        ]
    )


def answers(entrants: Sequence[Entrant]) -> Markup | None:
    """A few questions of each task with every model's answer, those first on which the models differ."""
    tasks = list(dict.fromkeys(name for entrant in entrants for name in entrant.rows))
    cards = [_answers_card(name, [entrant for entrant in entrants if name in entrant.rows]) for name in tasks]
    if not cards:
        return None
    words = "The first questions on which the models differ, then the first of the rest."
    return join([tag("h2", "Answers"), tag("p", words, class_="note"), tag("div", *cards, class_="cards")])


def _task_card(name: str, entrants: Sequence[Entrant]) -> Markup:
    scored = [entrant for entrant in entrants if name in entrant.tasks]
    first = scored[0].tasks[name]
    bars = [_bar(entrant, entrant.tasks[name]) for entrant in scored]
    metric = first["metric"]
    cut = max(entrant.tasks[name].get("truncated") or 0 for entrant in scored)
    note = f"{METRIC_NAMES.get(metric, metric)}, {first.get('n', 0):,} questions" + (f", {cut:,} cut" if cut else "")
    chart = score_bars(name, bars, chance=first.get("chance"))
    gaps = [_gap(name, scored[0], entrant) for entrant in scored[1:]]
    return tag("div", tag("h3", name), tag("p", note, class_="note"), chart, *gaps, class_="card")


def _bar(entrant: Entrant, task: dict[str, Any]) -> Bar:
    return Bar(entrant.name, entrant.colour % COLOURS, float(task["value"]), task.get("stderr"), int(task.get("n", 0)))


def _gap(name: str, first: Entrant, other: Entrant) -> Markup | None:
    """`instruct − vanilla: +12.4 ± 1.8 points over the same 600 questions`."""
    ours, theirs = first.rows.get(name, {}), other.rows.get(name, {})
    metric = first.tasks[name]["metric"]
    shared = [key for key in ours if key in theirs and metric in ours[key] and metric in theirs[key]]
    if len(shared) < 2:
        return None
    gaps = [float(theirs[key][metric]) - float(ours[key][metric]) for key in shared]
    mean, stderr = statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    clear = abs(mean) > 2 * stderr
    words = f"{100 * mean:+.1f} ± {100 * stderr:.1f} points"
    return tag(
        "p",
        f"{other.name} − {first.name}: ",
        tag("span", words, class_=("good" if mean > 0 else "bad") if clear else None),
        f" over the same {len(shared):,} questions",
        None if clear else " (within two standard errors)",
        class_="note",
    )


def _all_metrics(tasks: Sequence[str], entrants: Sequence[Entrant]) -> Markup:
    rows: list[list[Child]] = []
    for name in tasks:
        for metric in dict.fromkeys(metric for e in entrants for metric in _metrics(e.tasks.get(name, {}))):
            found = [_metrics(entrant.tasks.get(name, {})).get(metric) for entrant in entrants]
            values = sorted((each["value"] for each in found if each), reverse=True)
            best = values[0] if len(values) > 1 and values[0] > values[1] else None
            rows.append([f"{name}: {METRIC_NAMES.get(metric, metric)}", *(_cell(each, best) for each in found)])
    head = ["metric", *(join([swatch(colour(entrant.colour)), entrant.name]) for entrant in entrants)]
    return tag("div", tag("h3", "All metrics"), table(head, rows), class_="card wide")


def _metrics(task: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if not task:
        return {}
    return task.get("metrics") or {task["metric"]: {"value": task["value"], "stderr": task.get("stderr")}}


def _cell(found: dict[str, Any] | None, best: float | None) -> Child:
    if not found:
        return "–"
    words = score(found["value"], found.get("stderr"))
    return tag("span", words, class_="best") if found["value"] == best else words


def _answers_card(name: str, entrants: Sequence[Entrant]) -> Markup:
    rows = [entrant.rows[name] for entrant in entrants]
    shared = [key for key in rows[0] if all(key in each for each in rows)]
    differing = [key for key in shared if len({each[key].get("correct") for each in rows}) > 1]
    chosen = dict.fromkeys(differing[: SHOWN // 2] + shared)
    turns = [_turn(key, entrants, rows) for key in list(chosen)[:SHOWN]]
    return tag("div", tag("h3", name), *turns, class_="card")


def _turn(key: str, entrants: Sequence[Entrant], rows: Sequence[dict[str, dict[str, Any]]]) -> Markup:
    question = rows[0][key]
    lines = [tag("dt", "right answer"), tag("dd", question.get("answer"))]
    for entrant, each in zip(entrants, rows, strict=True):
        right = bool(each[key].get("correct"))
        mark = tag("span", "✓ " if right else "✗ ", class_="good" if right else "bad")
        lines += [
            tag("dt", swatch(colour(entrant.colour)), " ", entrant.name),
            tag("dd", mark, each[key].get("prediction") or "(nothing)"),
        ]
    prompt = str(question.get("prompt", ""))
    shown = prompt if len(prompt) <= 600 else "… " + prompt[-600:]
    return tag("div", tag("div", shown, class_="prompt"), tag("dl", *lines, class_="answers"), class_="turn")
