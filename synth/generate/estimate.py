"""`synth run --estimate N`: time, cost and pairs of a full run, estimated from N texts for each of M = 1, 2 and 3.

Guaranteed: nothing is written; the texts are drawn from (seed, id); each M has its own texts if the corpus has enough,
so no M finds another's prompts in the engine's prefix cache. Engine, prompts and parser are those of the run. Figures
for the corpus are ratios of the sample times the number of texts. Their standard errors are over groups: they cover the
draw of the texts, not the speed of another machine.
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
from ipt_jax.corpus.sources import Corpus
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import RunSettings
from synth.engine import open_engine, synthesizer_tokenizer
from synth.engine.base import Engine
from synth.format.wire import pairs_text
from synth.generate.few_shot import Chain, make_chain
from synth.generate.group_store import failed_texts, tally
from synth.generate.scheduler import run_groups
from synth.generate.work_list import Place, Text, read_texts
from synth.groups import Group, group_key, make_group, neighbours, rejection_counts

ROUNDS = (1, 2, 3)
FULL = 4  # groups per place of the engine, below which its filling and emptying distort the speed
SCALED = ("pairs", "tokens", "completion_tokens")  # `tokens`: of texts and accepted pairs, without templates


class Sample(NamedTuple):
    """Texts in corpus order for each M, and the number of texts of the corpus."""

    texts: dict[int, list[Text]]
    corpus_texts: int


class Trial(NamedTuple):
    """The groups of one M: texts per group, answers, and seconds for all."""

    sizes: list[int]
    answers: list[SynthGroup]
    seconds: float


def run_estimate(settings: RunSettings, size: int, price_per_hour: float | None) -> dict[str, Any]:
    """Runs the samples on the real engine and returns what `--json` prints."""
    tokenizer = synthesizer_tokenizer(settings.synthesizer)
    chain = make_chain(settings, tokenizer, {"synthesizer": {"weights": "not needed for an estimate"}})
    sample = draw_sample(settings, size, tokenizer)
    engine = open_engine(settings.synthesizer, tokenizer)
    trials = asyncio.run(run_trials(engine, chain, settings, sample))
    return {
        "texts": sample.corpus_texts,
        "sample_texts": {str(rounds): len(texts) for rounds, texts in sample.texts.items()},
        "engine": settings.synthesizer.engine,
        "gpus": settings.synthesizer.tensor_parallel_size,
        "price_per_hour": price_per_hour,
        "rounds": {
            str(rounds): describe(trial, settings, sample.corpus_texts, tokenizer, price_per_hour)
            for rounds, trial in trials.items()
        },
        "uncertainty": uncertainty(trials, engine.places),
    }


def draw_sample(settings: RunSettings, size: int, tokenizer: Tokenizer) -> Sample:
    """`size` different texts for each M; a third of the corpus each if it has fewer than three times `size`."""
    count = 0
    corpus = Corpus(settings.corpus)

    def counted() -> Iterator[Text]:
        nonlocal count
        with Progress(None, "texts", "synth run: counting texts") as progress:
            for text in read_texts(settings, tokenizer, corpus.units()):
                count += 1
                progress.advance()
                yield text

    def draw(text: Text) -> tuple[float, Place]:
        return uniform(settings.seed, "estimate", text.document.id, text.place.part), text.place

    drawn = heapq.nsmallest(len(ROUNDS) * size, counted(), key=draw)
    if len(drawn) < (least := len(ROUNDS) * max(ROUNDS)):
        raise UserError(
            f"--estimate {size}: corpus {corpus.name} has {count} texts to convert, expected {least}, a group "
            "of three for each M; run without --estimate"
        )
    parts = {
        rounds: sorted(drawn[first :: len(ROUNDS)], key=lambda text: text.place) for first, rounds in enumerate(ROUNDS)
    }
    return Sample(parts, count)


async def run_trials(engine: Engine, chain: Chain, settings: RunSettings, sample: Sample) -> dict[int, Trial]:
    """Runs one trial after the other on one engine, after a warm-up group that is not counted."""
    trials = {}
    words = sample.texts[1][0].document.text.split()
    warm_up = make_group(0, [Document("warm up", "", "raw", [Segment(" ".join(reversed(words)))])])
    try:
        with Progress(sum(map(len, sample.texts.values())), "texts", "synth run: estimate") as progress:
            await run_groups(engine, chain, iter([warm_up]), lambda *_: None)
            for rounds, texts in sample.texts.items():
                together = neighbours(texts, rounds, lambda text: group_key(text.document, settings.grouping))
                trial = Trial([], [], 0.0)

                def put(group: Group, answer: SynthGroup, trial: Trial = trial) -> None:
                    trial.sizes.append(len(group.texts))
                    trial.answers.append(answer)
                    progress.advance(len(group.texts))

                groups = [
                    make_group(number, [text.document for text in group], [text.span for text in group])
                    for number, group in enumerate(together)
                ]
                started = time.monotonic()
                await run_groups(engine, chain, iter(groups), put)
                trials[rounds] = trial._replace(seconds=time.monotonic() - started)
    finally:
        await engine.close()
    return trials


def describe(
    trial: Trial, settings: RunSettings, corpus_texts: int, tokenizer: Tokenizer, price: float | None
) -> dict[str, Any]:
    """The figures of one M: of its sample, and for the corpus with standard errors (None for a single group)."""
    rows = [measure(answer, tokenizer) for answer in trial.answers]
    texts = sum(trial.sizes)
    total = {name: sum(row[name] for row in rows) for name in rows[0]}

    def scaled(value: float, spread_of: str) -> dict[str, float | None]:
        error = relative_error([row[spread_of] for row in rows], trial.sizes)
        return {
            "value": float(f"{value:.4g}"),
            "standard_error": None if error is None else float(f"{value * error:.4g}"),
        }

    hours = trial.seconds / 3600 / texts * corpus_texts * settings.synthesizer.tensor_parallel_size
    # An engine's time follows the tokens that it writes.
    corpus = {"gpu_hours": scaled(hours, "completion_tokens")}
    if price is not None:
        corpus["dollars"] = scaled(hours * price, "completion_tokens")
    corpus |= {name: scaled(total[name] / texts * corpus_texts, name) for name in SCALED}
    return {
        "groups": len(rows),
        "seconds": round(trial.seconds, 3),
        "tokens_per_second": round(total["completion_tokens"] / trial.seconds, 1),
        "cache_hit_rate": ratio(total["cached_prompt_tokens"], total["prompt_tokens"]),
        "pairs_per_text": ratio(total["pairs"], texts),
        "well_formed": ratio(total["pairs"], total["written"]),
        "failed_texts": total["failed"],
        "corpus": corpus,
    }


def measure(answer: SynthGroup, tokenizer: Tokenizer) -> dict[str, int]:
    """The figures of one group."""
    counts = tally(answer)
    accepted = [pairs_text(text.accepted_pairs) for text in answer.texts]
    ids = tokenizer.encode_batch([text.text for text in answer.texts] + accepted)
    names = ("prompt_tokens", "cached_prompt_tokens", "completion_tokens", "pairs")
    return {
        **{name: counts[name] for name in names},
        "written": counts["pairs"] + rejection_counts(counts).total(),
        "tokens": sum(map(len, ids)),
        "failed": sum(failed_texts(counts).values()),
    }


def relative_error(values: Sequence[float], sizes: Sequence[int]) -> float | None:
    """The relative standard error of the ratio sum(values) / sum(sizes) over groups drawn alike."""
    total, count = sum(values), len(values)
    if count < 2 or not total:
        return None
    mean = total / sum(sizes)
    squares = sum((value - mean * size) ** 2 for value, size in zip(values, sizes, strict=True))
    return sqrt(count / (count - 1) * squares) / total


def ratio(part: float, total: float) -> float:
    return round(part / total, 4) if total else 0.0


def uncertainty(trials: dict[int, Trial], places: int) -> str:
    """What the figures cover, in a sentence or two. The engine answers `places` requests at once."""
    fewest = min(len(trial.sizes) for trial in trials.values())
    words = (
        f"± is one standard error over the groups of the sample ({fewest} or more for each M): it covers which texts "
        "were drawn, and neither another machine nor other work on this one."
    )
    if fewest < FULL * places:
        words += (
            f" The engine takes {places} groups at once, and {fewest} fill it only for a part of the time: a full run "
            f"is faster and GPU-hours are an upper bound; --estimate {FULL * places * max(ROUNDS)} is more precise."
        )
    return words


def show_estimate(result: dict[str, Any]) -> None:
    """Prints the figures as a table with one column for each M."""

    def with_error(figure: dict[str, float]) -> str:
        error = figure["standard_error"]
        return format_rate(figure["value"]) + ("" if error is None else f" ± {format_rate(error)}")

    columns = result["rounds"].values()
    table = Table("", *(f"M = {rounds}" for rounds in result["rounds"]), box=None, pad_edge=False)
    first = next(iter(columns))
    for name in (name for name in first if name != "corpus"):
        table.add_row(name.replace("_", " "), *(f"{one[name]:,.4g}" for one in columns))
    table.add_row(f"for {result['texts']:,} texts", style="bold")
    for name in first["corpus"]:
        table.add_row(name.replace("_", " "), *(with_error(one["corpus"][name]) for one in columns))
    console = Console(highlight=False)
    console.print(table)
    console.print(result["uncertainty"])
