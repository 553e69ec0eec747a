"""The evaluation sections of a report: scores with standard errors, differences per question, scaling, and answers.

Two runs that answered the same questions are compared in pairs: the standard error of their difference is that of the
mean per-question difference. It is smaller than the two error bars suggest when both fail on the same questions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ipt_jax.core.html import Markup, draw
from ipt_jax.core.svg import Bar, Dot, score, score_bars, short, trend_chart
from ipt_jax.report.runs import Entrant, Run
from ipt_jax.report.training import COLOURS, run_style

METRIC_NAMES = {
    "acc": "accuracy by summed log-probability",
    "acc_norm": "accuracy by log-probability per character",
    "acc_bytes": "accuracy by log-probability per byte",
    "acc_token": "accuracy by log-probability per token",
    "exact_match": "exact match",
    "f1": "token F1",
    "bits_per_byte": "bits per byte",
    "byte_perplexity": "perplexity per byte",
    "word_perplexity": "perplexity per word",
    "token_perplexity": "perplexity per token",
}
LOWER_IS_BETTER = ("bits_per_byte", "byte_perplexity", "word_perplexity", "token_perplexity")
SHOWN = 4  # answered questions per task
PROMPT = 600  # characters of a prompt, its end


def task_scores(entrants: Sequence[Entrant]) -> list[dict[str, Any]]:
    """{name, note, chart, gaps} of each task of questions."""
    found = {name: [one for one in entrants if name in one.tasks] for name in _task_names(entrants)}
    questions = (name for name in found if found[name][0].tasks[name]["metric"] not in LOWER_IS_BETTER)
    return [_task_scores(name, found[name]) for name in questions]


def _task_names(entrants: Iterable[Entrant]) -> list[str]:
    return list(dict.fromkeys(name for entrant in entrants for name in entrant.tasks))


def _task_scores(name: str, entrants: Sequence[Entrant]) -> dict[str, Any]:
    tasks = [entrant.tasks[name] for entrant in entrants]
    bars = [
        Bar(one.name, one.colour % COLOURS, float(task["value"]), task.get("stderr"), int(task.get("n", 0)))
        for one, task in zip(entrants, tasks, strict=True)
    ]
    first, cut = tasks[0], max(task.get("truncated") or 0 for task in tasks)
    metric = METRIC_NAMES.get(first["metric"], first["metric"])
    return {
        "name": name,
        "note": f"{metric}, {first.get('n', 0):,} questions" + (f", {cut:,} cut" if cut else ""),
        "chart": score_bars(name, bars, chance=first.get("chance")),
        "gaps": [gap for entrant in entrants[1:] if (gap := _gap(name, entrants[0], entrant))],
    }


def _gap(name: str, first: Entrant, other: Entrant) -> dict[str, Any] | None:
    """The difference of two models over the questions that both answered; None for fewer than two questions."""
    ours, theirs = first.rows.get(name, {}), other.rows.get(name, {})
    metric = first.tasks[name]["metric"]
    shared = [key for key in ours if key in theirs and metric in ours[key] and metric in theirs[key]]
    if len(shared) < 2:
        return None
    gaps = [float(theirs[key][metric]) - float(ours[key][metric]) for key in shared]
    mean, stderr = statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    clear = abs(mean) > 2 * stderr
    return {
        "names": f"{other.name} − {first.name}",
        "points": f"{100 * mean:+.1f} ± {100 * stderr:.1f} points",
        "style": ("good" if mean > 0 else "bad") if clear else "",
        "questions": len(shared),
        "clear": clear,
    }


def scaling(runs: Sequence[Run], entrants: Sequence[Entrant]) -> list[dict[str, Any]]:
    """{name, note, chart} per task: scores against the logarithm of augmented tokens, or of all tokens where no two
    runs differ in augmented ones. Empty where no two runs differ in either."""
    scored = [(run, one) for run in runs for one in entrants if one.name == run.name]
    for what in ("augmented tokens", "tokens"):
        at = {run.name: _tokens_seen(run, augmented=what != "tokens") for run, _ in scored}
        if len({tokens for tokens in at.values() if tokens > 0}) > 1:
            names = _task_names([one for _, one in scored])
            return [_scaling(name, what, at, [one for _, one in scored if name in one.tasks]) for name in names]
    return []


def _tokens_seen(run: Run, *, augmented: bool) -> float:
    seen = float(run.steps[-1]["tokens"] if run.steps else run.plan.get("tokens", 0))
    sources = [one for one in run.plan.get("sources", []) if "augmented" in str(one.get("kind")).split("+")]
    return seen * sum(float(one["share"]) for one in sources) if augmented else seen


def _scaling(name: str, what: str, at: dict[str, float], entrants: Sequence[Entrant]) -> dict[str, Any]:
    metric = entrants[0].tasks[name]["metric"]
    scale = 1 if metric in LOWER_IS_BETTER else 100
    found = [one for one in entrants if at[one.name] > 0]
    dots = [Dot(one.name, one.colour % COLOURS, at[one.name], scale * one.tasks[name]["value"], "") for one in found]
    dots = [replace(dot, words=f"{short(dot.y)} at {short(dot.x)} {what}") for dot in dots]
    fit, trend = fit_trend([(dot.x, dot.y) for dot in dots])
    without = ", ".join(one.name for one in entrants if at[one.name] <= 0)
    unit = METRIC_NAMES.get(metric, metric) + ("" if scale == 1 else ", %")
    chart = trend_chart(dots, trend, title=name, x_label=what, y_label=unit) if dots else ""
    return {"name": name, "note": fit + (f" Without {what}: {without}." if without else ""), "chart": chart}


def fit_trend(points: Sequence[tuple[float, float]]) -> tuple[str, list[tuple[float, float, float, float]]]:
    """The least-squares line of y over log10 x in words, and (x, middle, low, high) along it: 95% intervals of the
    line, from Student's t with n - 2 degrees of freedom. No line for fewer than three different x."""
    different = len({x for x, _ in points})
    if different < 3:
        return f"{different} different amounts: a fit needs three.", []
    from scipy.stats import t  # half a second

    xs, ys = [math.log10(x) for x, _ in points], [y for _, y in points]
    slope, intercept = statistics.linear_regression(xs, ys)
    center, spread = statistics.fmean(xs), sum((x - statistics.fmean(xs)) ** 2 for x in xs)
    rest = sum((y - intercept - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    error, factor = math.sqrt(rest / (len(xs) - 2)), float(t.ppf(0.975, len(xs) - 2))
    trend = []
    for step in range(21):
        x = min(xs) + (max(xs) - min(xs)) * step / 20
        half = factor * error * math.sqrt(1 / len(xs) + (x - center) ** 2 / spread)
        trend.append((10**x, intercept + slope * x, intercept + slope * x - half, intercept + slope * x + half))
    half = factor * error / math.sqrt(spread)
    words = f"{slope:+.2f} per tenfold, 95% interval [{slope - half:.2f}, {slope + half:.2f}], {len(xs)} runs."
    return words, trend


def all_metrics(entrants: Sequence[Entrant]) -> dict[str, Any]:
    """{head, rows}: a table with one column per model."""
    rows = []
    for name in _task_names(entrants):
        found = [_metrics(entrant.tasks.get(name, {})) for entrant in entrants]
        for metric in dict.fromkeys(metric for each in found for metric in each):
            values = [each[metric]["value"] for each in found if metric in each]
            values.sort(reverse=metric not in LOWER_IS_BETTER)
            best = values[0] if len(values) > 1 and values[0] != values[1] else None
            label = f"{name}: {METRIC_NAMES.get(metric, metric)}"
            share = metric not in LOWER_IS_BETTER
            rows.append([label, *(_cell(each.get(metric), best, share) for each in found)])
    head = ["metric", *(draw("named", style=run_style(one.colour), words=one.name) for one in entrants)]
    return {"head": head, "rows": rows}


def _metrics(task: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if not task:
        return {}
    return task.get("metrics") or {task["metric"]: {"value": task["value"], "stderr": task.get("stderr")}}


def _cell(found: dict[str, Any] | None, best: float | None, share: bool) -> str | Markup:
    if not found:
        return "–"
    words = score(found["value"], found.get("stderr")) if share else f"{found['value']:.4f}"
    return draw("span", style="best", words=words) if found["value"] == best else words


def answers(entrants: Sequence[Entrant]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(task, [{prompt, answer, predictions}]): a few questions per task, those first on which the models differ."""
    found = []
    for name in dict.fromkeys(name for entrant in entrants for name in entrant.rows):
        models = [entrant for entrant in entrants if name in entrant.rows]
        if not all("correct" in row for row in models[0].rows[name].values()):
            continue  # texts
        rows = [entrant.rows[name] for entrant in models]
        shared = [key for key in rows[0] if all(key in each for each in rows)]
        differing = [key for key in shared if len({each[key].get("correct") for each in rows}) > 1]
        chosen = list(dict.fromkeys(differing[: SHOWN // 2] + shared))[:SHOWN]
        found.append((name, [_turn(models, [each[key] for each in rows]) for key in chosen]))
    return found


def _turn(models: Sequence[Entrant], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    prompt = str(rows[0].get("prompt", ""))
    return {
        "prompt": prompt if len(prompt) <= PROMPT else "… " + prompt[-PROMPT:],
        "answer": rows[0].get("answer"),
        "predictions": [
            (run_style(model.colour), model.name, bool(row.get("correct")), row.get("prediction"))
            for model, row in zip(models, rows, strict=True)
        ],
    }
