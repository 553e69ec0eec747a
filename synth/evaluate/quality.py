"""What `synth eval` measures: answers, pairs, diversity and helpfulness, with bootstrap intervals over texts; the
figures of data sets; and how these are shown, in the terminal and as a page.

A measure is a ratio of two sums over texts, such as the F1 of all answers over their number. The sums of each text are
stored as (numerator, denominator), so that resampling texts is one product of matrices. Words are those of
`synth.text.words`, case folded; answers are compared without English articles, as SQuAD does.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment

from ipt_jax.core.hashing import digest
from ipt_jax.core.html import render_page
from ipt_jax.core.seeding import draw
from ipt_jax.core.svg import Bar, score_bars
from ipt_jax.corpus.records import GroupText, Pair, SynthGroup
from ipt_jax.corpus.tokenizer import Tokenizer
from ipt_jax.evaluate.tasks import token_f1
from synth.collect.data_sets import Example
from synth.config import SynthesizerSettings
from synth.engine.base import Engine, RequestFailed, with_retries
from synth.format.parser import question_key
from synth.format.prompt import start_ids
from synth.format.wire import final_answer, question_stem
from synth.inspect.statistics import first_word
from synth.text.words import plain_word, words
from synth.verify.text_scores import PreparedText, Unscored, grounded
from synth.verify.verifier import ARTICLES

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles
FIRST_WORDS = 10  # that are listed
LOSSES = ("none", "other", "own")  # pairs in the helper's prompt: no pairs, those of another text, those of the text
SHOWN_TEXTS = 5  # of each data set, on the page
# The tables, and per column the measure, its heading, and whether it is a share.
TABLES: dict[str, list[tuple[str, str, bool]]] = {
    "Answers": [("f1", "F1", True), ("exact_match", "exact match", True)],
    "Pairs": [
        ("well_formed", "well-formed", True),
        ("pairs_per_text", "pairs per text", False),
        ("grounded", "grounded", True),
        ("pair_f1", "F1 to gold", True),
        ("rouge_l", "ROUGE-L to gold", True),
    ],
    "Loss of the helper on gold answers, nats per token": [
        ("loss_none", "no pairs", False),
        ("loss_other", "other pairs", False),
        ("loss_own", "own pairs", False),
        ("gain_over_none", "gain over none", False),
        ("gain_over_other", "gain over other", False),
    ],
}
NOTES = {
    "Answers": "The synthesizer is given text and gold question. F1 is over words without articles.",
    "Pairs": "Well-formed: share of all pairs written. Grounded: mean share of an answer's content words that the text "
    "contains. F1 and ROUGE-L: questions are matched one to one, unmatched pairs on either side count as 0.",
    "Loss of the helper on gold answers, nats per token": "The helper reads text, pairs, gold question. The gains are "
    "differences of losses on the same answers.",
}
ANSWERS, LOSS, FAILED = "answers", "losses", "failed"  # in a group's metadata: by text id, and by reason
TextKey = tuple[str, str]  # data set, text id
Sums = dict[str, tuple[float, float]]  # measure -> (numerator, denominator)
Floats = np.ndarray[Any, np.dtype[np.float64]]


class AnswerLoss(NamedTuple):
    """The helper's negative log-likelihood (nats) of a gold answer under each of LOSSES, and the answer's tokens."""

    none: float
    other: float
    own: float
    tokens: int


# ---- one text


def answer_words(text: str) -> list[str]:
    """'The old Mill.' -> ['old', 'mill']. An answer without such words is compared as it is."""
    found = [plain_word(word) for word in words(text)]
    return [word for word in found if word not in ARTICLES] or found or [text.strip()]


def answer_sums(predicted: Sequence[str], gold: Sequence[Pair]) -> Sums:
    """Token F1 and exact match of one predicted answer per gold pair."""
    both = [(answer_words(one), answer_words(final_answer(pair))) for one, pair in zip(predicted, gold, strict=True)]
    exact = sum(one == other for one, other in both)
    return {"f1": (sum(token_f1(*one) for one in both), len(both)), "exact_match": (exact, len(both))}


def pair_sums(text: GroupText, gold: Sequence[Pair]) -> Sums:
    """Form, number and grounding of a text's pairs, and their likeness to the gold pairs.

    Pairs are matched to gold pairs one to one, so that the F1 of their questions is highest in sum. `s` is the F1 of
    question and answer of a matched pair. Precision is the sum of s over the pairs, recall the same sum over the gold
    pairs, `pair_f1` their harmonic mean. `rouge_l` is that with ROUGE-L in place of token F1.
    """
    pairs = text.accepted_pairs
    matched = match_pairs(pairs, gold)
    likeness = sum(token_f1(pair_words(pairs[i]), pair_words(gold[j])) for i, j in matched)
    common = sum(rouge_l(pair_words(pairs[i]), pair_words(gold[j])) for i, j in matched)
    scores = list(grounding(text))
    return {
        "well_formed": (len(pairs), len(text.pairs)),
        "pairs_per_text": (len(pairs), 1),
        "grounded": (sum(scores), len(scores)),
        "pair_f1": (2 * likeness, len(pairs) + len(gold)),
        "pair_precision": (likeness, len(pairs)),
        "pair_recall": (likeness, len(gold)),
        "rouge_l": (2 * common, len(pairs) + len(gold)),
    }


def grounding(text: GroupText) -> Iterable[float]:
    """The score `grounded` of `synth verify`, of each accepted pair that can be judged."""
    prepared = PreparedText(text.text)
    for pair in text.accepted_pairs:
        try:
            yield grounded(prepared, pair)
        except Unscored:
            continue


def pair_words(pair: Pair) -> list[str]:
    """The words of question and final answer, without options and reasoning."""
    return [plain_word(word) for word in words(f"{question_stem(pair)} {final_answer(pair)}")]


def match_pairs(pairs: Sequence[Pair], gold: Sequence[Pair]) -> list[tuple[int, int]]:
    """The assignment of pairs to gold pairs with the highest sum of question F1; ties go to likelier answers."""
    if not pairs or not gold:
        return []
    asked, answered = (
        [[token_f1(read(one), read(other)) for other in gold] for one in pairs] for read in (question_words, pair_words)
    )
    rows, columns = linear_sum_assignment(np.array(asked) + 1e-6 * np.array(answered), maximize=True)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def question_words(pair: Pair) -> list[str]:
    return [plain_word(word) for word in words(question_stem(pair))]


def rouge_l(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """F-measure of the longest common subsequence: 2 · LCS / (both lengths). Equal to the package rouge-score.

    That package splits words as English only and needs NLTK, so it is used in the tests alone.
    """
    longest = [0] * (len(expected) + 1)
    for word in predicted:
        before = longest
        longest = [0]
        for place, other in enumerate(expected):
            longest.append(before[place] + 1 if word == other else max(before[place + 1], longest[-1]))
    return 2 * longest[-1] / (len(predicted) + len(expected)) if longest[-1] else 0.0


def loss_sums(losses: Iterable[AnswerLoss]) -> Sums:
    """Nats per token of the gold answers under each prompt, and what the text's own pairs gain over the others."""
    rows = list(losses)
    tokens = sum(row.tokens for row in rows)
    none, other, own = (sum(getattr(row, name) for row in rows) for name in LOSSES)
    sums = {"loss_none": none, "loss_other": other, "loss_own": own}
    sums |= {"gain_over_none": none - own, "gain_over_other": other - own}
    return {name: (value, tokens) for name, value in sums.items()}


