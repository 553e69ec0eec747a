"""`ipt eval`: scores a model on tasks of lm-evaluation-harness and on task files, with standard errors.

Tasks and options are checked, data sets included, before the model is loaded. The results file has the shape of the
harness's (`results`, `configs`, `versions`, `n-shot`, `higher_is_better`, `n-samples`), for task files too, and besides
`tasks` with one headline metric per task. FILE.rows.jsonl beside it has one line per question with every metric, which
`ipt compare` and `ipt report` read. Both are written atomically by process 0.

How a task file is scored: a continuation follows its prompt after one space; trailing spaces of the prompt are removed,
and no space is added if the choice begins with white space or the prompt ends with a newline. Generation is greedy, up
to a newline, EOS or `max_new_tokens`. Texts are scored by the harness's rolling log-likelihood. `HarnessLM` says how
text is converted to tokens.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipt_jax.core.checkpoint_digests import DIGESTS
from ipt_jax.core.checkpoint_path import ModelSource, resolve_checkpoint
from ipt_jax.core.errors import UserError
from ipt_jax.core.files import write_whole, writing
from ipt_jax.core.hashing import digest, file_digest
from ipt_jax.evaluate import lm_eval_
from ipt_jax.evaluate.tasks import Question, Task, mean_and_stderr, read_tasks, score_answer, score_choices

BACKENDS = ("jax", "hf", "vllm")
BATCH_TOKENS = {"cpu": 4096}  # by platform
LOWER_IS_BETTER = ("bits_per_byte", "byte_perplexity", "word_perplexity", "token_perplexity")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class TaskSet:
    """Tasks that are ready to run: task files, and tasks of the harness with their data sets."""

    files: list[Task]
    named: Any  # the harness's TaskDict; None without such tasks
    limit: int | None
    num_fewshot: int | None

    @classmethod
    def read(
        cls, specs: Sequence[str], *, include_path: Path | str | None = None, limit: int | None = None,
        num_fewshot: int | None = None,
    ) -> TaskSet:  # fmt: skip
        """Each of `specs` is one task or several joined by commas: a file, NAME=FILE, or a name of the harness."""
        files, names = read_tasks(specs, limit)
        if num_fewshot is not None and num_fewshot < 0:
            raise UserError(f"num_fewshot is {num_fewshot}; expected 0 or more")
        named = lm_eval_.load_tasks(names, include_path) if names else None
        if named and (twice := {task.name for task in files} & named["tasks"].keys()):
            raise UserError(
                f"tasks: {twice.pop()!r} is a file and a task of the harness; rename the file with NAME=FILE"
            )
        if num_fewshot and files:
            print(f"ipt eval: task files have no examples; num_fewshot {num_fewshot} holds for others", file=sys.stderr)
        return cls(files, named, limit, num_fewshot)


def run_eval(
    model: str,
    tasks: Sequence[str],
    *,
    output: Path | str | None = None,
    include_path: Path | str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    backend: str = "jax",
    dtype: str = "float32",
    batch_tokens: int | None = None,
    max_length: int | None = None,
    max_new_tokens: int = 64,
    add_bos: bool | None = None,
    mesh: str | None = None,
    log_samples: bool = False,
) -> dict[str, Any]:
    """`model` is what `ipt_jax.load` takes, `tasks` what `TaskSet.read` takes. Returns the results file's contents."""
    if backend not in BACKENDS:
        raise UserError(f"backend is {backend!r}; expected {', '.join(BACKENDS)}")
    if backend != "jax" and mesh:
        raise UserError(f"mesh is for backend jax, got backend {backend}; leave one of them out")
    if batch_tokens is not None and batch_tokens < 1:
        raise UserError(f"batch_tokens is {batch_tokens}; expected 1 or more")
    if log_samples and output is None:
        raise UserError("log_samples needs an output; set -o FILE.json")
    if output is not None:
        _check_output(Path(output))
    source = resolve_checkpoint(model)
    found = TaskSet.read(tasks, include_path=include_path, limit=limit, num_fewshot=num_fewshot)
    options = {"dtype": dtype, "max_length": max_length, "add_bos": add_bos}
    with _loaded(model, source, backend, options, mesh=mesh, batch_tokens=batch_tokens, output=output) as lm:
        result, rows, samples = evaluate(lm, found, max_new_tokens=max_new_tokens)
        result = {"model": str(model), "backend": backend, **result}
        result["config"] |= {"model": backend, "model_args": {"pretrained": str(model), **options}}
        if output is not None and _writes(lm):
            _write(Path(output), result, rows, samples if log_samples else {})
        if hasattr(lm, "journal"):
            lm.journal.remove()
    return result


