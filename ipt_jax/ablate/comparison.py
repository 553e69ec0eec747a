"""Differences between the arms of an ablation, with intervals and tests, and how they are shown.

All arms answer the same questions, so an arm is compared with a baseline question by question and seed by seed.
Questions of one cluster (a field of the task file, such as the person asked about) are resampled together.

- `interval`: percentiles of a bootstrap that resamples clusters and, independently, seeds. It says what another draw of
  questions and of seeds would give. With one seed it cannot, and covers questions only. Three seeds resampled are still
  three seeds: read it beside the difference of each seed.
- `interval_questions`: the same with the trained models as they are.
- `p`, two-sided: the larger of two. One flips the sign of each cluster's difference, averaged over seeds, at random,
  and asks whether these models differ. The other is the share of resamples of `interval` beyond zero, doubled, and asks
  whether other seeds would differ as well.
- `p_holm`: `p` after Holm's correction for all comparisons of the ablation.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ipt_jax.core.files import write_whole
from ipt_jax.core.html import Markup, render_page, write_page
from ipt_jax.core.seeding import draw
from ipt_jax.core.svg import Bar, Interval, Line, interval_chart, line_chart, score_bars
from ipt_jax.evaluate.compare import holm, sign_flip_test
from ipt_jax.report.results import LOWER_IS_BETTER, METRIC_NAMES
from ipt_jax.report.training import COLOURS, mix_bar, run_style

RESAMPLES = 20_000
PERCENTILES = (2.5, 97.5)
CHUNK = 1 << 22  # numbers drawn at a time
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class TaskScores:
    """Scores of all runs on one task. A run's value is the sum of its scores over the sum of `weights`.

    `scores`: by arm, [seed, question]; `weights` [question]: 1, or the bytes of a text; `clusters` [question]: from 0.
    """

    metric: str
    chance: float | None
    weights: Floats
    clusters: np.ndarray[Any, np.dtype[np.int64]]
    scores: dict[str, Floats]

    @property
    def count(self) -> int:
        """Clusters."""
        return int(self.clusters.max()) + 1

    def of_clusters(self, scores: Floats) -> Floats:
        """[seed, cluster]: the sums of `scores` [seed, question] over the questions of each cluster."""
        return np.stack([np.bincount(self.clusters, row) for row in scores])


def arm_value(task: TaskScores, arm: str, seeds: Sequence[int]) -> dict[str, Any]:
    """{value, interval, interval_questions, seeds} of one arm."""
    return _estimate(task, task.scores[arm], seeds, arm, "value")[0]


def compare_arms(
    tasks: Mapping[str, TaskScores], pairs: Sequence[tuple[str, str]], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """One entry per task and (arm, baseline), task by task, with the correction over all of them."""
    found = []
    for name, task in tasks.items():
        for arm, baseline in pairs:
            gaps = task.scores[arm] - task.scores[baseline]
            entry: dict[str, Any] = {"task": name, "arm": arm, "baseline": baseline, "metric": task.metric}
            estimate, beyond = _estimate(task, gaps, seeds, f"{name} {arm} {baseline}", "difference")
            p = max(beyond, sign_flip_test(task.of_clusters(gaps).mean(0), f"{name} {arm} {baseline}"))
            found.append({**entry, **estimate, "p": p, "n": len(task.weights), "clusters": task.count})
    for entry, corrected in zip(found, holm([entry["p"] for entry in found]), strict=True):
        entry["p_holm"] = corrected
    return found


def _estimate(
    task: TaskScores, scores: Floats, seeds: Sequence[int], name: str, what: str
) -> tuple[dict[str, Any], float]:
    """The mean over seeds of the ratio of sums as `what`, its intervals, and the ratio of each seed with its own. Then
    the doubled share of resamples on the rarer side of zero."""
    rng = np.random.default_rng(draw(0, "ablate bootstrap", name).getrandbits(128))
    above, below = task.of_clusters(scores), np.bincount(task.clusters, task.weights)
    values = above.sum(1) / below.sum()
    by_seed = np.concatenate([(chosen @ above.T) / (chosen @ below)[:, None] for chosen in _resamples(rng, len(below))])
    of_seeds = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES) / len(values)
    resampled = (by_seed * of_seeds).sum(1)
    beyond = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    found = {
        what: float(values.mean()),
        "interval": _ends(resampled),
        "interval_questions": _ends(by_seed.mean(1)),
        "seeds": {
            str(seed): {what: float(value), "interval": _ends(replicates)}
            for seed, value, replicates in zip(seeds, values, by_seed.T, strict=True)
        },
    }
    return found, min(1.0, 2 * (1 + beyond) / (1 + RESAMPLES))


def _resamples(rng: np.random.Generator, clusters: int) -> Iterator[Floats]:
    """How often each cluster is drawn, [resample, cluster], RESAMPLES in all."""
    for start in range(0, RESAMPLES, size := max(1, CHUNK // clusters)):
        count = min(size, RESAMPLES - start)
        yield rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=count).astype(np.float64)


def _ends(replicates: Floats) -> list[float]:
    low, high = np.percentile(replicates, PERCENTILES).tolist()
    return [low, high]


# ---- shown


def write_results(output: Path, results: Mapping[str, Any]) -> None:
    write_whole(output / "ablation.json", json.dumps(results, indent=1, ensure_ascii=False).encode())
    write_page(output / "ablation.html", results_page(results))


def print_results(results: Mapping[str, Any]) -> None:
    """Two tables on stdout: the score of each arm, and the differences."""
    console = Console(highlight=False)
    for title, head, rows in (score_table(results), difference_table(results)):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
        for heading in head:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*(cell.replace(" [", "\n[") for cell in row))
        console.print(table, "")
    console.print(f"page: {Path(results['output']) / 'ablation.html'}")


def score_table(results: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, headings, and a row per task."""
    rows = []
    for name, task in results["tasks"].items():
        chance = "–" if task["chance"] is None else f"{100 * task['chance']:.1f}%"
        cells = [_cell(arm["tasks"][name], "value", task["metric"]) for arm in results["arms"].values()]
        rows.append([name, f"{task['n']:,} in {task['clusters']:,}", chance, *cells])
    seeds = len(results["seeds"])
    title = f"Means over {seeds} seed{'s' * (seeds > 1)}, with 95% intervals over questions and seeds"
    return title, ["task", "questions in clusters", "chance", *results["arms"]], rows


