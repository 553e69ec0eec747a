"""Speed and memory of `ipt tokenize`, compared with `encode_batch` of the `tokenizers` library on text in memory.

    python benchmarks/tokenizing.py                    # speed: rounds of both sides, in turn, on the same cores
    python benchmarks/tokenizing.py --memory 1000 2000 # peak memory at 1 and 2 GB of text

The text is FairytaleQA (../shared next to the checkout, repeated), or random words if that is absent. The tokenizer is
Mistral's, from mistral-common, as tokenizer.json. Our side reads JSON Lines and writes complete shards to disk, with
checksums. The other side only encodes. By default both use one core, so that CPU seconds can be compared on a shared
machine. `--cores 2` compares wall time, including the start of workers.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ROOT.parent / "shared" / "data" / "fairytaleqa" / "train.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=48, help="text for the speed runs (default 48)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both sides (default 3)")
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json (default: Mistral's)")
    parser.add_argument("--cores", type=int, default=1, help="workers, and the library's threads (default 1)")
    parser.add_argument("--memory", type=int, nargs="+", metavar="MB", help="measure memory at these sizes instead")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(prefix="ipt-tokenize-") as folder:
        tokenizer = arguments.tokenizer.resolve() if arguments.tokenizer else mistral(Path(folder) / "tokenizer")
        if arguments.memory:
            for megabytes in arguments.memory:
                memory(Path(folder), tokenizer, megabytes, arguments.cores)
        else:
            speed(Path(folder), tokenizer, arguments)


def mistral(folder: Path) -> Path:
    """Mistral-7B-v0.1's tokenizer as tokenizer.json."""
    import mistral_common
    from transformers import LlamaTokenizer

    folder.mkdir()
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def source_texts(words: int) -> list[str]:
    """The contexts of FairytaleQA, or texts of `words` drawn words where it is absent."""
    if TEXTS.is_file():
        return [json.loads(line)["context"] for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("etaoinshrdlucm", k=draw.randint(2, 9))) for _ in range(5000)]
    return [" ".join(draw.choices(vocabulary, k=words)) for _ in range(3000)]


def texts(megabytes: int) -> Iterator[str]:
    """About `megabytes` of text in documents, each different from the others."""
    known = source_texts(150)
    left, number = megabytes * 1_000_000, 0
    while left > 0:
        text = f"{number} {known[number % len(known)]}"
        yield text
        left, number = left - len(text), number + 1


def write(path: Path, megabytes: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(texts(megabytes)):
            file.write(json.dumps({"id": str(number), "text": text}, ensure_ascii=False) + "\n")


def speed(folder: Path, tokenizer: Path, arguments: argparse.Namespace) -> None:
    write(folder / "in.jsonl", arguments.megabytes)
    sides = {"encode_batch": [], "ipt tokenize": []}  # type: dict[str, list[tuple[float, float, int]]]
    for number in range(arguments.rounds):
        sides["encode_batch"].append(library(folder, tokenizer, arguments.cores))
        sides["ipt tokenize"].append(ours(folder, tokenizer, arguments.cores))
        for name, runs in sides.items():
            wall, cpu, tokens = runs[-1]
            by_cpu = f"{tokens / cpu:11,.0f} a CPU second" if arguments.cores == 1 else ""
            print(f"round {number + 1}  {name:13} {tokens / wall:11,.0f} tokens/s {by_cpu}")
    for what, place in (("wall", 0), ("CPU seconds", 1))[: 2 if arguments.cores == 1 else 1]:  # others' CPU is not seen
        rates = {name: [run[2] / run[place] for run in runs] for name, runs in sides.items()}
        ratios = [a / b for a, b in zip(rates["ipt tokenize"], rates["encode_batch"], strict=True)]
        medians = ", ".join(f"{name} {statistics.median(values):,.0f} tokens/s" for name, values in rates.items())
        print(f"by {what}: {medians}; ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


LIBRARY = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = [json.loads(line)["text"] for line in open(sys.argv[2], encoding="utf-8")]
wall, cpu = time.monotonic(), time.process_time()
tokens = sum(len(one) for one in tokenizer.encode_batch(texts, add_special_tokens=False))
print(json.dumps([time.monotonic() - wall, time.process_time() - cpu, tokens + 2 * len(texts)]))
"""


def library(folder: Path, tokenizer: Path, cores: int) -> tuple[float, float, int]:
    """(wall, CPU seconds, tokens) of one call that encodes all texts; loading is not timed. BOS and EOS are counted."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(cores)}
    command = [sys.executable, "-c", LIBRARY, str(tokenizer / "tokenizer.json"), str(folder / "in.jsonl")]
    wall, cpu, tokens = json.loads(subprocess.check_output(command, env=environment))
    return wall, cpu, tokens


OURS = """
import json, sys, time
from ipt_jax.data.tokenize import TokenizeSettings, run_tokenize
settings = TokenizeSettings.model_validate_json(sys.argv[1])
wall, cpu = time.monotonic(), time.process_time()
tokens = run_tokenize(settings)["tokens"]
print(json.dumps([time.monotonic() - wall, time.process_time() - cpu, tokens]))
"""


def ours(folder: Path, tokenizer: Path, cores: int) -> tuple[float, float, int]:
    """The same of `ipt tokenize`, the start of its workers included; with two units a worker at least."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    fields = {"inputs": [{"path": str(folder / "in.jsonl"), "source": "s"}], "tokenizer": str(tokenizer)}
    unit_bytes = -(-(folder / "in.jsonl").stat().st_size // (2 * cores))
    recipe = json.dumps(fields | {"output": str(folder / "out"), "workers": cores, "unit_bytes": unit_bytes})
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.check_output(
        [sys.executable, "-c", OURS, recipe], env=environment, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    wall, cpu, tokens = json.loads(output)
    return wall, cpu, tokens


MEMORY = """
import sys
from ipt_jax.data.tokenize import TokenizeSettings, run_tokenize
run_tokenize(TokenizeSettings.model_validate_json(sys.argv[1]))
"""


def memory(folder: Path, tokenizer: Path, megabytes: int, cores: int) -> None:
    """Peak resident memory of the largest process, over all that `ipt tokenize` starts."""
    write(folder / "in.jsonl", megabytes)
    for packed in (False, True):
        path = folder / "in.jsonl"
        if packed:
            subprocess.run(["gzip", "-1", "-f", str(path)], check=True)
            path = folder / "in.jsonl.gz"
        shutil.rmtree(folder / "out", ignore_errors=True)
        fields = {"inputs": [{"path": str(path)}], "tokenizer": str(tokenizer), "workers": cores}
        recipe = json.dumps(fields | {"output": str(folder / "out")})
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-c", MEMORY, recipe], env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT
        )
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0
        print(
            f"{megabytes:,} MB of text, {path.name}: {used.ru_maxrss / 1024:,.0f} MiB at most in one process, ", end=""
        )
        print(f"{time.monotonic() - started:,.0f} s", flush=True)


if __name__ == "__main__":
    main()