# ---- all texts


@dataclass(frozen=True)
class Estimates:
    """Measures of a data set: values, and their bootstrap replicates. Means over data sets have the same form."""

    values: dict[str, float | None]
    replicates: dict[str, Floats]

    def rounded(self) -> dict[str, Any]:
        """The values, and `intervals`: the 2.5th and 97.5th percentile of the replicates, null for a single text."""
        intervals = {}
        for name, found in self.replicates.items():
            finite = found[np.isfinite(found)]
            ends = np.percentile(finite, INTERVAL).tolist() if len(finite) else None
            intervals[name] = ends and [round(end, 4) for end in ends]
        values = {name: None if value is None else round(value, 4) for name, value in self.values.items()}
        return {**values, "intervals": {name: intervals.get(name) for name in values}}


def estimate(texts: Sequence[Sums], seed: int, name: str) -> Estimates:
    """The ratio of sums of each measure, and its value in RESAMPLES resamples of the texts, drawn from (seed, name)."""
    rng = np.random.default_rng(draw(seed, "bootstrap", name).getrandbits(128))
    count = len(texts)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)
    values: dict[str, float | None] = {}
    replicates: dict[str, Floats] = {}
    for measure in dict.fromkeys(name for sums in texts for name in sums):
        sums = np.array([one.get(measure, (0.0, 0.0)) for one in texts], np.float64)
        top, bottom = sums.sum(0)
        values[measure] = float(top / bottom) if bottom else None
        if count > 1:
            above, below = weights @ sums[:, 0], weights @ sums[:, 1]
            replicates[measure] = np.divide(above, below, out=np.full(RESAMPLES, np.nan), where=below > 0)
    return Estimates(values, replicates)


