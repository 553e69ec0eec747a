"""Speed and memory of `synth decontaminate`, and its matches compared with a plain search.

    python benchmarks/decontaminate.py                     # MB and pairs per CPU second, three rounds
    python benchmarks/decontaminate.py --memory 200 400    # peak memory at 200 and 400 MB of text

The text is FairytaleQA (../shared next to the checkout, repeated with a number in each text). The benchmark is its
validation questions and answers, with random items up to `--items`. The rival is the obvious program: words by a
regular expression, and a set of tuples of 13 of them.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ipt_jax.core.settings import check_settings
from ipt_jax.core.stage import Output
from ipt_jax.corpus.records import GroupText, Pair, SynthGroup, encode
from synth.decontaminate.run import DecontaminateSettings, run_decontaminate

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "fairytaleqa"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=50, help="raw text of a round (default 50)")
    parser.add_argument("--groups", type=int, default=20_000, help="groups of two texts of a round (default 20,000)")
    parser.add_argument(
        "--items", type=int, default=100_000, help="benchmark items, each of 20 words (default 100,000)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="+", metavar="MB", help="measure memory at these sizes instead")
    arguments = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"{DATA}: absent; the benchmark needs its texts")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(prefix="ipt-decontaminate-") as name:
        folder = Path(name)
        write_benchmark(folder / "bench.jsonl", arguments.items)
        if arguments.memory:
            for megabytes in arguments.memory:
                memory(folder, megabytes)
        else:
            speed(folder, arguments)


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def write_benchmark(path: Path, items: int) -> None:
    known = [{"question": one["question"], "answer": one["answer"]} for row in rows("val") for one in row["qa"]]
    words = sorted({word for row in rows("train") for word in row["context"].split()})
    rng = random.Random(0)
    drawn = ({"question": " ".join(rng.choices(words, k=15)), "answer": " ".join(rng.choices(words, k=5))}
             for _ in range(items - len(known)))  # fmt: skip
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(item) + "\n" for item in [*known, *drawn])


def write_raw(path: Path, megabytes: int) -> int:
    texts = [row["context"] for row in rows("train")]
    left, number = megabytes * 1_000_000, 0
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            text = f"{number} {texts[number % len(texts)]}"
            file.write(json.dumps({"id": str(number), "text": text}, ensure_ascii=False) + "\n")
            left, number = left - len(text), number + 1
    return megabytes * 1_000_000 - left


def write_groups(path: Path, groups: int) -> tuple[int, int]:
    """(letters, pairs) of groups of two texts with their pairs."""
    known = rows("train")
    letters = pairs = 0

    def make(number: int) -> bytes:
        nonlocal letters, pairs
        texts = []
        for place in (0, 1):
            row = known[(2 * number + place) % len(known)]
            asked = [Pair(one["question"], one["answer"]) for one in row["qa"]]
            text = f"{number} {row['context']}"
            texts.append(GroupText(f"t{2 * number + place}", 0, len(text), text, "s", asked, place, 0, 0, 0, "stop"))
            pairs += len(asked)
            letters += len(text) + sum(len(one.question) + len(one.answer) for one in asked)
        return encode(SynthGroup(f"g{number}", texts, "m", "w", {}, "f"))

    with Output(path, stage="synth", identity={}, shard_name="groups") as output:
        output.seal(0, 1, map(make, range(groups)))
        output.finish()
    return letters, pairs


def decontaminate(folder: Path, source: Path) -> tuple[float, float, dict]:
    """(wall, CPU seconds, figures) of a run on one core."""
    shutil.rmtree(folder / "clean", ignore_errors=True)
    benchmark = {"path": str(folder / "bench.jsonl"), "fields": ["question", "answer"]}
    recipe = {"inputs": [{"path": str(source)}], "benchmarks": [benchmark], "output": str(folder / "clean")}
    settings = check_settings(DecontaminateSettings, {**recipe, "workers": 1}, where="benchmark")
    wall, cpu = time.monotonic(), time.process_time()
    result = run_decontaminate(settings)
    return time.monotonic() - wall, time.process_time() - cpu, result


WORD = re.compile(r"[^\W_]+")


def rival(folder: Path, source: Path) -> tuple[float, float, dict]:
    """Words by a regular expression, a set of tuples; reads the same file, writes nothing, and the set is not timed."""
    runs = set()
    for line in (folder / "bench.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        words = WORD.findall(f"{row['question']}\n{row['answer']}".lower())
        runs.update(tuple(words[i : i + 13]) for i in range(len(words) - 12))
    hits = 0
    wall, cpu = time.monotonic(), time.process_time()
    for line in source.open(encoding="utf-8"):
        words = WORD.findall(json.loads(line)["text"].lower())
        hits += any(tuple(words[i : i + 13]) in runs for i in range(len(words) - 12))
    return time.monotonic() - wall, time.process_time() - cpu, {"documents_removed": hits}


def speed(folder: Path, arguments: argparse.Namespace) -> None:
    letters = write_raw(folder / "raw.jsonl", arguments.megabytes)
    group_letters, pairs = write_groups(folder / "groups", arguments.groups)
    sides = {
        "nothing but start": (lambda: decontaminate(folder, empty(folder)), 0, 0),
        "raw text": (lambda: decontaminate(folder, folder / "raw.jsonl"), letters, 0),
        "groups": (lambda: decontaminate(folder, folder / "groups"), group_letters, pairs),
        "rival, raw text": (lambda: rival(folder, folder / "raw.jsonl"), letters, 0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(arguments.rounds):
        for name, (run, _, _) in sides.items():
            wall, cpu, result = run()
            seconds[name].append(cpu)
            print(f"round {number + 1}  {name:18} {wall:6.1f} s, {cpu:6.1f} CPU s, "
                  f"{result['documents_removed']} documents removed", flush=True)  # fmt: skip
    base = statistics.median(seconds["nothing but start"])
    for name, (_, size, pairs) in sides.items():
        cpu = statistics.median(seconds[name]) - (0 if name.startswith("rival") else base)
        if size:
            by_pairs = f", {pairs / cpu:,.0f} pairs" if pairs else ""
            print(f"{name}: {size / 1e6 / cpu:,.1f} MB{by_pairs} a CPU second")
    print(f"reading {arguments.items:,} benchmark items: {base:.1f} CPU s")


def empty(folder: Path) -> Path:
    (folder / "one.jsonl").write_text('{"id": "1", "text": "one"}\n')
    return folder / "one.jsonl"


MEMORY = "import sys; from benchmarks.decontaminate import *; decontaminate(Path(sys.argv[1]), Path(sys.argv[2]))"


def memory(folder: Path, megabytes: int) -> None:
    """Peak resident memory of a process that does nothing else."""
    write_raw(folder / "raw.jsonl", megabytes)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEMORY, str(folder), str(folder / "raw.jsonl")]
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0
    print(f"{megabytes:,} MB of text: {used.ru_maxrss / 1024:,.0f} MiB at most", flush=True)


if __name__ == "__main__":
    main()
