"""Evaluation tasks: JSON Lines files of questions or texts, and how an answer to a question is scored.

A row is `{id, prompt, choices, gold}` (log-likelihood of each choice), `{id, prompt, answer}` (greedy generation;
`answer` is a string or a list of accepted strings) or `{text}` (perplexity; `id` is optional). All rows of a file have
one of the three forms; other fields are ignored. A .txt file is one text. A mistake is a UserError that names the file
and the line.

Scores of choices, from the log-probabilities of their tokens: `acc` picks by their sum; `acc_norm` (the headline) by
the sum per character of the choice and `acc_bytes` per UTF-8 byte, both as lm-evaluation-harness; `acc_token` by the
mean per token (as in the paper's domain benchmarks, LMOps `choice_losses`). White space around a choice does not count.
Scores of a generated answer: `exact_match` (the headline) ignores case, white space and one final full stop; `f1` is
over words, the best of the accepted answers. A standard error is the sample standard deviation over sqrt(n), as in
lm-eval; None for one question.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.text_files import read_jsonl

Sort = Literal["choices", "answer", "text"]
FILE = re.compile(r"\.(jsonl|json|txt)(\.gz|\.zst)?$")
HEADLINE: dict[Sort, str] = {"choices": "acc_norm", "answer": "exact_match", "text": "bits_per_byte"}


@dataclass(frozen=True)
class Question:
    id: str
    prompt: str  # or the text whose perplexity is measured
    choices: tuple[str, ...] = ()
    gold: int = 0  # index into choices
    answers: tuple[str, ...] = ()  # accepted


@dataclass(frozen=True)
class Task:
    name: str
    path: Path
    sort: Sort
    questions: tuple[Question, ...]
    total: int  # questions of the file, of which `questions` may be the first ones

    @property
    def chance(self) -> float | None:
        """The mean score of guessing."""
        if self.sort != "choices":
            return None
        return statistics.fmean(1 / len(question.choices) for question in self.questions)


def read_tasks(specs: Sequence[str], limit: int | None = None) -> tuple[list[Task], list[str]]:
    """Task files, as FILE or NAME=FILE, and the names that are none.

    Each of `specs` is one or several joined by commas. `limit`: questions per file.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: expected at least 1 question; omit it for all questions")
    parts = [part for spec in specs for part in ([spec] if Path(spec).is_file() else spec.split(",")) if part]
    if not parts:
        raise UserError("no tasks given; name a JSON Lines file of questions or a task of lm-evaluation-harness")
    files = [part for part in parts if FILE.search(part)]
    tasks = [_read_task(*_name_and_path(part), limit) for part in files]
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:
            raise UserError(f"tasks: {count} files are named {name!r}; rename one with NAME=FILE")
    return tasks, [part for part in parts if not FILE.search(part)]


