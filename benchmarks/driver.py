"""Cost of `synth run` without a model: rounds per CPU second, and memory by the size of the corpus.

    python benchmarks/driver.py                          # 20,000 texts: rounds per CPU second, stage by stage
    python benchmarks/driver.py --texts 100000 300000    # resident memory during the run, one process per size

Everything of `synth run` runs except the model: reader, tokenizer (Mistral's), budget, prompts, parser, records,
journal, shards, progress. `canned` answers each request after `--latency` seconds with one of 64 prepared well-formed
completions, so that the engine costs next to nothing. `scripted` is the engine of rehearsals, which hashes, reads and
quotes the prompt. CPU seconds are those of all threads, so a rate is per core and does not depend on other load.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from synthesis import write_corpus
from tokenizing import mistral

from ipt_jax.core.hashing import FileHashCache
from ipt_jax.core.settings import check_settings
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth.config import RunSettings
from synth.engine import synthesizer_tokenizer
from synth.engine.base import Completion, Engine, GenerationRequest, Places
from synth.engine.scripted import ScriptedEngine, quote_pairs
from synth.format.wire import pairs_text
from synth.generate.few_shot import make_chain
from synth.generate.group_store import GroupStore
from synth.generate.run import fill_here, open_output, run_identity
from synth.generate.scheduler import in_flight
from synth.generate.work_list import list_work

IN_FLIGHT = 512
CANNED = 64


class CannedEngine:
    def __init__(self, tokenizer: Tokenizer, places: int, latency: float) -> None:
        self.tokenizer, self.places, self.latency = tokenizer, places, latency
        self._places = Places(places)
        words = "the old mill by the river was sold in spring to a baker who came from far away".split()
        lucks = [random.Random(number) for number in range(CANNED)]
        texts = [pairs_text(quote_pairs(" ".join(rng.sample(words, len(words))), rng)) for rng in lucks]
        self._answers = [tokenizer.encode(text, continuing=True) for text in texts]

    async def generate(self, request: GenerationRequest) -> Completion:
        async with self._places.hold(request.priority):
            await asyncio.sleep(self.latency)
        return Completion(list(self._answers[request.seed % CANNED]), "stop", len(request.prompt_ids), 0)

    async def close(self) -> None: ...


def recipe(folder: Path, name: str, texts: int, rounds: int, latency: float) -> RunSettings:
    places = next(places for places in range(IN_FLIGHT, 0, -1) if in_flight(places) <= IN_FLIGHT)
    plain = {
        "synthesizer": {
            "model": str(folder / "tokenizer"),
            "engine": "scripted",
            "max_num_seqs": places,
            "faults": {"latency_seconds": latency},
        },
        "corpus": {"path": str(folder / f"{texts}.jsonl")},
        "rounds": rounds,
        "output": str(folder / f"{name}-{texts}"),
    }
    return check_settings(RunSettings, plain, where="benchmark")


def measure(folder: Path, name: str, texts: int, rounds: int, latency: float) -> None:
    """In a process of its own: one run from start to end, then one line of JSON."""
    settings = recipe(folder, name, texts, rounds, latency)
    tokenizer = synthesizer_tokenizer(settings.synthesizer)
    chain = make_chain(settings, tokenizer, run_identity(settings, tokenizer, FileHashCache(folder / "digests.json")))
    used = [time.process_time()]
    work = list_work(settings, tokenizer, chain.fingerprint)
    used.append(time.process_time())
    with open_output(settings.output, {}) as output:
        store = GroupStore(output, work, settings.groups_per_shard)
        engine: Engine
        if name == "canned":
            engine = CannedEngine(tokenizer, settings.synthesizer.max_num_seqs, latency)
        else:
            engine = ScriptedEngine(settings.synthesizer, tokenizer)
        memory = asyncio.run(watched(fill_here(engine, settings, chain, store), store, texts))
        used.append(time.process_time())
        store.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    done = store.counts["texts"]
    print(
        json.dumps(
            {"texts": done, "survey": used[1] - used[0], "fill": used[2] - used[1], "memory": memory, "peak": peak}
        )
    )


async def watched(work: Any, store: GroupStore, texts: int) -> list[tuple[int, float]]:
    """Runs `work`; resident MiB at each tenth of the texts."""
    task, marks = asyncio.ensure_future(work), list[tuple[int, float]]()
    while not task.done():
        await asyncio.wait({task}, timeout=0.2)
        if store.counts["texts"] >= (len(marks) + 1) * texts // 10:
            marks.append((store.counts["texts"], resident()))
    task.result()
    return marks


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(folder: Path, name: str, texts: int, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", name, "--directory", str(folder), "--texts", str(texts)]
    command += ["--rounds", str(arguments.rounds), "--latency", str(arguments.latency)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, nargs="+", default=[20_000], help="sizes of the corpus (default 20000)")
    parser.add_argument("--engines", nargs="+", default=["canned", "scripted"], choices=["canned", "scripted"])
    parser.add_argument("--rounds", type=int, default=2, help="texts a group (default 2)")
    parser.add_argument("--latency", type=float, default=0.3, help="seconds a request takes (default 0.3)")
    parser.add_argument("--directory", type=Path, help="where corpora and groups go, and stay; default a temporary one")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.directory, arguments.measure, arguments.texts[0], arguments.rounds, arguments.latency)
        return
    with tempfile.TemporaryDirectory(prefix="ipt-driver-") as temporary:
        report((arguments.directory or Path(temporary)).resolve(), arguments)


def write_texts(folder: Path, count: int, tokenizer: Tokenizer) -> None:
    """Texts of about 256 tokens; a number in front makes each a text of its own."""
    pool = write_corpus(folder / "pool.jsonl", 1000, 250, 250, tokenizer)
    with (folder / f"{count}.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            row = {"id": str(number), "text": f"{number} {pool[number % len(pool)]}"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def report(folder: Path, arguments: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "tokenizer"
    tokenizer_at = model if model.is_dir() else mistral(model)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {IN_FLIGHT} groups in flight")
    for texts in arguments.texts:
        if not (folder / f"{texts}.jsonl").exists():
            write_texts(folder, texts, load_tokenizer(tokenizer_at))
        for name in arguments.engines:
            found = run(folder, name, texts, arguments)
            assert found["texts"] == texts, found
            print(
                f"{name:8} {texts:,} texts, M = {arguments.rounds}: {texts / found['fill']:,.0f} rounds a CPU second, ",
                end="",
            )
            print(
                f"survey {texts / found['work_list']:,.0f} texts a CPU second; peak {found['peak']:.0f} MiB; resident ",
                end="",
            )
            print(", ".join(f"{done:,}: {size:.0f}" for done, size in found["memory"]), flush=True)


if __name__ == "__main__":
    main()
