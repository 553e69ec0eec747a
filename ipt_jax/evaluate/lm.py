"""Runs a model over tasks: which texts it is given, and what comes back.

A continuation follows its prompt after one space, unless white space stands there already: a prompt's trailing spaces
go, and a choice that begins with white space, or a prompt that ends with a newline, gets none. Prompt and
continuation are encoded apart, the continuation as going on (no dummy prefix), so that a choice's tokens do not
depend on its prompt; the tokenizer's BOS, where it has one, stands before the prompt. Generation is greedy, up to a
newline, EOS or `max_new_tokens`. Texts run in batches of like length, the longest first: what does not fit fails at
once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ipt_jax.corpus.progress import Progress
from ipt_jax.corpus.settings import UserError
from ipt_jax.evaluate.tasks import Task, score_answer, score_choices


class Model(Protocol):
    """What evaluation asks of a model; `ipt_jax.load` returns one."""

    tokenizer: Any

    def loglikelihood(self, prompts: list[str], continuations: list[str]) -> Sequence[float]: ...

    def generate(self, prompts: list[str], max_new_tokens: int, temperature: float = 0.0) -> list[str]: ...


def join(prompt: str, continuation: str) -> tuple[str, str]:
    """("Where? ", "Velmoor") gives ("Where?", " Velmoor"): the two as they are encoded."""
    stem = prompt.rstrip(" ")
    spaced = continuation[:1].isspace() or stem[-1:].isspace()
    return stem, continuation if spaced else " " + continuation


def first_line(text: str) -> str:
    """A generated answer, without the space that precedes it: what stands before the first newline."""
    return text.partition("\n")[0].strip()


def run_task(model: Model, task: Task, *, batch_size: int, max_new_tokens: int) -> list[dict[str, Any]]:
    """One row a question, in the file's order: id, prompt, prediction, answer, correct and the metrics."""
    if task.sort == "choices":
        return _run_choices(model, task, batch_size)
    return _run_answers(model, task, batch_size, max_new_tokens)


def _run_choices(model: Model, task: Task, batch_size: int) -> list[dict[str, Any]]:
    requests = [join(question.prompt, choice) for question in task.questions for choice in question.choices]
    sums = [0.0] * len(requests)
    with Progress(len(requests), "choices", task.name) as progress:
        for batch in _batches([prompt + continuation for prompt, continuation in requests], batch_size):
            prompts, continuations = zip(*(requests[i] for i in batch), strict=True)
            for i, total in zip(batch, model.loglikelihood(list(prompts), list(continuations)), strict=True):
                sums[i] = float(total)
            progress.advance(len(batch))
    if not all(math.isfinite(total) for total in sums):
        raise UserError(
            f"task {task.name}: the model gives log-likelihoods that are no numbers; its weights are broken"
        )
    tokens = [len(model.tokenizer.encode(continuation, continuing=True)) for _, continuation in requests]
    return _choice_rows(task, sums, tokens)


def _choice_rows(task: Task, sums: list[float], tokens: list[int]) -> list[dict[str, Any]]:
    rows, start = [], 0
    for question in task.questions:
        stop = start + len(question.choices)
        metrics, pick = score_choices(question, sums[start:stop], tokens[start:stop])
        rows.append(
            {
                "id": question.id,
                "prompt": question.prompt,
                "prediction": question.choices[pick].strip(),
                "answer": question.choices[question.gold].strip(),
                "correct": pick == question.gold,
                **metrics,
                "logprobs": [round(total, 4) for total in sums[start:stop]],
                "tokens": tokens[start:stop],
            }
        )
        start = stop
    return rows


def _run_answers(model: Model, task: Task, batch_size: int, max_new_tokens: int) -> list[dict[str, Any]]:
    prompts = [question.prompt.rstrip(" ") for question in task.questions]
    texts = [""] * len(prompts)
    with Progress(len(prompts), "answers", task.name) as progress:
        for batch in _batches(prompts, batch_size):
            generated = model.generate([prompts[i] for i in batch], max_new_tokens=max_new_tokens, temperature=0.0)
            for i, text in zip(batch, generated, strict=True):
                texts[i] = first_line(text)
            progress.advance(len(batch))
    rows = []
    for question, text in zip(task.questions, texts, strict=True):
        metrics = score_answer(text, question.answers)
        rows.append(
            {
                "id": question.id,
                "prompt": question.prompt,
                "prediction": text,
                "answer": question.answers[0],
                "correct": metrics["exact_match"] == 1.0,
                **metrics,
            }
        )
    return rows


def _batches(texts: Sequence[str], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