def mean_estimate(sets: Sequence[Estimates]) -> Estimates:
    """The mean over data sets of each measure that all of them have."""
    names = [name for name in sets[0].values if all(one.values.get(name) is not None for one in sets)]
    values: dict[str, float | None] = {name: sum(one.values[name] or 0.0 for one in sets) / len(sets) for name in names}
    drawn = [name for name in names if all(name in one.replicates for one in sets)]
    return Estimates(values, {name: np.mean([one.replicates[name] for one in sets], axis=0) for name in drawn})


def diversity(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Distinct n-grams over all n-grams of the questions, repeated questions, formats and first words.

    Distinct n-grams fall with the number of pairs: compare sets of similar size.
    """
    questions = [question_words(pair) for pair in pairs]
    grams: Mapping[str, list[tuple[str, ...]]] = {
        "distinct_1": [(word,) for question in questions for word in question],
        "distinct_2": [gram for question in questions for gram in pairwise(question)],
        "distinct_3": [gram for one in questions for gram in zip(one, one[1:], one[2:], strict=False)],
    }
    opened = Counter(first_word(question_stem(pair)) for pair in pairs)
    count = len(pairs)
    return {
        **{name: round(len(set(found)) / len(found), 4) if found else None for name, found in grams.items()},
        "repeated_questions": round(1 - len(set(map(question_key, pairs))) / count, 4) if count else None,
        "formats": dict(Counter(pair.format for pair in pairs).most_common()),
        "first_words": dict(opened.most_common(FIRST_WORDS)),
    }


# ---- the helper


@dataclass(frozen=True)
class Helper:
    """Another model, whose loss on gold answers is measured with three prompts.

    Prompts are plain text, which any model reads: the text, then no pairs, the pairs of another text, or the text's
    own, then the gold question. `others` are the pairs of the other text.
    """

    synthesizer: SynthesizerSettings
    tokenizer: Tokenizer
    gold: dict[TextKey, list[Pair]]
    others: dict[TextKey, list[Pair]]

    async def run(self, engine: Engine, group: SynthGroup) -> SynthGroup:
        failed: Counter[str] = Counter()
        losses: dict[str, list[AnswerLoss | None]] = {}
        for text in group.texts:
            if (text.source, text.raw_id) in self.others:
                losses[text.raw_id] = await self.read_text(engine, group.id, text, failed)
        return msgspec.structs.replace(group, meta=group.meta | {LOSS: losses, FAILED: dict(failed)})

    async def read_text(
        self, engine: Engine, group_id: str, text: GroupText, failed: Counter[str]
    ) -> list[AnswerLoss | None]:
        key = (text.source, text.raw_id)
        shown = {"none": [], "other": self.others[key], "own": text.accepted_pairs}
        opened = [helper_prompt(text.text, shown[name]) for name in LOSSES]
        places = range(len(self.gold[key]))
        id = f"{group_id}/{digest(text.raw_id)[:8]}"
        found = await asyncio.gather(
            *(self.read_answer(engine, opened, self.gold[key][place], f"{id}/{place}", failed) for place in places)
        )
        return list(found)

    async def read_answer(
        self, engine: Engine, opened: Sequence[str], pair: Pair, id: str, failed: Counter[str]
    ) -> AnswerLoss | None:
        """The losses of one gold answer. None if a prompt is too long for the helper, or a request failed."""
        start = start_ids(self.tokenizer)
        asked = f"Question: {pair.question}\nAnswer:"
        prompts = [start + self.tokenizer.encode(before + asked) for before in opened]
        answer = self.tokenizer.encode(f" {pair.answer}", continuing=True)
        if max(map(len, prompts)) + len(answer) >= self.synthesizer.max_model_len:
            return None
        try:
            scores = await asyncio.gather(
                *(
                    self.score(engine, prompt, answer, f"{id}/{name}")
                    for prompt, name in zip(prompts, LOSSES, strict=True)
                )
            )
        except RequestFailed as failure:
            failed[failure.reason] += 1
            return None
        none, other, own = (-score for score in scores)
        return AnswerLoss(none, other, own, len(answer))

    async def score(self, engine: Engine, prompt: list[int], answer: list[int], id: str) -> float:
        return await with_retries(lambda attempt: engine.score(prompt, answer, request_id=f"{id}/{attempt}"))


def helper_prompt(text: str, pairs: Sequence[Pair]) -> str:
    """The text and pairs as plain questions and answers, up to the next question."""
    shown = [f"Question: {pair.question}\nAnswer: {pair.answer}" for pair in pairs]
    return "".join(f"{part}\n\n" for part in [text, *shown])


# ---- data sets


class EvalTask(NamedTuple):
    """A data set, the texts to score in file order, and the number of others by reason."""

    name: str
    seen: bool
    examples: list[Example]
    dropped: Counter[str]


class ScoredText(NamedTuple):
    """A text with its pairs, its gold pairs and what models said about these. None: not asked."""

    text: GroupText
    gold: list[Pair]
    answers: list[str] | None
    losses: list[AnswerLoss | None] | None

    @property
    def written(self) -> list[tuple[Pair, None]]:
        return [(pair, None) for pair in self.text.pairs]

    @property
    def asked(self) -> list[tuple[Pair, str | None]]:
        """Gold pairs with the synthesizer's answers, None if it was not asked."""
        return list(zip(self.gold, self.answers or (None for _ in self.gold), strict=True))

    @property
    def sums(self) -> Sums:
        sums = pair_sums(self.text, self.gold)
        if self.answers is not None:
            sums |= answer_sums(self.answers, self.gold)
        if known := [one for one in self.losses or () if one is not None]:
            sums |= loss_sums(known)
        return sums


def scored_texts(groups: Iterable[SynthGroup], gold: Mapping[TextKey, list[Pair]]) -> Iterator[ScoredText]:
    for group in groups:
        answers, losses = (group.meta.get(name, {}) for name in (ANSWERS, LOSS))
        for text in group.texts:
            found = losses.get(text.raw_id)
            read = None if found is None else [None if one is None else AnswerLoss(*one) for one in found]
            yield ScoredText(text, gold[text.source, text.raw_id], answers.get(text.raw_id), read)


# ---- figures


def score_sets(tasks: Sequence[EvalTask], texts: Sequence[ScoredText], seed: int) -> dict[str, Any]:
    """The figures of each data set, and the means over the seen and over the unseen ones."""
    sets: dict[str, dict[str, Any]] = {}
    estimates: dict[str, Estimates] = {}
    for task in tasks:
        own = [one for one in texts if one.text.source == task.name]
        if own:
            estimates[task.name] = estimate([one.sums for one in own], seed, task.name)
        measured = estimates[task.name].rounded() if own else {"intervals": {}}
        sets[task.name] = {"seen": task.seen, **counts(task, own), **complete(measured)}
    kinds = {
        kind: [estimates[task.name] for task in tasks if task.seen == seen and task.name in estimates]
        for kind, seen in (("seen", True), ("unseen", False))
    }
    return {
        "sets": sets,
        **{kind: complete(mean_estimate(own).rounded()) if own else None for kind, own in kinds.items()},
    }


def complete(measured: dict[str, Any]) -> dict[str, Any]:
    """All measures of the tables; those that were not measured are null."""
    return dict.fromkeys(name for columns in TABLES.values() for name, *_ in columns) | measured


def counts(task: EvalTask, texts: Sequence[ScoredText]) -> dict[str, Any]:
    pairs = [pair for one in texts for pair in one.text.accepted_pairs]
    losses = [loss for one in texts for loss in one.losses or ()]
    dropped = Counter({name: count for name, count in task.dropped.items() if not name.startswith("ignored_field_")})
    dropped += Counter(not_scored=len(task.examples) - len(texts), loss_too_long=losses.count(None))
    rejected = Counter(pair.rejection for one in texts for pair in one.text.pairs if pair.rejection)
    return {
        "texts": len(texts),
        "questions": sum(len(one.gold) for one in texts),
        "pairs": len(pairs),
        "rejected": dict(rejected.most_common()),
        "dropped": dict(+dropped),
        "diversity": diversity(pairs),
    }


# ---- shown


def shown_tables(results: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, headings, rows) of each table with a figure: a row per data set, then the means over several sets."""
    named = dict(results["sets"])
    for kind in ("seen", "unseen"):
        if sum(one["seen"] == (kind == "seen") for one in results["sets"].values()) > 1:
            named[f"mean of {kind}"] = results[kind]
    for title, columns in TABLES.items():
        rows = [[name, *(cell(found, *column) for column in columns)] for name, found in named.items()]
        if any(found[columns[0][0]] is not None for found in named.values()):
            yield title, ["data set", *(heading for _, heading, _ in columns)], rows
    heading = ["data set", "texts", "questions", "pairs", "distinct 1-, 2-, 3-grams", "repeated questions"]
    yield "Size and diversity", heading, [[name, *size_cells(found)] for name, found in results["sets"].items()]
    kinds = [[name, *kind_cells(found["diversity"])] for name, found in results["sets"].items()]
    yield "Formats, and first words of questions", ["data set", "formats", "first words"], kinds


def cell(found: Mapping[str, Any], measure: str, _: str, share: bool) -> str:
    """'48.1% [45.0, 51.2]', '2.31 [2.2, 2.4]', or '–' for what was not measured."""
    value, interval = found[measure], found["intervals"].get(measure)
    if value is None:
        return "–"
    form = "{:.1f}" if share else "{:.3f}" if "loss" in measure or "gain" in measure else "{:.2f}"
    ends = [value, *(interval or ())]
    value, *ends = [form.format(100 * one if share else one) for one in ends]
    return f"{value}{'%' * share}" + (f" [{ends[0]}, {ends[1]}]" if ends else "")


def size_cells(found: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{found[name]:,}" for name in ("texts", "questions", "pairs"))
    distinct = [found["diversity"][f"distinct_{size}"] for size in (1, 2, 3)]
    yield " ".join("–" if one is None else f"{one:.2f}" for one in distinct)
    repeated = found["diversity"]["repeated_questions"]
    yield "–" if repeated is None else f"{100 * repeated:.1f}%"


def kind_cells(known: Mapping[str, Any]) -> Iterator[str]:
    for kind in ("formats", "first_words"):
        yield ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in known[kind].items()) or "–"


def show_results(results: Mapping[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(f"{results['synthesizer']}, few-shot {results['few_shot']}; 95% intervals by bootstrap over texts")
    for title, headings, rows in shown_tables(results):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*(entry.replace(" [", "\n[") for entry in row))
        console.print(table, "")
    console.print(f"page: {Path(results['output']) / 'report.html'}")


def results_page(results: Mapping[str, Any], texts: Sequence[ScoredText]) -> str:
    charts = []
    for measure, heading, is_share in (column for columns in TABLES.values() for column in columns):
        if is_share and (bars := measure_bars(results, measure)):
            charts.append((heading[0].upper() + heading[1:], score_bars(heading, bars, chance=None)))
    examples = {
        name: list(islice((one for one in texts if one.text.source == name), SHOWN_TEXTS)) for name in results["sets"]
    }
    return render_page(
        Path(__file__).with_name("evaluation.html.j2"),
        title="Evaluation of a synthesizer",
        results=results,
        tables=[(title, NOTES.get(title, ""), headings, rows) for title, headings, rows in shown_tables(results)],
        charts=charts,
        examples=examples,
    )


def measure_bars(results: Mapping[str, Any], measure: str) -> list[Bar]:
    """One bar per data set that has the measure. The whisker is a standard error: a fourth of the interval."""
    bars = []
    for place, (name, found) in enumerate(results["sets"].items()):
        if found[measure] is not None:
            interval = found["intervals"].get(measure)
            error = (interval[1] - interval[0]) / 4 if interval else None
            bars.append(Bar(name, place % 8, found[measure], error, found["texts"]))
    return bars
