"""How well each score of `synth verify` tells right pairs from wrong ones, as AUC: one half is chance, one is certain.

Right pairs are FairytaleQA's own; each fault is made from them (benchmarks/corruptions.py), and a score's AUC is over
the right pairs that allow the fault against the wrong ones made of them. A score that a pair does not get is left out,
with the number of pairs that have it in parentheses where it is not all.

    python benchmarks/verify.py                                              scores that need no engine, and their speed
    python benchmarks/verify.py --engine vllm --model DIR --sample 100       those that need one, on a part
    python benchmarks/verify.py --fit                                        the weights in synth/verify/combined.py
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

from synth.config import SynthesizerSettings
from synth.engine import Engine, open_engine, synthesizer_tokenizer
from synth.prompt import Prompt
from synth.verify.ask import Case as Asked
from synth.verify.ask import Judge, ask_score
from synth.verify.combined import brevity
from synth.verify.reading import Reading
from synth.verify.text import TEXT_SCORES
from synth.verify.verifier import Found, read_pair

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
NAMES = (*TEXT_SCORES, "combined")
ASKED_NAMES = ("open_closed", "agreement", "options")
ASKED_FAULTS = ("swapped", "swapped, same text", "entity swapped", "negation added")
OPTION_FAULTS = ("wrong option", "wrong option, same text")
Table = dict[str, list[tuple[Found, Found]]]  # fault -> what right and wrong pairs got


def auc(right: Iterable[float], wrong: Iterable[float]) -> float:
    """The share of (right, wrong) in which the right one is higher; a tie counts half."""
    lower, higher = np.sort(np.fromiter(wrong, float)), np.fromiter(right, float)
    below = np.searchsorted(lower, higher, "left") + np.searchsorted(lower, higher, "right")
    return float(below.sum() / (2 * len(lower) * len(higher)))


class Reader:
    """The scores that need no engine, of any case; a text is prepared once."""

    def __init__(self) -> None:
        self.texts: dict[str, Reading] = {}

    def __call__(self, case: Case) -> Found:
        text = self.texts.setdefault(case.context, Reading(case.context))
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


def cell(name: str, found: list[tuple[Found, Found]]) -> str:
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
    """Each score alone on one core, texts prepared anew; the best of three."""
    speeds = []
    for name in (*NAMES, "all"):
        taken = [seconds(cases, NAMES if name == "all" else (name,)) for _ in range(3)]
        speeds.append(f"{name} {len(cases) / min(taken):,.0f}")
    print(f"\npairs a second on one core of {platform.processor() or platform.machine()}: {', '.join(speeds)}")


def seconds(cases: list[Case], names: tuple[str, ...]) -> float:
    started, texts = time.process_time(), dict[str, Reading]()
    for case in cases:
        read_pair(texts.setdefault(case.context, Reading(case.context)), case.pair, names)
    return time.process_time() - started


# ---- with an engine


async def ask_table(engine: Engine, judge: Judge, cases: list[Case], sample: int, seed: int) -> Table:
    """A part of each fault's cases, the same ones for each where they allow it."""
    faults, read = corrupt(cases, seed), Reader()
    chosen = set(Random(seed).sample(cases, min(sample, len(cases))))
    table: Table = {}
    for fault in (*ASKED_FAULTS, *OPTION_FAULTS):
        both = [(right, wrong) for right, wrong in faults[fault] if right._replace(choices=()) in chosen]
        names = ("options",) if fault in OPTION_FAULTS else ("open_closed", "agreement")
        asked = await asyncio.gather(
            *(
                ask(engine, judge, case, names, f"{fault}/{number}/{side}")
                for number, pair in enumerate(both)
                for side, case in enumerate(pair)
            )
        )
        told = [read(case) | found for case, found in zip((case for pair in both for case in pair), asked, strict=True)]
        table[fault] = list(zip(told[::2], told[1::2], strict=True))
    return table


async def ask(engine: Engine, judge: Judge, case: Case, names: tuple[str, ...], id: str) -> Found:
    opened = Prompt(judge.tokenizer).start_example(case.context)
    asked = Asked(judge, engine, opened, case.pair, id)
    return dict(zip(names, await asyncio.gather(*(ask_score(name, asked) for name in names)), strict=True))


async def run_engine(arguments: argparse.Namespace, cases: list[Case]) -> None:
    settings = SynthesizerSettings(
        model=arguments.model, engine=arguments.engine, max_model_len=2048, max_new_tokens=128, max_num_seqs=32
    )
    judge = Judge(settings, synthesizer_tokenizer(settings), arguments.seed)
    engine = open_engine(settings, judge.tokenizer)
    started = time.monotonic()
    table = await ask_table(engine, judge, cases, arguments.sample, arguments.seed)
    taken = time.monotonic() - started
    await engine.close()
    scored = sum(2 * len(found) for found in table.values())
    show(f"{arguments.engine}, {Path(arguments.model).name}", (*ASKED_NAMES, "combined"), table)
    print(f"\n{scored} pairs in {taken:.0f} s")


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
    parser.add_argument("--model", help="an HF directory, such as launch/smollm2.py writes")
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--fit", action="store_true")
    arguments = parser.parse_args()
    data: Callable[[str], list[Case]] = lambda name: read_cases(SHARED / name)  # noqa: E731
    if arguments.fit:
        fit(data("fairytaleqa/train.jsonl"), arguments.seed)
    elif arguments.engine:
        asyncio.run(run_engine(arguments, data("fairytaleqa/val.jsonl")))
    else:
        for name in ("fairytaleqa/val.jsonl", "pubmedqa/part1.jsonl"):
            show(name, NAMES, read_table(data(name), arguments.seed))
        show_speed(data("fairytaleqa/val.jsonl"))


if __name__ == "__main__":
    main()
