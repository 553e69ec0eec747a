"""Runs a model over tasks: which tokens it is given, and what comes back.

A continuation follows its prompt after one space, unless white space stands there already: a prompt's trailing spaces
go, and a choice that begins with white space, or a prompt that ends with a newline, gets none. Prompt and
continuation are encoded apart, the continuation as going on (no dummy prefix), so that a choice's tokens do not
depend on its prompt; the tokenizer's BOS, where it has one, stands before the prompt. A prompt too long for the
context keeps its BOS and its end, and is counted as truncated. Generation is greedy, up to EOS or `max_new_tokens`,
and its first line counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from ipt_jax.core.errors import UserError
from ipt_jax.core.progress import Progress
from ipt_jax.evaluate.tasks import Task, score_answer, score_choices

Ids = list[int]
Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Model(Protocol):
    """What evaluation asks of a model; `ipt_jax.load` returns one."""

    config: Any  # max_positions
    tokenizer: Any  # bos_id, decode

    def encode(self, text: str, continuing: bool = False) -> Ids: ...

    def loglikelihood(self, prompts: list[Ids], continuations: list[Ids]) -> Sequence[Any]: ...  # logprob, tokens

    def generate(self, prompts: list[Ids], max_new_tokens: int) -> list[Ids]: ...


def join(prompt: str, continuation: str) -> tuple[str, str]:
    """("Where? ", "Velmoor") gives ("Where?", " Velmoor"): the two as they are encoded."""
    stem = prompt.rstrip(" ")
    spaced = continuation[:1].isspace() or stem[-1:].isspace()
    return stem, continuation if spaced else " " + continuation


def first_line(text: str) -> str:
    """A generated answer: what stands before the first newline, without the space that precedes it."""
    return text.partition("\n")[0].strip()


def run_task(model: Model, task: Task, *, batch_size: int, max_new_tokens: int) -> list[dict[str, Any]]:
    """One row a question, in the file's order: id, prompt, prediction, answer, correct, truncated and the metrics."""
    if task.sort == "choices":
        return _run_choices(model, task, batch_size)
    return _run_answers(model, task, batch_size, max_new_tokens)


def _run_choices(model: Model, task: Task, batch_size: int) -> list[dict[str, Any]]:
    requests, cut = [], []
    for question in task.questions:
        for choice in question.choices:
            prompt, continuation = join(question.prompt, choice)
            ids = model.encode(continuation, continuing=True)
            fitted, truncated = _fit(model, prompt, len(ids))
            requests.append((fitted, ids))
            cut.append(truncated)
    scores = _in_batches(
        requests,
        lambda batch: model.loglikelihood([prompt for prompt, _ in batch], [ids for _, ids in batch]),
        size=lambda request: len(request[0]) + len(request[1]),
        progress=Progress(len(requests), "choices", f"eval {task.name}"),
        batch_size=batch_size,
    )
    if not all(math.isfinite(score.logprob) for score in scores):
        raise UserError(
            f"task {task.name}: the model gives log-likelihoods that are no numbers; its weights are broken"
        )
    return _choice_rows(task, scores, cut)


def _choice_rows(task: Task, scores: Sequence[Any], cut: Sequence[bool]) -> list[dict[str, Any]]:
    rows, start = [], 0
    for question in task.questions:
        mine = slice(start, start + len(question.choices))
        start = mine.stop
        sums, tokens = [score.logprob for score in scores[mine]], [score.tokens for score in scores[mine]]
        metrics, pick = score_choices(question, sums, tokens)
        rows.append(
            {
                "id": question.id,
                "prompt": question.prompt,
                "prediction": question.choices[pick].strip(),
                "answer": question.choices[question.gold].strip(),
                "correct": pick == question.gold,
                "truncated": any(cut[mine]),
                **metrics,
                "logprobs": [round(total, 4) for total in sums],
                "tokens": tokens,
            }
        )
    return rows


def _run_answers(model: Model, task: Task, batch_size: int, max_new_tokens: int) -> list[dict[str, Any]]:
    fitted = [_fit(model, question.prompt.rstrip(" "), max_new_tokens) for question in task.questions]
    generated = _in_batches(
        [prompt for prompt, _ in fitted],
        lambda batch: model.generate(batch, max_new_tokens=max_new_tokens),
        size=len,
        progress=Progress(len(fitted), "answers", f"eval {task.name}"),
        batch_size=batch_size,
    )
    rows = []
    for question, (_, truncated), ids in zip(task.questions, fitted, generated, strict=True):
        prediction = first_line(model.tokenizer.decode(ids))
        metrics = score_answer(prediction, question.answers)
        rows.append(
            {
                "id": question.id,
                "prompt": question.prompt,
                "prediction": prediction,
                "answer": question.answers[0],
                "correct": metrics["exact_match"] == 1.0,
                "truncated": truncated,
                **metrics,
            }
        )
    return rows


def _fit(model: Model, prompt: str, more: int) -> tuple[Ids, bool]:
    """The prompt's ids, cut at the left where it and `more` tokens do not fit the context."""
    ids = model.encode(prompt)
    room = model.config.max_positions - more
    if len(ids) <= room:
        return ids, False
    start = 1 if ids[0] == model.tokenizer.bos_id else 0
    if room <= start:
        context = model.config.max_positions
        raise UserError(
            f"eval: {more} tokens of answer leave no room for a prompt in a context of {context}; shorten it"
        )
    return ids[:start] + ids[len(ids) - (room - start) :], True


def _in_batches(
    requests: Sequence[Request],
    run: Callable[[list[Request]], Sequence[Answer]],
    *,
    size: Callable[[Request], int],
    progress: Progress,
    batch_size: int,
) -> list[Answer]:
    """Answers in the requests' order; they run by size, the longest first, so that what does not fit fails at once."""
    order = sorted(range(len(requests)), key=lambda i: -size(requests[i]))
    answers: dict[int, Answer] = {}
    with progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            answers.update(zip(batch, run([requests[i] for i in batch]), strict=True))
            progress.advance(len(batch))
    return [answers[i] for i in range(len(requests))]