def evaluate(lm: Any, tasks: TaskSet, *, max_new_tokens: int = 64) -> tuple[dict[str, Any], Rows, dict[str, Rows]]:
    """(results file, a row per question, the harness's samples per task) of a model of the harness's interface."""
    started = time.time()
    result: dict[str, Any] = {name: {} for name in lm_eval_.SECTIONS}
    result |= {"tasks": {}, "config": {}, "date": started}
    rows: Rows = []
    samples: dict[str, Rows] = {}
    if tasks.named is not None:
        found = lm_eval_.run_tasks(lm, tasks.named, limit=tasks.limit, num_fewshot=tasks.num_fewshot)
        samples = found.pop("samples")
        result |= found | {"tasks": {name: lm_eval_.named_summary(found, name, samples[name]) for name in samples}}
        rows += [lm_eval_.sample_row(name, sample) for name in samples for sample in samples[name]]
    for task in tasks.files:
        scored = score_task(lm, task, max_new_tokens)
        _add_task(result, task, scored)
        rows += [{"task": task.name, **row} for row in scored]
    if cut := sum(task.get("truncated") or 0 for task in result["tasks"].values()):
        print(f"ipt eval: {cut:,} questions are longer than the model's context; their start was cut", file=sys.stderr)
    return result, rows, samples


def _add_task(result: dict[str, Any], task: Task, rows: Rows) -> None:
    """Adds the scores of a task file in the harness's shape."""
    scores = _text_scores(rows) if task.sort == "text" else _question_scores(rows)
    entry: dict[str, Any] = {"name": task.name, "alias": task.name, "sample_len": len(rows)}
    for name, (value, stderr) in scores.items():
        entry |= {f"{name},none": value, f"{name}_stderr,none": "N/A" if stderr is None else stderr}
    output_type = {"choices": "multiple_choice", "answer": "generate_until", "text": "loglikelihood_rolling"}[task.sort]
    better = {name: name not in LOWER_IS_BETTER for name in scores}
    config = {
        "task": task.name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(task.path)}},
        "output_type": output_type, "num_fewshot": 0, "metadata": {"version": 1.0},
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": better[name]} for name in scores],
    }  # fmt: skip
    sections: tuple[Any, ...] = (entry, [], config, 1.0, 0, better, {"original": task.total, "effective": len(rows)})
    for section, value in zip(lm_eval_.SECTIONS, sections, strict=True):
        result[section][task.name] = value
    facts = {"chance": task.chance, "truncated": sum(row["truncated"] for row in rows)}
    if task.sort == "text":
        facts |= {name: sum(row[name] for row in rows) for name in ("loglikelihood", "tokens", "bytes", "words")}
    result["tasks"][task.name] = lm_eval_.summary(entry, **facts)


def _question_scores(rows: Rows) -> dict[str, tuple[float, float | None]]:
    return {name: mean_and_stderr([row[name] for row in rows]) for name in rows[0]["metrics"]}


def _text_scores(rows: Rows) -> dict[str, tuple[float, float | None]]:
    """Of the sums over all texts, not the mean of the texts' own; named and counted as in the harness."""
    loglikelihood = math.fsum(row["loglikelihood"] for row in rows)
    tokens, size, words = (sum(row[name] for row in rows) for name in ("tokens", "bytes", "words"))
    return {
        "bits_per_byte": (-loglikelihood / size / math.log(2), None),
        "byte_perplexity": (_perplexity(loglikelihood, size), None),
        "word_perplexity": (_perplexity(loglikelihood, words), None),
        "token_perplexity": (_perplexity(loglikelihood, tokens), None),
    }


