"""Compare `ipt eval` with the harness's backend hf: every request, and tokens scored per second.

python benchmarks/evaluate.py MODEL [--limit N] [--shots 0,3] [--repeats 3] [--speed TASK,...] -o FILE.json

MODEL is a Hugging Face directory, such as examples/smollm2.py writes. The tasks are made of the texts of the
documentation: `cloze` (four endings of a passage, one prompt), `letters` (one-token choices of one prompt), `blank`
(one continuation behind four contexts), `rolling` (perplexity of documents) and `answers` (generation with stops).
First each request of each task is compared, with the shots asked for. Then both backends score the same requests in
turn, and the medians are compared. A token counts once per request that needs it: the work that is asked for, not the
work that is done.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LETTERS = "ABCD"
TASKS: dict[str, dict[str, Any]] = {
    "cloze": {"output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_choice": "choices",
              "doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "letters": {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_choice": list(LETTERS),
                "doc_to_text": "Which sentence follows?\n{{prompt}}\n{{listed}}\nAnswer:",
                "metric_list": [{"metric": "acc"}]},
    "blank": {"output_type": "multiple_choice", "doc_to_text": "gold", "doc_to_choice": "contexts",
              "doc_to_target": "ending", "metric_list": [{"metric": "acc"}]},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]},
    "answers": {"output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}",
                "generation_kwargs": {"until": ["\n\n", ".", " the "], "max_gen_toks": 40},
                "metric_list": [{"metric": "exact_match"}]},
}  # fmt: skip


def paragraphs() -> list[str]:
    """Paragraphs of prose of the documentation, of two sentences or more."""
    found = []
    for path in sorted((ROOT / "docs").rglob("*.md")):
        for block in path.read_text(encoding="utf-8").split("\n\n"):
            text = " ".join(block.split())
            if text[:1].isalpha() and 200 < len(text) < 900 and text.count(". ") >= 2 and "|" not in text:
                found.append(text)
    random.Random(0).shuffle(found)
    return found


def write_tasks(folder: Path, count: int) -> None:
    texts = paragraphs()
    sentences = [re.split(r"(?<=\.) ", text) for text in texts]
    rows = []
    for number, parts in enumerate(sentences):
        draw = random.Random(number)
        others = draw.sample([other[-1] for other in sentences if other is not parts], 3)
        gold = draw.randrange(4)
        choices = others[:gold] + [parts[-1]] + others[gold:]
        prompt = " ".join(parts[:-1])
        words = prompt.split()
        rows.append({
            "prompt": prompt, "choices": choices, "gold": gold, "answer": " ".join(parts[-1].split()[:8]),
            "listed": "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)),
            "contexts": [f"{' '.join(words[:-1])} {draw.choice(other.split())}" for other in choices],
            "ending": parts[-1], "text": " ".join(texts[number : number + 3]),
        })  # fmt: skip
    held = {"shots": rows[:20], "test": rows[20 : 20 + count]}
    for name, part in held.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for name, task in TASKS.items():
        task = task | {
            "task": f"docs_{name}", "dataset_path": "json", "test_split": "test", "fewshot_split": "shots",
            "dataset_kwargs": {"data_files": {split: str(folder / f"{split}.jsonl") for split in held}},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


def compare(ours: Any, theirs: Any, names: list[str], folder: Path, shots: int) -> dict[str, Any]:
    """The largest difference of a request, and whether accuracies and generations are equal."""
    from ipt_jax.evaluate.run import TaskSet, evaluate

    found = []
    for lm in (ours, theirs):
        tasks = TaskSet.read(names, include_path=folder, num_fewshot=shots)
        found.append(evaluate(lm, tasks))
    (result, _, samples), (other, _, other_samples) = found
    report: dict[str, Any] = {}
    for name in samples:
        worst, equal, requests = 0.0, 0, 0
        for left, right in zip(samples[name], other_samples[name], strict=True):
            for one, two in zip(left["resps"], right["resps"], strict=True):
                requests += 1
                if isinstance(one[0], str):
                    equal += one[0] == two[0]
                elif isinstance(one[0], tuple | list):
                    worst, equal = max(worst, abs(one[0][0] - two[0][0])), equal + (one[0][1] == two[0][1])
                else:
                    worst, equal = max(worst, abs(one[0] - two[0])), equal + 1
        scores = {key: value for key, value in result["results"][name].items() if "," in key and "stderr" not in key}
        report[name] = {
            "requests": requests, "largest_difference": worst, "equal_greedy_or_text": equal, "ours": scores,
            "same_scores": all(
                abs(value - other["results"][name][key]) <= 1e-3 * abs(value) * ("acc" not in key)
                for key, value in scores.items()
            ),
        }  # fmt: skip
    return report


def speed(ours: Any, theirs: Any, name: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds for all requests of a task, in turn, after one call that compiles; medians."""
    from ipt_jax.evaluate.run import TaskSet

    tasks = TaskSet.read([name], include_path=folder, num_fewshot=0).named["tasks"]
    (task,) = tasks.values()
    task.set_config("num_fewshot", 0)
    task.build_all_requests(limit=None)
    requests = task.instances
    tokens = sum(
        len(theirs.tok_encode("".join(one for one in request.args if isinstance(one, str)))) for request in requests
    )
    seconds: dict[str, list[float]] = {"jax": [], "hf": []}
    getattr(ours, requests[0].request_type)(requests)
    for _ in range(repeats):
        for backend, lm in (("jax", ours), ("hf", theirs)):
            begun = time.perf_counter()
            getattr(lm, requests[0].request_type)(requests)
            seconds[backend].append(time.perf_counter() - begun)
    medians = {backend: statistics.median(found) for backend, found in seconds.items()}
    rates = {f"{backend}_tokens_per_second": tokens / value for backend, value in medians.items()}
    return {
        "requests": len(requests),
        "tokens": tokens,
        **rates,
        "ratio": medians["hf"] / medians["jax"],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--limit", type=int, default=40, help="questions per task")
    parser.add_argument("--shots", default="0,3")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--speed", default=",".join(TASKS))
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--hf-batch", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    from lm_eval.models.huggingface import HFLM

    import ipt_jax
    from ipt_jax.evaluate.harness import HarnessLM
    from ipt_jax.parallel.distributed import enable_compile_cache

    enable_compile_cache()
    loaded = ipt_jax.load(options.model)
    assert loaded.tokenizer is not None
    bos, controls = loaded.tokenizer.hf_rules()
    ours = HarnessLM(loaded, add_bos=bos, read_controls=controls, batch_tokens=options.batch_tokens)
    theirs = HFLM(str(options.model), device="cpu", dtype="float32", batch_size=options.hf_batch)
    report: dict[str, Any] = {"agreement": {}, "speed": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tasks(folder, options.limit)
        names = [f"docs_{name}" for name in TASKS]
        for shots in filter(None, options.shots.split(",")):
            report["agreement"][shots] = compare(ours, theirs, names, folder, int(shots))
            print(json.dumps({shots: report["agreement"][shots]}, indent=1), flush=True)
        for name in filter(None, options.speed.split(",")):
            report["speed"][name] = speed(ours, theirs, f"docs_{name}", folder, options.repeats)
            print(json.dumps({name: report["speed"][name]}), flush=True)
            options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
