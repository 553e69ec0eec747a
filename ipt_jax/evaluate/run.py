"""`ipt eval`: scores a model on task files, with standard errors.

A continuation follows its prompt after one space: trailing spaces of the prompt are removed, and no space is added if
the choice begins with white space or the prompt ends with a newline. Prompt and continuation are encoded separately,
the continuation without a space of the tokenizer's own, so that the tokens of a choice do not depend on its prompt. BOS
precedes the prompt if the tokenizer has one. A prompt too long for the context keeps its BOS and its end and is counted
as truncated. Generation is greedy, up to EOS or `max_new_tokens`, and its first line is the answer. A text is scored in
windows of the context (evaluate.perplexity).

Task files are checked before the model is loaded. `--output FILE.json` is the summary; FILE.rows.jsonl beside it has
one line per question (prediction, answer, every metric), which `ipt compare` reads. Both are written atomically.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import write_whole, writing
from ipt_jax.core.progress import Progress
from ipt_jax.evaluate.perplexity import first_id, summarize, text_row, windows
from ipt_jax.evaluate.tasks import HEADLINE, Question, Task, mean_and_stderr, read_tasks, score_answer, score_choices

Ids = list[int]
Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Model(Protocol):
    """What evaluation needs of a model. `ipt_jax.load` returns one."""

    config: Any  # max_positions
    tokenizer: Any  # bos_id, eos_id, decode

    def encode(self, text: str, continuing: bool = False) -> Ids: ...

    def loglikelihood(self, prompts: list[Ids], continuations: list[Ids]) -> Sequence[Any]: ...  # logprob, tokens

    def generate(self, prompts: list[Ids], max_new_tokens: int) -> list[Ids]: ...


def run_eval(
    model: str,
    tasks: Sequence[str],
    *,
    output: Path | str | None = None,
    limit: int | None = None,
    batch_size: int = 128,
    max_new_tokens: int = 64,
    dtype: str = "float32",
) -> dict[str, Any]:
    """`model` is what `ipt_jax.load` takes. A task is FILE.jsonl or NAME=FILE.jsonl, or several joined by commas."""
    found = read_tasks(tasks, limit)
    if output is not None and Path(output).is_dir():
        raise UserError(f"eval output {output}: is a directory; set the path of a file, such as {output}/eval.json")
    from ipt_jax import load  # after the checks: importing jax takes seconds

    loaded: Model = load(model, dtype=dtype)
    rows: dict[str, list[dict[str, Any]]] = {}
    for task in found:
        if task.sort == "choices":
            rows[task.name] = _run_choices(loaded, task, batch_size)
        elif task.sort == "text":
            rows[task.name] = _run_texts(loaded, task, batch_size)
        else:
            rows[task.name] = _run_answers(loaded, task, batch_size, max_new_tokens)
    result = {"model": str(model), "tasks": {task.name: _summary(task, rows[task.name]) for task in found}}
    if output is not None:
        output = Path(output)
        lines = [json.dumps({"task": name, **row}, ensure_ascii=False) for name in rows for row in rows[name]]
        with writing(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            write_whole(output.with_suffix(".rows.jsonl"), "".join(line + "\n" for line in lines).encode())
            write_whole(output, json.dumps(result, ensure_ascii=False, indent=1).encode())
    return result


def _summary(task: Task, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The headline metric first, every metric under `metrics`."""
    if task.sort == "text":
        return summarize(rows)
    names = ("acc_norm", "acc", "acc_token") if task.sort == "choices" else ("exact_match", "f1")
    scored = {name: mean_and_stderr([row[name] for row in rows]) for name in names}
    metrics = {name: {"value": value, "stderr": stderr} for name, (value, stderr) in scored.items()}
    return {
        "metric": HEADLINE[task.sort],
        **metrics[HEADLINE[task.sort]],
        "n": len(rows),
        "chance": task.chance,
        "truncated": sum(row["truncated"] for row in rows),
        "metrics": metrics,
    }