def _perplexity(loglikelihood: float, count: int) -> float:
    exponent = -loglikelihood / count
    return math.exp(exponent) if exponent < 700 else math.inf


# ---- task files


def score_task(lm: Any, task: Task, max_new_tokens: int) -> Rows:
    """One row per question, in the order of the file."""
    if task.sort == "text":
        return _score_texts(lm, task)
    return _score_choices(lm, task) if task.sort == "choices" else _score_answers(lm, task, max_new_tokens)


def _score_choices(lm: Any, task: Task) -> Rows:
    asked = [join(question.prompt, choice) for question in task.questions for choice in question.choices]
    scores = lm_eval_.loglikelihoods(lm, asked)
    rows, start = [], 0
    for question in task.questions:
        mine = scores[start : start + len(question.choices)]
        start += len(question.choices)
        sums, tokens = [one[0] for one in mine], [one.tokens for one in mine]
        metrics, pick = score_choices(question, sums, tokens)
        choices = [choice.strip() for choice in question.choices]
        cut = any(one.truncated for one in mine)
        row = _row(question, choices[pick], choices[question.gold], pick == question.gold, cut, metrics)
        rows.append(row | {"logprobs": [round(total, 4) for total in sums], "tokens": tokens})
    return rows


def _score_answers(lm: Any, task: Task, max_new_tokens: int) -> Rows:
    settings = {"until": ["\n"], "max_gen_toks": max_new_tokens, "do_sample": False}
    texts = lm_eval_.generations(lm, [(question.prompt.rstrip(" "), settings) for question in task.questions])
    rows = []
    for question, (text, cut) in zip(task.questions, texts, strict=True):
        prediction = text.strip()
        metrics = score_answer(prediction, question.answers)
        rows.append(_row(question, prediction, question.answers[0], metrics["exact_match"] == 1.0, cut, metrics))
    return rows


def _row(
    question: Question, prediction: str, answer: str, correct: bool, truncated: bool, metrics: dict[str, float]
) -> dict[str, Any]:
    return {
        "id": question.id, "filter": "none", "prompt": question.prompt, "prediction": prediction, "answer": answer,
        "correct": correct, "truncated": truncated, "metrics": list(metrics), **metrics,
    }  # fmt: skip


def _score_texts(lm: Any, task: Task) -> Rows:
    rows = []
    scores = lm_eval_.rolling_loglikelihoods(lm, [question.prompt for question in task.questions])
    for question, (loglikelihood, tokens) in zip(task.questions, scores, strict=True):
        size = len(question.prompt.encode())
        rows.append({
            "id": question.id, "filter": "none", "metrics": ["bits_per_byte"], "truncated": False,
            "loglikelihood": loglikelihood, "tokens": tokens, "bytes": size,
            "words": len(re.split(r"\s+", question.prompt)), "bits_per_byte": -loglikelihood / size / math.log(2),
        })  # fmt: skip
    return rows


def join(prompt: str, continuation: str) -> tuple[str, str]:
    """("Where? ", "Velmoor") -> ("Where?", " Velmoor"): the two as they are encoded."""
    stem = prompt.rstrip(" ")
    spaced = continuation[:1].isspace() or stem[-1:].isspace()
    return stem, continuation if spaced else " " + continuation


# ---- models


@contextmanager
def _loaded(
    model: str, source: ModelSource, backend: str, options: dict[str, Any], *, mesh: str | None,
    batch_tokens: int | None, output: Path | str | None,
) -> Iterator[Any]:  # fmt: skip
    """The model with the interface of the harness. hf and vllm read an export, which is removed at the end."""
    if backend == "jax":
        yield _load_jax(model, source, options, mesh, batch_tokens, None if output is None else _journal(Path(output)))
    elif source.kind == "hf":
        yield lm_eval_.load_exported(backend, source.weights, batch_tokens, options)
    else:
        from ipt_jax.hf.convert import run_export

        with tempfile.TemporaryDirectory(prefix="ipt-eval-") as folder:
            run_export(model, Path(folder) / "model", None)
            yield lm_eval_.load_exported(backend, Path(folder) / "model", batch_tokens, options)


