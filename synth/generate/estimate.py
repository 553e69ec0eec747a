"""`synth run --estimate N`: what a whole run would take and give, from N texts a few-shot length M = 1, 2 and 3.

Guaranteed: nothing is written; the texts are drawn from (seed, id); each M has texts of its own where the corpus has
enough, so that no M finds another's prompts in the engine's prefix cache. The engine, the prompts and the parser are
those of the run. Figures for the corpus are ratios of the sample times its texts; their standard errors are over
groups and cover the draw of the texts alone, not the speed of another machine.
"""

import asyncio
import heapq
import time
from collections.abc import Iterator, Sequence
from math import sqrt
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from ipt_jax.core.errors import UserError
from ipt_jax.core.progress import Progress, format_rate
from ipt_jax.core.seeding import uniform
from ipt_jax.corpus.records import Document, Segment, SynthGroup
from ipt_jax.corpus.sources import plan_units
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import RunSettings
from synth.engine import Engine, open_engine, synthesizer_tokenizer
from synth.format.wire import pairs_text
from synth.generate.few_shot import Chain, make_chain
from synth.generate.group_store import failed_texts, tally
from synth.generate.scheduler import run_groups
from synth.generate.work_list import Place, Text, read_texts
from synth.groups import Group, group_key, make_group, neighbours, rejection_counts

ROUNDS = (1, 2, 3)
FULL = 4  # groups for each place of the engine, below which its filling and emptying weigh on the speed
SCALED = ("pairs", "tokens", "completion_tokens")  # `tokens`: of texts and accepted pairs, without templates


class Sample(NamedTuple):
    """Texts in corpus order for each M, and how many texts the corpus has."""

    texts: dict[int, list[Text]]
    corpus_texts: int


class Trial(NamedTuple):
    """What one M made of its groups: what was asked, what came, how long it took."""

    asked: list[Group]
    answers: list[SynthGroup]
    seconds: float


def run_estimate(settings: RunSettings, size: int, price_per_hour: float | None) -> dict[str, Any]:
    """Runs the samples on the real engine and returns what `--json` prints."""
    tokenizer = synthesizer_tokenizer(settings.synthesizer)
    chain = make_chain(settings, tokenizer, {"synthesizer": {"weights": "not needed for an estimate"}})
    sample = draw_sample(settings, size, tokenizer)
    engine = open_engine(settings.synthesizer, tokenizer)
    trials = asyncio.run(run_trials(engine, chain, settings, sample))
    figures = {
        str(rounds): describe(trial, settings, sample.corpus_texts, tokenizer, price_per_hour)
        for rounds, trial in trials.items()
    }
    return {
        "texts": sample.corpus_texts,
        "sample_texts": {str(rounds): len(texts) for rounds, texts in sample.texts.items()},
        "engine": settings.synthesizer.engine,
        "gpus": settings.synthesizer.tensor_parallel_size,
        "price_per_hour": price_per_hour,
        "rounds": figures,
        "uncertainty": uncertainty(trials, engine.places),
    }


def draw_sample(settings: RunSettings, size: int, tokenizer: Tokenizer) -> Sample:
    """`size` texts for each M, all different; a third of the corpus each where it has fewer than three times `size`."""
    count = 0

    def counted() -> Iterator[Text]:
        nonlocal count
        with Progress(None, "texts", "synth run: counting texts") as progress:
            for text in read_texts(settings, tokenizer, plan_units(settings.corpus)):
                count += 1
                progress.advance()
                yield text

    def draw(text: Text) -> tuple[float, Place]:
        return uniform(settings.seed, "estimate", text.document.id, text.place.part), text.place

    drawn = heapq.nsmallest(len(ROUNDS) * size, counted(), key=draw)
    if len(drawn) < (least := len(ROUNDS) * max(ROUNDS)):
        raise UserError(
            f"--estimate {size}: corpus {settings.corpus.path} has {count} texts to convert, expected {least}, a group "
            "of three for each M; run a corpus this small as it is"
        )
    parts = {
        rounds: sorted(drawn[first :: len(ROUNDS)], key=lambda text: text.place) for first, rounds in enumerate(ROUNDS)
    }
    return Sample(parts, count)


async def run_trials(engine: Engine, chain: Chain, settings: RunSettings, sample: Sample) -> dict[int, Trial]:
    """One trial after the other on one engine, and before them a group that counts for none: engines start slowly."""
    trials = {}
    words = sample.texts[1][0].document.text.split()
    warm_up = make_group(0, [Document("warm up", "", "raw", [Segment(" ".join(reversed(words)))])])
    try:
        with Progress(sum(map(len, sample.texts.values())), "texts", "synth run: estimate") as progress:
            await run_trial(engine, chain, [warm_up])
            for rounds, texts in sample.texts.items():
                together = neighbours(texts, rounds, lambda text: group_key(text.document, settings.grouping))
                groups = [
                    make_group(number, [text.document for text in group], [text.span for text in group])
                    for number, group in enumerate(together)
                ]
                trials[rounds] = await run_trial(engine, chain, groups, progress)
    finally:
        await engine.close()
    return trials