def _run_choices(model: Model, task: Task, batch_size: int) -> list[dict[str, Any]]:
    """One row per question, in the order of the file."""
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
    _check_finite(task, scores)
    rows, start = [], 0
    for question in task.questions:
        mine = slice(start, start + len(question.choices))
        start = mine.stop
        sums, tokens = [score.logprob for score in scores[mine]], [score.tokens for score in scores[mine]]
        metrics, pick = score_choices(question, sums, tokens)
        choices = [choice.strip() for choice in question.choices]
        row = _row(question, choices[pick], choices[question.gold], pick == question.gold, any(cut[mine]), metrics)
        rows.append(row | {"logprobs": [round(total, 4) for total in sums], "tokens": tokens})
    return rows


def _run_texts(model: Model, task: Task, batch_size: int) -> list[dict[str, Any]]:
    """One row per text, in the order of the file."""
    first, skipped = first_id(model.tokenizer), 0 if model.tokenizer.bos_id is None else 1
    texts = [model.encode(question.prompt)[skipped:] for question in task.questions]
    cut = [list(windows(ids, first, model.config.max_positions)) for ids in texts]
    requests = [window for of_text in cut for window in of_text]
    scores = _in_batches(
        requests,
        lambda batch: model.loglikelihood([prompt for prompt, _ in batch], [ids for _, ids in batch]),
        size=lambda request: len(request[0]) + len(request[1]),
        progress=Progress(len(requests), "windows", f"eval {task.name}"),
        batch_size=batch_size,
    )
    _check_finite(task, scores)
    rows, start = [], 0
    for question, ids, of_text in zip(task.questions, texts, cut, strict=True):
        logprobs = [score.logprob for score in scores[start : start + len(of_text)]]
        rows.append({"id": question.id, **text_row(question.prompt, logprobs, len(ids))})
        start += len(of_text)
    return rows


def _check_finite(task: Task, scores: Sequence[Any]) -> None:
    if not all(math.isfinite(score.logprob) for score in scores):
        raise UserError(
            f"task {task.name}: the model returns log-likelihoods that are not numbers; its weights are damaged"
        )


def _run_answers(model: Model, task: Task, batch_size: int, max_new_tokens: int) -> list[dict[str, Any]]:
    """One row per question, in the order of the file."""
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
        correct = metrics["exact_match"] == 1.0
        rows.append(_row(question, prediction, question.answers[0], correct, truncated, metrics))
    return rows


def _row(
    question: Question, prediction: str, answer: str, correct: bool, truncated: bool, metrics: dict[str, float]
) -> dict[str, Any]:
    return {
        "id": question.id,
        "prompt": question.prompt,
        "prediction": prediction,
        "answer": answer,
        "correct": correct,
        "truncated": truncated,
        **metrics,
    }


def join(prompt: str, continuation: str) -> tuple[str, str]:
    """("Where? ", "Velmoor") -> ("Where?", " Velmoor"): the two as they are encoded."""
    stem = prompt.rstrip(" ")
    spaced = continuation[:1].isspace() or stem[-1:].isspace()
    return stem, continuation if spaced else " " + continuation


def first_line(text: str) -> str:
    """A generated answer: the text before the first newline, without leading space."""
    return text.partition("\n")[0].strip()


def _fit(model: Model, prompt: str, more: int) -> tuple[Ids, bool]:
    """The ids of the prompt, and whether they were cut at the left to fit the context with `more` tokens."""
    ids = model.encode(prompt)
    room = model.config.max_positions - more
    if len(ids) <= room:
        return ids, False
    start = 1 if ids[0] == model.tokenizer.bos_id else 0
    if room <= start:
        context = model.config.max_positions
        raise UserError(
            f"eval: {more} tokens of answer leave no room for a prompt in a context of {context}; shorten the answer"
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
    """Answers in the order of the requests. The longest requests run first, so that a lack of memory shows at once."""
    order = sorted(range(len(requests)), key=lambda i: -size(requests[i]))
    answers: dict[int, Answer] = {}
    with progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            answers.update(zip(batch, run([requests[i] for i in batch]), strict=True))
            progress.advance(len(batch))
    return [answers[i] for i in range(len(requests))]
