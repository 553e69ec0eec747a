"""AUC of each score of `synth verify` between correct pairs and wrong ones: 0.5 is chance, 1 is perfect.

Correct pairs are FairytaleQA's own. Each fault is made from them (benchmarks/corruptions.py). A score's AUC compares
the correct pairs that allow the fault with the wrong ones made from them. A pair without the score is skipped. If not
all pairs have it, their number is in parentheses.

    python benchmarks/verify.py                                              scores that need no engine, and their speed
    python benchmarks/verify.py --engine vllm --model DIR --seconds 300      those that need one, on a sample
    python benchmarks/verify.py --fit                                        the weights in synth/verify/text_scores.py
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

import numpy as np
from corruptions import Case, corrupt, read_cases

from ipt_jax.core.hashing import digest
from synth.config import SynthesizerSettings
from synth.engine import open_engine, synthesizer_tokenizer
from synth.engine.base import Engine
from synth.format.prompt import Prompt
from synth.verify.text_scores import TEXT_SCORES, PreparedText, brevity
from synth.verify.verifier import ORDERS, FoundScores, Judge, ask_score, in_order, read_pair
from synth.verify.verifier import Case as Asked

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
NAMES = (*TEXT_SCORES, "combined")
ASKED_NAMES = ("open_closed", "agreement", "options")
ASKED_FAULTS = (
    "swapped",
    "swapped, same text",
    "question swapped",
    "entity swapped",
    "negation added",
    "wrong option",
    "wrong option, same text",
)
PRODUCT = "combined · open_closed"
AT_ONCE = 8  # correct pairs per batch of requests, with all wrong pairs made from them
Table = dict[str, list[tuple[FoundScores, FoundScores]]]  # fault -> what right and wrong pairs got


def auc(right: Iterable[float], wrong: Iterable[float]) -> float:
    """The share of (right, wrong) in which the right one is higher; a tie counts half."""
    lower, higher = np.sort(np.fromiter(wrong, float)), np.fromiter(right, float)
    below = np.searchsorted(lower, higher, "left") + np.searchsorted(lower, higher, "right")
    return float(below.sum() / (2 * len(lower) * len(higher)))


class Reader:
    """The scores that need no engine, of any case; a text is prepared once."""

    def __init__(self) -> None:
        self.texts: dict[str, PreparedText] = {}

    def __call__(self, case: Case) -> FoundScores:
        text = self.texts.setdefault(case.context, PreparedText(case.context))
        return read_pair(text, case.pair, NAMES)


def read_table(cases: list[Case], seed: int) -> Table:
    read = Reader()
    return {
        fault: [(read(right), read(wrong)) for right, wrong in both] for fault, both in corrupt(cases, seed).items()
    }


def show(title: str, names: tuple[str, ...], table: Table) -> None:
    print(f"\n{title}\n| fault | pairs | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    for fault, found in table.items():
        print(f"| {fault} | {len(found)} | {' | '.join(cell(name, found) for name in names)} |")


def cell(name: str, found: list[tuple[FoundScores, FoundScores]]) -> str:
    known = [
        (right[name], wrong[name])
        for right, wrong in found
        if isinstance(right.get(name), float) and isinstance(wrong.get(name), float)
    ]
    if not known:
        return "–"
    value = auc((right for right, _ in known), (wrong for _, wrong in known))
    return f"{value:.3f}" + (f" ({len(known)})" if len(known) < len(found) else "")


def show_speed(cases: list[Case]) -> None:
    """Speed of each score on one core, texts prepared each time. The best of three."""
    speeds = []
    for name in (*NAMES, "all"):
        taken = [seconds(cases, NAMES if name == "all" else (name,)) for _ in range(3)]
        speeds.append(f"{name} {len(cases) / min(taken):,.0f}")
    print(f"\npairs per second on one core of {platform.processor() or platform.machine()}: {', '.join(speeds)}")


def seconds(cases: list[Case], names: tuple[str, ...]) -> float:
    started, texts = time.process_time(), dict[str, PreparedText]()
    for case in cases:
        read_pair(texts.setdefault(case.context, PreparedText(case.context)), case.pair, names)
    return time.process_time() - started


# ---- with an engine


class Asker:
    """The scores that need an engine, of any case; a right pair is asked once, whatever is compared with it."""

    def __init__(self, engine: Engine, judge: Judge) -> None:
        self.engine, self.judge = engine, judge
        self.read = Reader()
        self.known: dict[Case, asyncio.Task[FoundScores]] = {}

    async def both(self, right: Case, wrong: Case) -> tuple[FoundScores, FoundScores]:
        if right.choices:
            return await self.chosen(right, wrong)
        first, second = await asyncio.gather(*(self.told(case) for case in (right, wrong)))
        return first, second

    async def told(self, case: Case) -> FoundScores:
        if case not in self.known:
            self.known[case] = asyncio.create_task(self.ask(case))
        return await self.known[case]

    async def ask(self, case: Case) -> FoundScores:
        asked = self.case(case)
        names = ("open_closed", "agreement")
        found = dict(zip(names, await asyncio.gather(*(ask_score(name, asked) for name in names)), strict=True))
        given = self.read(case) | found
        parts = given["combined"], found["open_closed"]
        known = all(isinstance(part, float) for part in parts)
        return given | ({PRODUCT: parts[0] * parts[1]} if known else {})  # type: ignore[operator]

    async def chosen(self, right: Case, wrong: Case) -> tuple[FoundScores, FoundScores]:
        """Both are choices among the same options, so one set of requests serves both."""
        asked = self.case(right)
        orders = [Random(f"{asked.id}/{number}").sample(right.choices, len(right.choices)) for number in range(ORDERS)]
        shares = await asyncio.gather(*(in_order(asked, order, number) for number, order in enumerate(orders)))
        first, second = (
            self.read(case) | {"options": sum(share[case.answer] for share in shares) / ORDERS}
            for case in (right, wrong)
        )
        return first, second

    def case(self, case: Case) -> Asked:
        opened = Prompt(self.judge.tokenizer).start_example(case.context)
        return Asked(self.judge, self.engine, opened, case.pair, digest(list(case)))


async def ask_table(asker: Asker, cases: list[Case], seconds: float, seed: int) -> Table:
    """Some cases with all their faults at a time, in a drawn order, until the time is over."""
    faults = {
        fault: {right._replace(choices=()): (right, wrong) for right, wrong in both}
        for fault, both in corrupt(cases, seed).items()
        if fault in ASKED_FAULTS
    }
    cases, started = Random(seed).sample(cases, len(cases)), time.monotonic()
    table: Table = {fault: [] for fault in faults}
    while cases and time.monotonic() - started < seconds:
        some, cases = cases[:AT_ONCE], cases[AT_ONCE:]
        both = [(fault, found[case]) for fault, found in faults.items() for case in some if case in found]
        for (fault, _), told in zip(both, await asyncio.gather(*(asker.both(*two) for _, two in both)), strict=True):
            table[fault].append(told)
    return table


def run_engine(arguments: argparse.Namespace, cases: list[Case]) -> None:
    settings = SynthesizerSettings(
        model=arguments.model, engine=arguments.engine, max_model_len=2048, max_new_tokens=128, max_num_seqs=32
    )
    judge = Judge(settings, synthesizer_tokenizer(settings), arguments.seed)
    engine = open_engine(settings, judge.tokenizer)

    async def run() -> Table:
        try:
            return await ask_table(Asker(engine, judge), cases, arguments.seconds, arguments.seed)
        finally:
            await engine.close()

    started = time.monotonic()
    table = asyncio.run(run())
    taken = time.monotonic() - started
    show(f"{arguments.engine}, {Path(arguments.model).name}", (*ASKED_NAMES, "combined", PRODUCT), table)
    print(f"\n{sum(map(len, table.values()))} comparisons in {taken:.0f} s")


# ---- the weights of the combined score


def fit(cases: list[Case], seed: int) -> None:
    faults, read = corrupt(cases, seed), Reader()
    for fault, parts in (("swapped", ("grounded", "quoted", "brevity")), ("question swapped", ("question_grounded",))):
        rows, targets = [], []
        for both in faults[fault]:
            for target, case in zip((1.0, 0.0), both, strict=True):
                found = read(case) | {"brevity": brevity(case.pair)}
                if all(isinstance(found[part], float) for part in parts):
                    rows.append([found[part] for part in parts] + [1.0])
                    targets.append(target)
        weights = logistic(np.array(rows), np.array(targets))
        print(fault, dict(zip((*parts, "constant"), weights.round(2).tolist(), strict=True)))


def logistic(rows: np.ndarray, targets: np.ndarray, ridge: float = 0.1, steps: int = 30) -> np.ndarray:
    """The weights of a logistic regression, by Newton's method."""
    weights = np.zeros(rows.shape[1])
    for _ in range(steps):
        chances = 1 / (1 + np.exp(-rows @ weights))
        slope = rows.T @ (targets - chances) - ridge * weights
        bend = (rows * (chances * (1 - chances))[:, None]).T @ rows + ridge * np.eye(len(weights))
        weights = weights + np.linalg.solve(bend, slope)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("vllm", "jax"))
    parser.add_argument("--model", help="an HF directory, such as examples/smollm2.py writes")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which an engine gets no new pairs")
    parser.add_argument("--fit", action="store_true")
    arguments = parser.parse_args()
    data: Callable[[str], list[Case]] = lambda name: read_cases(SHARED / name)  # noqa: E731
    if arguments.fit:
        fit(data("fairytaleqa/train.jsonl"), arguments.seed)
    elif arguments.engine:
        run_engine(arguments, data("fairytaleqa/val.jsonl"))
    else:
        for name in ("fairytaleqa/val.jsonl", "pubmedqa/part1.jsonl"):
            show(name, NAMES, read_table(data(name), arguments.seed))
        show_speed(data("fairytaleqa/val.jsonl"))


if __name__ == "__main__":
    main()