async def run_trial(engine: Engine, chain: Chain, groups: list[Group], progress: Progress | None = None) -> Trial:
    trial = Trial([], [], 0.0)

    def put(group: Group, answer: SynthGroup) -> None:
        trial.asked.append(group)
        trial.answers.append(answer)
        if progress is not None:
            progress.advance(len(group.texts))

    started = time.monotonic()
    await run_groups(engine, chain, iter(groups), put)
    return trial._replace(seconds=time.monotonic() - started)


def describe(
    trial: Trial, settings: RunSettings, corpus_texts: int, tokenizer: Tokenizer, price: float | None
) -> dict[str, Any]:
    """The figures of one M: of its sample, and for the corpus with standard errors (None where one group is all)."""
    rows = [measure(answer, tokenizer) for answer in trial.answers]
    sizes = [len(group.texts) for group in trial.asked]
    total = {name: sum(row[name] for row in rows) for name in rows[0]}
    hours = trial.seconds / 3600 / sum(sizes) * corpus_texts * settings.synthesizer.tensor_parallel_size
    # An engine's time goes with the tokens that it writes; texts that make it write more make it work longer.
    share = relative_error([row["completion_tokens"] for row in rows], sizes)
    corpus: dict[str, dict[str, float | None]] = {"gpu_hours": scaled(hours, share)}
    if price is not None:
        corpus["dollars"] = scaled(hours * price, share)
    for name in SCALED:
        values = [row[name] for row in rows]
        corpus[name] = scaled(total[name] / sum(sizes) * corpus_texts, relative_error(values, sizes))
    return {
        "groups": len(rows),
        "seconds": round(trial.seconds, 3),
        "tokens_per_second": round(total["completion_tokens"] / trial.seconds, 1),
        "cache_hit_rate": ratio(total["cached_prompt_tokens"], total["prompt_tokens"]),
        "pairs_per_text": ratio(total["pairs"], sum(sizes)),
        "well_formed": ratio(total["pairs"], total["written"]),
        "failed_texts": total["failed"],
        "corpus": corpus,
    }


def measure(answer: SynthGroup, tokenizer: Tokenizer) -> dict[str, int]:
    """The figures of one group."""
    counts = tally(answer)
    kept = [pairs_text(text.accepted_pairs) for text in answer.texts]
    ids = tokenizer.encode_batch([text.text for text in answer.texts] + kept)
    names = ("prompt_tokens", "cached_prompt_tokens", "completion_tokens", "pairs")
    return {
        **{name: counts[name] for name in names},
        "written": counts["pairs"] + rejection_counts(counts).total(),
        "tokens": sum(map(len, ids)),
        "failed": sum(failed_texts(counts).values()),
    }


def relative_error(values: Sequence[float], sizes: Sequence[int]) -> float | None:
    """The standard error of sum(values) / sum(sizes), as a share of it, over groups drawn alike."""
    total, count = sum(values), len(values)
    if count < 2 or not total:
        return None
    mean = total / sum(sizes)
    squares = sum((value - mean * size) ** 2 for value, size in zip(values, sizes, strict=True))
    return sqrt(count / (count - 1) * squares) / total


def scaled(value: float, error: float | None) -> dict[str, float | None]:
    return {"value": four_digits(value), "standard_error": None if error is None else four_digits(value * error)}


def four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def ratio(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0


def uncertainty(trials: dict[int, Trial], places: int) -> str:
    """What the figures can and cannot tell, in a sentence or two; the engine works on `places` groups at once."""
    fewest = min(len(trial.asked) for trial in trials.values())
    told = (
        f"± is one standard error over the groups of the sample ({fewest} or more for each M): it covers which texts "
        "were drawn, and neither another machine nor other work on this one."
    )
    if fewest < FULL * places:
        told += (
            f" The engine takes {places} groups at once, so {fewest} fill it for a part of the time only: a whole run "
            "is faster than this and GPU-hours are an upper bound; "
            f"--estimate {FULL * places * max(ROUNDS)} tells them better."
        )
    return told


def show_estimate(result: dict[str, Any]) -> None:
    """The figures as a table, a column for each M."""
    columns = result["rounds"]
    table = Table("", *(f"M = {rounds}" for rounds in columns), box=None, pad_edge=False)
    first = next(iter(columns.values()))
    for name in (name for name in first if name != "corpus"):
        table.add_row(name.replace("_", " "), *(f"{one[name]:,.4g}" for one in columns.values()))
    table.add_row(f"for {result['texts']:,} texts", *("" for _ in columns), style="bold")
    for name in first["corpus"]:
        table.add_row(name.replace("_", " "), *(with_error(one["corpus"][name]) for one in columns.values()))
    console = Console(highlight=False)
    console.print(table)
    console.print(result["uncertainty"])


def with_error(figure: dict[str, float | None]) -> str:
    """'12,340 ± 560'"""
    value, error = figure["value"], figure["standard_error"]
    assert value is not None
    return format_rate(value) + ("" if error is None else f" ± {format_rate(error)}")