def _read_text(path: Path) -> str:
    """A .txt file, which is one text."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"task {path}: no such file; set a text file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task {path}: cannot be read as UTF-8 text ({error}); correct the file") from error
    if not text.strip():
        raise UserError(f"task {path}: has no text; set a file with text")
    return text


def _name_and_path(spec: str) -> tuple[str, Path]:
    name, separator, rest = spec.partition("=")
    if separator and not Path(spec).is_file():
        return name, Path(rest)
    path = Path(spec)
    return FILE.sub("", path.name), path


def _read_task(name: str, path: Path, limit: int | None) -> Task:
    if path.suffix == ".txt":
        return Task(name, path, "text", (Question(path.stem, _read_text(path)),), 1)
    questions: list[Question] = []
    lines: dict[str, int] = {}
    first: Sort | None = None
    for line, row in read_jsonl(path):
        where = f"task {path}: line {line}"
        sort, question = _question(row, where, line)
        if sort != (first or sort):
            raise UserError(f"{where} has {sort!r}, earlier lines have {first!r}; write the two sorts to two files")
        if question.id in lines:
            raise UserError(
                f"{where}: duplicate id {question.id!r}, also on line {lines[question.id]}; make ids unique"
            )
        first, lines[question.id] = sort, line
        questions.append(question)
    if first is None:
        raise UserError(f"task {path}: has no questions; add rows with id, prompt and choices or answer")
    return Task(name, path, first, tuple(questions[:limit]), len(questions))


def _question(row: dict[str, Any], where: str, line: int) -> tuple[Sort, Question]:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: has a lone surrogate, which is not valid text; correct it") from None
    if "text" in row and "prompt" not in row:
        _require(_is_text(row["text"]), f"{where}: text is {row['text']!r}, expected a non-empty text")
        return "text", Question(str(row.get("id", line)), row["text"])
    for field in ("id", "prompt"):
        _require(field in row, f"{where}: no field {field!r}; add text, or id, prompt and choices and gold or answer")
    question_id, prompt = row["id"], row["prompt"]
    plain = isinstance(question_id, str | int) and not isinstance(question_id, bool)
    _require(plain, f"{where}: id is {question_id!r}, expected a string or an integer")
    _require(_is_text(prompt), f"{where}: prompt is {prompt!r}, expected a non-empty text")
    found = "both choices and answer" if "choices" in row else "neither choices nor answer"
    _require(("choices" in row) != ("answer" in row), f"{where} has {found}; set one of them")
    if "answer" in row:
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        accepted = answers and all(isinstance(answer, str) and normalise(answer) for answer in answers)
        _require(accepted, f"{where}: answer is {row['answer']!r}, expected a non-empty text or a list of such texts")
        return "answer", Question(str(question_id), prompt, answers=tuple(answers))
    choices, gold = row["choices"], row.get("gold")
    several = isinstance(choices, list) and len(choices) > 1
    _require(several, f"{where}: choices is {choices!r}, expected a list of at least two texts")
    texts = all(map(_is_text, choices))
    _require(texts, f"{where}: choices has an item that is not a text or is empty; set a text for each")
    _require("gold" in row, f"{where}: choices without gold; add the index of the correct choice, counted from 0")
    index = isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(choices)
    _require(index, f"{where}: gold is {gold!r}, expected an index from 0 to {len(choices) - 1}")
    return "choices", Question(str(question_id), prompt, tuple(choices), gold or 0)


def _require(met: Any, message: str) -> None:
    if not met:
        raise UserError(message)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def normalise(text: str) -> str:
    """`' The  Guild. '` -> `'the guild'`"""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def token_f1(predicted: Iterable[str], expected: Iterable[str]) -> float:
    """Harmonic mean of precision and recall over words, with repeats. 0 if no word is shared."""
    first, second = Counter(predicted), Counter(expected)
    shared = (first & second).total()
    return 2 * shared / (first.total() + second.total()) if shared else 0.0


def answer_f1(prediction: str, answer: str) -> float:
    """Token F1 over runs of letters and digits, case folded."""
    return token_f1(*(re.findall(r"\w+", text.casefold()) for text in (prediction, answer)))


def score_answer(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    exact = any(normalise(prediction) == normalise(answer) for answer in answers)
    return {"exact_match": float(exact), "f1": max(answer_f1(prediction, answer) for answer in answers)}


def score_choices(question: Question, sums: Sequence[float], tokens: Sequence[int]) -> tuple[dict[str, float], int]:
    """The accuracies of one question, and the choice that the headline metric picks."""
    texts = [choice.strip() for choice in question.choices]
    sizes = {
        "acc_norm": [len(text) for text in texts],
        "acc": [1] * len(texts),
        "acc_bytes": [len(text.encode()) for text in texts],
        "acc_token": tokens,
    }
    picks = {name: _likeliest(sums, counts) for name, counts in sizes.items()}
    return {name: float(pick == question.gold) for name, pick in picks.items()}, picks[HEADLINE["choices"]]


def _likeliest(sums: Sequence[float], sizes: Sequence[int]) -> int:
    """The choice of the highest rate; the first of equal ones."""
    rates = [total / size for total, size in zip(sums, sizes, strict=True)]
    return rates.index(max(rates))


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    if len(values) < 2:
        return statistics.fmean(values), None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