def _load_jax(
    model: str,
    source: ModelSource,
    options: dict[str, Any],
    mesh: str | None,
    batch_tokens: int | None,
    journal: Path | None,
) -> Any:
    """A `HarnessLM`. It encodes as transformers encodes the directory, or as training did the checkpoint."""
    from ipt_jax import load  # after the checks: importing jax takes seconds
    from ipt_jax.evaluate.harness import HarnessLM, RequestJournal
    from ipt_jax.parallel.devices import training_devices
    from ipt_jax.parallel.distributed import enable_compile_cache, initialize_distributed

    initialize_distributed()
    enable_compile_cache()
    devices = training_devices(None)
    loaded = load(model, options["dtype"], _mesh(mesh, len(devices)))
    add_bos, read_controls = options["add_bos"], False
    if loaded.tokenizer is not None:
        own_bos, read_controls = loaded.tokenizer.hf_rules()
        if add_bos is None and source.kind == "hf":
            add_bos = own_bos
        read_controls = read_controls and source.kind == "hf"
    identity = digest([_model_digest(source), options]) if journal else ""
    return HarnessLM(
        loaded, add_bos=add_bos, read_controls=read_controls, max_length=options["max_length"],
        batch_tokens=batch_tokens or BATCH_TOKENS.get(devices[0].platform, 32_768),
        journal=RequestJournal(journal, identity),
    )  # fmt: skip


def _model_digest(source: ModelSource) -> str:
    """Of the bytes of a model; a checkpoint's are listed in its digests.json."""
    listed = source.weights.parent / DIGESTS
    weights = [listed] if source.kind == "params" and listed.is_file() else sorted(source.weights.rglob("*"))
    tokenizer = sorted(source.tokenizer.iterdir()) if source.tokenizer else []
    files = [file for file in [*weights, source.config, *tokenizer] if file.is_file()]
    return digest([[file.name, file_digest(file)] for file in files])


def _mesh(stated: str | None, devices: int) -> Any:
    """DATA,FSDP,TENSOR; by default a copy of the model on each device. None for one device."""
    from ipt_jax.parallel.mesh import make_mesh

    if stated is None:
        return make_mesh(-1, 1, 1) if devices > 1 else None
    sizes = re.fullmatch(r"(-?\d+),(-?\d+),(-?\d+)", stated)
    if sizes is None:
        raise UserError(f"mesh is {stated!r}; expected DATA,FSDP,TENSOR, such as 1,8,1")
    data, fsdp, tensor = map(int, sizes.groups())
    return make_mesh(data, fsdp, tensor)


# ---- output


def _writes(lm: Any) -> bool:
    """Whether this process writes the results."""
    import jax

    return not hasattr(lm, "journal") or jax.process_index() == 0


def _journal(output: Path) -> Path:
    return output.with_name(output.name + ".journal")


def _check_output(output: Path) -> None:
    if output.is_dir():
        raise UserError(f"eval output {output}: is a directory; set the path of a file, such as {output}/eval.json")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass


def _write(output: Path, result: dict[str, Any], rows: Rows, samples: dict[str, Rows]) -> None:
    def plain(value: Any) -> Any:
        return value.item() if hasattr(value, "item") else str(value)  # numbers of NumPy, functions of a task's YAML

    def lines(found: Rows) -> bytes:
        return "".join(json.dumps(one, ensure_ascii=False, default=plain) + "\n" for one in found).encode()

    date = time.strftime("%Y-%m-%dT%H-%M-%S", time.gmtime(result["date"]))
    with writing(output):
        for name, found in samples.items():
            write_whole(output.with_name(f"samples_{name}_{date}.jsonl"), lines(lm_eval_.sample_lines(found)))
        write_whole(output.with_suffix(".rows.jsonl"), lines(rows))
        write_whole(output, json.dumps(result, ensure_ascii=False, indent=1, default=plain).encode())