def difference_table(results: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, headings, and a row per comparison."""
    rows = []
    for one in results["comparisons"]:
        by_seed = " ".join(_number(found["difference"], one["metric"], sign=True) for found in one["seeds"].values())
        fixed = _interval(one["interval_questions"], one["metric"])
        names = [one["task"], f"{one['arm']} − {one['baseline']}"]
        rows.append([*names, _cell(one, "difference", one["metric"]), fixed, by_seed, _p(one["p_holm"])])
    head = ["task", "arms", "difference", "over questions alone", "each seed", "p (Holm)"]
    return "Differences, in points where scores are shares", head, rows


def _cell(found: Mapping[str, Any], what: str, metric: str) -> str:
    value = _number(found[what], metric, sign=what == "difference")
    return f"{value} {_interval(found['interval'], metric)}"


def _interval(ends: Sequence[float], metric: str) -> str:
    return "[" + ", ".join(_number(end, metric) for end in ends) + "]"


def _number(value: float, metric: str, sign: bool = False) -> str:
    scale, digits = (1, 4) if metric in LOWER_IS_BETTER else (100, 1)
    return f"{scale * value:{'+' if sign else ''}.{digits}f}"


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"


def results_page(results: Mapping[str, Any]) -> str:
    colours = {arm: place % COLOURS for place, arm in enumerate(results["arms"])}
    cards = []
    for name, task in results["tasks"].items():
        metric = task["metric"]
        shown = [one for one in results["comparisons"] if one["task"] == name]
        cards.append(
            {
                "name": name,
                "note": f"{METRIC_NAMES.get(metric, metric)}, {task['n']:,} questions in {task['clusters']:,} clusters",
                "differences": _difference_chart(name, shown, colours),
                "scores": None if metric in LOWER_IS_BETTER else _score_chart(name, task, results["arms"], colours),
                "curve": _curve_chart(name, metric, results["arms"], colours),
            }
        )
    return render_page(
        Path(__file__).with_name("ablation.html.j2"),
        title="Ablation",
        results=results,
        cards=cards,
        tables=[score_table(results), difference_table(results)],
        legend=[(run_style(colour), arm) for arm, colour in colours.items()],
        mixes={arm: mix_bar(f"Token mix of {arm}", one["sources"]) for arm, one in results["arms"].items()},
        json=partial(json.dumps, indent=2, ensure_ascii=False),
    )


def _difference_chart(name: str, shown: Sequence[Mapping[str, Any]], colours: Mapping[str, int]) -> Markup:
    rows = []
    for one in shown:
        scale = 1 if one["metric"] in LOWER_IS_BETTER else 100
        low, high = (scale * end for end in one["interval"])
        points = [scale * found["difference"] for found in one["seeds"].values()]
        names, words = f"{one['arm']} − {one['baseline']}", _cell(one, "difference", one["metric"])
        rows.append(Interval(names, colours[one["arm"]], scale * one["difference"], low, high, points, words))
    return interval_chart(f"{name}, differences", rows)


def _score_chart(name: str, task: Mapping[str, Any], arms: Mapping[str, Any], colours: Mapping[str, int]) -> Markup:
    """The whisker is a fourth of the 95% interval, about one standard error."""
    bars = []
    for arm, one in arms.items():
        found = one["tasks"][name]
        low, high = found["interval"]
        bars.append(Bar(arm, colours[arm], found["value"], (high - low) / 4, task["n"]))
    return score_bars(name, bars, chance=task["chance"])


def _curve_chart(name: str, metric: str, arms: Mapping[str, Any], colours: Mapping[str, int]) -> Markup | None:
    """The mean over seeds, with each seed as a thin line. None for a single point."""
    scale = 1 if metric in LOWER_IS_BETTER else 100
    means, single = [], []
    for arm, one in arms.items():
        seeds = [[(float(at), scale * value) for at, value in points] for points in one["curves"][name].values()]
        mean = [(at[0][0], statistics.fmean(y for _, y in at)) for at in zip(*seeds, strict=True)]
        means.append(Line(arm, colours[arm], mean))
        single += [Line(arm, colours[arm], points) for points in seeds]
    if len(means[0].points) < 2:
        return None
    unit = METRIC_NAMES.get(metric, metric) + ("" if scale == 1 else ", %")
    return line_chart(means, title=name, x_label="tokens", y_label=unit, smooth=False, thin_lines=single)
