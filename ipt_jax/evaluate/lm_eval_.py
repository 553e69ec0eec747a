"""lm-evaluation-harness: its tasks and aggregation for any model, and its backends hf and vllm for exported ones.

The extra `evals` installs it. Everything that imports it is here, but for the registration of `HarnessLM`. The
functions that ask a model need its interface alone, so that task files are scored without the package.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ipt_jax.core.errors import UserError

# of a results file, each by task
SECTIONS = ("results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
INSTALL = "pip install 'instruction-pretraining[evals]'"
ROW_TOKENS = 1024  # of batch_tokens, a row of backend hf
PER_UNIT = ("word_perplexity", "byte_perplexity", "bits_per_byte")  # their samples are (log-likelihood, units)
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one setting
DEFAULT_LIMIT = 256  # new tokens, as in the harness
PROMPT = "max_prompt_tokens"  # a setting of ours: the prompt is cut on the left to so many tokens
VLLM = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "1"
}  # fmt: skip


class Request(NamedTuple):
    """What a backend reads of the harness's `Instance`."""

    args: tuple[Any, ...]


class LogLikelihood(tuple[float, bool]):
    """(sum, is_greedy), as the harness expects it, with the number of tokens and whether something was cut."""

    tokens: int
    truncated: bool

    def __new__(cls, logprob: float, greedy: bool, tokens: int, truncated: bool) -> LogLikelihood:
        made = super().__new__(cls, (logprob, greedy))
        made.tokens, made.truncated = tokens, truncated
        return made

    def __getnewargs__(self) -> tuple[float, bool, int, bool]:  # type: ignore[override]
        return self[0], self[1], self.tokens, self.truncated


# ---- tasks by name


def load_tasks(names: Sequence[str], include_path: Path | str | None) -> Any:
    """The harness's TaskDict of these tasks, groups, tags, patterns and YAML files; reads their data sets."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"task {names[0]!r}: tasks by name need lm-evaluation-harness; run {INSTALL}")
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"include_path {include_path}: no such directory; set a directory of task YAML files")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    wanted: list[str] = []
    for name in names:
        found = [name] if Path(name).is_file() else sorted(manager.match_tasks([name]))
        if not found:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]}?" if near else "set a file, a task's name, or --include-path"
            raise UserError(f"task {name!r}: neither a file nor a task of lm-evaluation-harness; {hint}")
        wanted += found
    try:
        return manager.load(list(dict.fromkeys(wanted)))
    except UserError:
        raise
    except Exception as error:  # of any kind: a data set that is absent, a hub that cannot be reached, a bad YAML
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"tasks {', '.join(wanted)}: cannot be loaded ({type(error).__name__}: {reason}); check the data set, the "
            "network and the YAML"
        ) from error


class _Loaded:
    """A TaskManager whose tasks are loaded."""

    def __init__(self, tasks: Any):
        self.tasks = tasks
        self.task_index: dict[str, Any] = {}

    def load(self, names: Any) -> Any:
        return self.tasks


def run_tasks(lm: Any, tasks: Any, *, limit: int | None, num_fewshot: int | None) -> dict[str, Any]:
    """The results of `lm_eval.simple_evaluate`, samples included."""
    import lm_eval.evaluator

    for name, task in tasks["tasks"].items():
        if note := (task.config.metadata or {}).get("note"):
            print(f"ipt eval: {name}: {' '.join(str(note).split())}", file=sys.stderr)
    results: dict[str, Any] = lm_eval.evaluator.simple_evaluate(
        model=lm, tasks=list(tasks["tasks"]), task_manager=_Loaded(tasks), limit=limit, num_fewshot=num_fewshot
    )
    return results


def summary(entry: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """What tables show of a task's entry in `results`: a headline metric (acc_norm, else the first) and all."""
    metrics = {}
    for key, value in entry.items():
        name, comma, kept = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            stderr = entry.get(f"{name}_stderr,{kept}")
            stderr = float(stderr) if isinstance(stderr, int | float) else None
            metrics[name if kept == "none" else key] = {"value": float(value), "stderr": stderr}
    headline = "acc_norm" if "acc_norm" in metrics else next(iter(metrics))
    return {"metric": headline, **metrics[headline], "n": entry["sample_len"], **facts, "metrics": metrics}


