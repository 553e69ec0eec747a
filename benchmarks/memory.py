"""Memory over time: of the loader over 20,000 rows, and of `ipt tokenize` over gigabytes of text.

    python benchmarks/memory.py loader                  # resident memory after 1,000, 5,000, 10,000 and 20,000 rows
    python benchmarks/memory.py tokenize --gigabytes 0.5 1 2 5

Each measurement is a process of its own. The loader reads rows of 2,048 tokens of a corpus of that size. Pages of files
are not counted. Tokenizing runs in one process, with a tokenizer of complete words of 40 letters on average, which is
several times as fast per byte as a BPE. The text is random words.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from token_corpus import web_lengths, write_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ipt_jax.data.loader import batches
from ipt_jax.data.mixture import DataSettings
from ipt_jax.data.plan import build_plan
from ipt_jax.data.tokenize import TokenizeSettings, run_tokenize

SEQ_LEN, ROWS_PER_STEP = 2048, 16
ROWS = (1_000, 5_000, 10_000, 20_000)


def resident() -> int:
    """MiB of this process in memory, without pages of files."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return (int(fields[1]) - int(fields[2])) * resource.getpagesize() >> 20


def measure_loader(root: Path) -> None:
    source = {"name": "raw", "path": str(root / "raw"), "epochs": 1}
    data = DataSettings.model_validate({"seq_len": SEQ_LEN, "sources": [source]})
    plan = build_plan(data, rows_per_step=ROWS_PER_STEP)
    for step, _ in enumerate(batches(plan, start_step=0, rows_per_step=ROWS_PER_STEP), start=1):
        if step * ROWS_PER_STEP in [-(-rows // ROWS_PER_STEP) * ROWS_PER_STEP for rows in ROWS]:
            print(f"after {step * ROWS_PER_STEP:>6,} rows: {resident():>6,} MiB", flush=True)


def measure_tokenize(root: Path) -> None:
    recipe = {"inputs": [{"path": str(root / "in.jsonl")}], "tokenizer": str(root / "words"), "workers": 1}
    started = time.monotonic()
    tokens = run_tokenize(TokenizeSettings.model_validate(recipe | {"output": str(root / "out")}))["tokens"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps({"tokens": tokens, "seconds": time.monotonic() - started, "peak_mib": peak}))


def write_text(path: Path, size: float, words: list[str]) -> None:
    """About `size` bytes of JSON Lines, whose texts are a thousand in turn."""
    draw = random.Random(0)
    known = [" ".join(draw.choices(words, k=draw.randint(10, 300))) for _ in range(1000)]
    with path.open("w", encoding="utf-8") as file:
        left, number = size, 0
        while left > 0:
            left -= file.write(json.dumps({"id": str(number), "text": known[number % 1000]}) + "\n")
            number += 1


def word_tokenizer(folder: Path, words: list[str]) -> None:
    names = ["<unk>", "<s>", "</s>", *(f"\u2581{word}" for word in words)]  # the mark of a space
    tokenizer = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))


def run(what: str, root: Path) -> str:
    command = [sys.executable, __file__, what, "--measure", str(root)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loader", "tokenize"])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.5, 1, 2], help="of text (default 0.5 1 2)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        (measure_loader if given.what == "loader" else measure_tokenize)(given.measure)
        return
    with tempfile.TemporaryDirectory(prefix="ipt-memory-") as folder:
        if given.what == "loader":
            write_corpus(Path(folder) / "raw", web_lengths(ROWS[-1] * SEQ_LEN // 430, 450, 0), "raw", 0)
            print(run("loader", Path(folder)), end="")
        for gigabytes in given.gigabytes if given.what == "tokenize" else []:
            tokenize(Path(tempfile.mkdtemp(dir=folder)), gigabytes)


def tokenize(root: Path, gigabytes: float) -> None:
    draw = random.Random(1)
    words = ["".join(draw.choices("etaoinshrdlucm", k=draw.randint(20, 60))) for _ in range(20_000)]
    word_tokenizer(root / "words", sorted(set(words)))
    write_text(root / "in.jsonl", gigabytes * 1e9, words)
    found = json.loads(run("tokenize", root).splitlines()[-1])
    (root / "in.jsonl").unlink()
    print(f"{gigabytes:g} GB of text, {found['tokens']:,} tokens: ", end="")
    print(f"{found['peak_mib']:,} MiB at most, {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