def named_summary(results: dict[str, Any], name: str, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    choices = [len(one["arguments"]) for one in samples if results["configs"][name]["output_type"] == "multiple_choice"]
    cut = sum(any(getattr(one[0], "truncated", False) for one in sample["resps"]) for sample in samples)
    chance = sum(1 / count for count in choices) / len(choices) if choices else None
    return summary(results["results"][name], chance=chance, truncated=cut)


def sample_row(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    """A question of the rows file: what `ipt compare` and `ipt report` read."""
    values = {name: sample[name] for name in sample["metrics"]}
    numbers = {
        name: -value[0] / value[1] if name in PER_UNIT else float(value)
        for name, value in values.items()
        if name in PER_UNIT or isinstance(value, int | float)
    }
    prompt, target = sample["arguments"][0][0], sample["target"]
    row = {"task": task, "id": str(sample["doc_id"]), "doc_hash": sample["doc_hash"], "filter": sample["filter"]}
    row |= {"metrics": list(numbers), **numbers}
    if "acc" in numbers or "acc_norm" in numbers or "exact_match" in numbers:
        first = next(name for name in ("acc_norm", "acc", "exact_match") if name in numbers)
        row |= {"prompt": prompt, "answer": str(target), "correct": numbers[first] == 1.0}
        row["prediction"] = _prediction(sample)
    return row


def _prediction(sample: dict[str, Any]) -> str:
    answers = sample["filtered_resps"]
    if all(isinstance(one, tuple | list) for one in answers):
        sums = [one[0] for one in answers]
        return str(sample["arguments"][sums.index(max(sums))][-1]).strip()
    return str(answers[0]).strip()


def sample_lines(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples as the harness writes them (`EvaluationTracker.save_results_samples`), for its viewers."""
    from lm_eval.utils import sanitize_list

    def arguments(given: Sequence[Any]) -> dict[str, Any]:
        return {
            f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(argument)} for i, argument in enumerate(given)
        }

    return [
        sample | {
            "resps": sanitize_list(sample["resps"]), "filtered_resps": sanitize_list(sample["filtered_resps"]),
            "arguments": arguments(sample["arguments"]), "target": str(sample["target"]),
        }
        for sample in samples
    ]  # fmt: skip


# ---- any model of the harness's interface


def loglikelihoods(lm: Any, asked: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
    """Of each (context, continuation), with the number of tokens of the continuation."""
    found: list[LogLikelihood] = lm.loglikelihood([Request(pair) for pair in asked])
    return found


def generations(lm: Any, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[str, bool]]:
    """Of each (context, settings): the new text, and whether the context was cut."""
    texts = lm.generate_until([Request(one) for one in asked])
    longest = [lm.max_length - settings["max_gen_toks"] for _, settings in asked]
    sizes = [len(lm.tok_encode(context)) for context, _ in asked]
    return [(text, size > most) for text, size, most in zip(texts, sizes, longest, strict=True)]


def rolling_loglikelihoods(lm: Any, texts: Sequence[str]) -> list[tuple[float, int]]:
    """Of each text, with its number of tokens."""
    found = lm.loglikelihood_rolling([Request((text,)) for text in texts])
    sizes = [len(lm.tok_encode(text, add_special_tokens=False)) for text in texts]
    return list(zip(found, sizes, strict=True))


# ---- the harness's backends


def load_exported(backend: str, directory: Path, batch_tokens: int | None, options: dict[str, Any]) -> Any:
    """The harness's `HFLM` or `VLLM` of a Hugging Face directory."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"backend {backend} needs lm-evaluation-harness; run {INSTALL}")
    if importlib.util.find_spec("torch" if backend == "hf" else "vllm") is None:
        raise UserError(f"backend {backend} needs {'torch' if backend == 'hf' else 'vllm'}; install it, or use jax")
    shared = {"pretrained": str(directory), "dtype": options["dtype"], "max_length": options["max_length"]}
    shared["add_bos_token"] = options["add_bos"]
    if backend == "hf":
        from lm_eval.models import huggingface

        # The harness's default is cuda, present or not.
        device = "cuda" if huggingface.torch.cuda.is_available() else "cpu"
        lm = huggingface.HFLM(**shared, device=device, batch_size=max(1, (batch_tokens or 8192) // ROW_TOKENS))
    else:
        for name, value in VLLM.items():
            os.environ.setdefault(name, value)
        from lm_eval.models.vllm_causallms import VLLM as VllmLM

        lm = VllmLM(**shared, batch_size="auto")
    lm.loglikelihood = partial(_with_tokens, lm, lm.loglikelihood)
    lm.loglikelihood_rolling = partial(_without_bos, lm, lm.loglikelihood_rolling)
    lm.generate_until = partial(_with_cut_prompts, lm, lm.generate_until)
    return lm


def _with_tokens(lm: Any, loglikelihood: Any, requests: Any, disable_tqdm: bool = False) -> list[LogLikelihood]:
    """Log-likelihoods with the number of tokens, which the harness does not report."""
    found, sizes = loglikelihood(requests, disable_tqdm=disable_tqdm), []
    for context, continuation in (request.args for request in requests):
        alone = lm.tok_encode(continuation, add_special_tokens=False)
        sizes.append(len(lm._encode_pair(context, continuation)[1] if context else alone))
    return [LogLikelihood(one[0], one[1], tokens, False) for one, tokens in zip(found, sizes, strict=True)]


def _without_bos(lm: Any, rolling: Any, requests: Any, disable_tqdm: bool = False) -> Any:
    """The harness's rolling log-likelihood encodes with BOS and adds a prefix: BOS twice. Here it encodes without."""
    with _attribute(lm, "add_bos_token", False):
        return rolling(requests, disable_tqdm=disable_tqdm)


def _with_cut_prompts(lm: Any, generate_until: Any, requests: Any, disable_tqdm: bool = False) -> list[str]:
    """Prompts cut to `max_prompt_tokens`, which the harness does not know: a shorter context has the same effect."""
    groups: dict[int, list[int]] = {}
    for number, (_, settings) in enumerate(request.args for request in requests):
        limit = next((settings[name] for name in LIMITS if settings.get(name) is not None), DEFAULT_LIMIT)
        length = min(lm.max_length, settings[PROMPT] + limit) if settings.get(PROMPT) else lm.max_length
        groups.setdefault(length, []).append(number)
    texts: dict[int, str] = {}
    for length, numbers in groups.items():
        asked = [
            Request((requests[number].args[0], {k: v for k, v in requests[number].args[1].items() if k != PROMPT}))
            for number in numbers
        ]
        with _attribute(lm, "_max_length", length):
            texts |= dict(zip(numbers, generate_until(asked, disable_tqdm=disable_tqdm), strict=True))
    return [texts[number] for number in range(len(requests))]


@contextmanager
def _attribute(thing: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)
