"""benchmarks/restart.py [--texts 40000000] [--measured 1000000] [--folder DIR]

Cost of starting `synth run` by the size of its corpus.

1. Unit costs, on real files: `--measured` texts of 2,000 bytes are written, and a tenth of them. One process each makes
   their work list (seconds, peak memory, size on disk), and hashes the files.
2. The scripted engine makes a shard of 10,000 groups of such texts: bytes per group, in the journal, sealed, and in the
   manifest.
3. A restart at `--texts` texts. Simulated: the corpus (sparse files with rows only where the run reads), its digests,
   the work list (by arithmetic, which is first compared with a real list of `--measured` / 10 texts), the finished
   shards, all but two (sparse files of the right size, listed in a real manifest), and nine tenths of the journal of
   the next (groups of part 2). Real: everything that runs. `synth run` with the scripted engine resumes, is killed with
   SIGKILL, and is restarted three times. Each process prints the time of its first request, counted from its own start,
   and its peak memory.

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from ipt_jax.core.hashing import CachedHashes, FileHashCache, digest
from ipt_jax.core.manifest import SCHEMA, Manifest, ShardEntry
from ipt_jax.core.settings import check_settings
from ipt_jax.corpus.shards import Shards
from ipt_jax.corpus.tokenizer import load_tokenizer
from synth.config import RunSettings
from synth.engine.base import GenerationRequest
from synth.engine.scripted import ScriptedEngine
from synth.generate.journal import HEADER, Journal
from synth.generate.run import WORK, run_identity, run_synth
from synth.generate.work_list import UNIT_BYTES, ListedUnit, Place, Shard, WorkList, list_work, save_work
from synth.miniworld.write import write_tokenizer

ROW = 2000  # bytes of a line
FILE_ROWS = 500_000
ROUNDS, GROUPS = 2, 10_000
SHARD_TEXTS = ROUNDS * GROUPS
GROUP_BYTES = 2500  # of a sealed record, compressed; only the sizes of sparse files follow from it


def row(number: int) -> bytes:
    """Row `number` of the corpus, of exactly ROW bytes, with a text of some 330 words."""
    head = f'{{"id": "t{number:010d}", "text": "'
    words = f"In year {number % 1900} the mill at weir {number % 97} ground oats for the town and {number % 31} farms. "
    return (head + (words * 30)[: ROW - len(head) - 4] + '."}\n').encode()


def file_name(first: int) -> str:
    return f"{first // FILE_ROWS:05d}.jsonl"


def write_corpus(folder: Path, texts: int) -> None:
    folder.mkdir()
    for first in range(0, texts, FILE_ROWS):
        with (folder / file_name(first)).open("wb") as file:
            file.writelines(map(row, range(first, min(first + FILE_ROWS, texts))))


def write_sparse_corpus(folder: Path, texts: int, real: range) -> None:
    """Files of the right length, with rows in `real` alone."""
    folder.mkdir()
    for first in range(0, texts, FILE_ROWS):
        rows = min(FILE_ROWS, texts - first)
        with (folder / file_name(first)).open("wb") as file:
            file.truncate(rows * ROW)
            inside = range(max(first, real.start), min(first + rows, real.stop))
            file.seek(max(0, inside.start - first) * ROW)
            file.writelines(map(row, inside))


def made_up_list(texts: int, fingerprint: str) -> WorkList:
    """The work list of a corpus of rows of equal length, without a look at it."""
    units: list[ListedUnit] = []
    first_rows: list[int] = []
    for file, first in enumerate(range(0, texts, FILE_ROWS)):
        size = min(FILE_ROWS, texts - first) * ROW
        for start in range(0, size, UNIT_BYTES):
            stop, before = min(start + UNIT_BYTES, size), -(-start // ROW)
            units.append(ListedUnit(file, "jsonl", start, stop, before, stop - start))
            first_rows.append(first + before)
    shards, unit = [], 0
    for first in range(0, texts, SHARD_TEXTS):
        while unit + 1 < len(units) and first_rows[unit + 1] <= first:
            unit += 1
        count = min(SHARD_TEXTS, texts - first)
        shards.append(Shard(Place(unit, first - first_rows[unit], 0), count, -(-count // ROUNDS)))
    names = [file_name(first) for first in range(0, texts, FILE_ROWS)]
    return WorkList(fingerprint, texts, -(-texts // ROUNDS), {}, names, units, shards)


def settings(folder: Path, corpus: str, latency: float) -> RunSettings:
    recipe = {
        "synthesizer": {
            "model": str(folder / "model"),
            "engine": "scripted",
            "max_num_seqs": 256,
            "faults": {"latency_seconds": latency},
        },
        "corpus": {"path": str(folder / corpus)},
        "rounds": ROUNDS,
        "groups_per_shard": GROUPS,
        "output": str(folder / f"groups-{corpus}"),
    }
    return check_settings(RunSettings, recipe, where="benchmark")


def in_a_process(task: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, "--task", task, *arguments], stdout=subprocess.PIPE)


def answer(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    output, _ = process.communicate()
    assert process.returncode == 0, process.args
    return dict(json.loads(output.splitlines()[-1]))


def peak_mib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


# ---- tasks of the processes


def time_list(folder: Path, corpus: str) -> dict[str, Any]:
    """Seconds and memory of a first pass. CPU seconds, because the machine may be shared."""
    run = settings(folder, corpus, 0.0)
    tokenizer = load_tokenizer(run.synthesizer.model)
    before, started = peak_mib(), time.process_time()
    work = list_work(run, tokenizer, "f")
    seconds = time.process_time() - started
    save_work(folder / f"{corpus}.list", work)
    size = (folder / f"{corpus}.list").stat().st_size
    return {
        "texts": work.texts,
        "cpu_seconds": round(seconds, 2),
        "microseconds_a_text": round(1e6 * seconds / work.texts, 2),
        "peak_mib": peak_mib(),
        "peak_mib_before": before,
        "list_bytes": size,
    }


def time_digests(folder: Path, corpus: str) -> dict[str, Any]:
    run = settings(folder, corpus, 0.0)
    started = time.process_time()
    known = FileHashCache(folder / f"{corpus}.digests")
    run_identity(run, load_tokenizer(run.synthesizer.model), known)
    size = sum(file.stat().st_size for file in (folder / corpus).iterdir())
    seconds = time.process_time() - started
    return {"bytes": size, "cpu_seconds": round(seconds, 2), "mb_a_second": round(size / seconds / 1e6)}


def time_records(folder: Path, corpus: str) -> dict[str, Any]:
    """One shard, made and sealed. The scripted engine's own work is in the seconds."""
    run = settings(folder, corpus, 0.0)
    started = time.process_time()
    result = run_synth(run)
    seconds = time.process_time() - started
    shards = Shards(run.output)
    return {
        "groups": result["groups"],
        "pairs_a_text": round(result["pairs"] / result["texts"], 2),
        "cpu_milliseconds_a_group": round(1000 * seconds / result["groups"], 2),
        "spool_bytes_a_group": round(sum(len(record) + HEADER.size for record in shards) / len(shards)),
        "sealed_bytes_a_group": round(sum(entry.bytes for entry in shards.manifest.shards) / len(shards)),
        "manifest_bytes": (shards.path / "manifest.json").stat().st_size,
        "peak_mib": peak_mib(),
    }


def run_until_first_request(folder: Path, corpus: str, leave: bool) -> dict[str, Any]:
    """`synth run`; at its first request the time since the process began is printed, and with `leave` it ends there."""
    ask = ScriptedEngine.generate

    async def generate(self: ScriptedEngine, request: GenerationRequest) -> Any:
        if ScriptedEngine.generate is generate:
            ScriptedEngine.generate = ask  # type: ignore[method-assign]
            born = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
            alive = time.clock_gettime(time.CLOCK_BOOTTIME) - born
            cpu = time.process_time()
            print(
                json.dumps({"seconds": round(alive, 2), "cpu_seconds": round(cpu, 2), "peak_mib": peak_mib()}),
                flush=True,
            )
            if leave:
                os._exit(0)
        return await ask(self, request)

    ScriptedEngine.generate = generate  # type: ignore[method-assign]
    return run_synth(settings(folder, corpus, 0.02))


# ---- the restart


def make_up(folder: Path, texts: int) -> dict[str, Any]:
    """The state of a run near its end: two shards are open, and of the first all groups but a tenth are spooled."""
    shards = -(-texts // SHARD_TEXTS)
    current = max(0, shards - 2)
    rows = range(max(0, current * SHARD_TEXTS - 2 * UNIT_BYTES // ROW), texts)
    write_sparse_corpus(folder / "sparse", texts, rows)
    run = settings(folder, "sparse", 0.02)
    output = Path(run.output)
    (output / WORK).mkdir(parents=True)
    known = FileHashCache(output / WORK / "digests.json")
    for file in sorted((folder / "sparse").iterdir()):
        state = file.stat()
        name = f"{file.name} {state.st_ino} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
        known._known[name] = digest(file.name)  # made up
    (output / WORK / "digests.json").write_bytes(msgspec.json.encode(CachedHashes(known._known, digest(known._known))))
    identity = run_identity(run, load_tokenizer(run.synthesizer.model), known)
    save_work(output / WORK / "list.json", made_up_list(texts, digest(identity)))
    manifest = Manifest(SCHEMA, "synth", digest(identity), identity)
    names = ("texts", "pairs", "prompt_tokens", "cached_prompt_tokens", "completion_tokens", "finished.stop")
    for shard in range(current):
        name, size = f"groups-{shard:05d}-of-{shards:05d}.array_record", GROUPS * GROUP_BYTES + shard
        with (output / name).open("wb") as file:
            file.truncate(size)
        counts = {"groups": GROUPS, **{name: 10_000_000 + shard for name in names}}
        manifest.shards.append(ShardEntry(name, GROUPS, 0, size, digest(name), counts, {"no_room": 3}))
    manifest.checksum = manifest.digest()
    (output / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    journal = Journal(output / "spool" / f"{current:05d}.spool")
    records = list(Shards(folder / "groups-shard"))
    for place in range(min(GROUPS, texts // ROUNDS) * 9 // 10):
        journal.append(place, records[place % len(records)])
    journal.close()
    return {
        "texts": texts,
        "corpus_bytes": texts * ROW,
        "corpus_files": -(-texts // FILE_ROWS),
        "shards": shards,
        "shards_done": current,
        "manifest_bytes": (output / "manifest.json").stat().st_size,
        "work_list_bytes": (output / WORK / "list.json").stat().st_size,
    }


def kill_and_restart(folder: Path, run_seconds: float) -> dict[str, Any]:
    victim = in_a_process("run", str(folder), "sparse")
    assert victim.stdout is not None
    first = json.loads(victim.stdout.readline())
    time.sleep(run_seconds)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    held = sum(journal.stat().st_size for journal in (folder / "groups-sparse" / "spool").iterdir())
    again = [answer(in_a_process("restart", str(folder), "sparse")) for _ in range(3)]
    again.sort(key=lambda one: one["seconds"])
    return {"first_start": first, "spool_bytes_at_kill": held, "restarts": again, "restart_median": again[1]}


def measure(folder: Path, texts: int, measured: int, run_seconds: float) -> dict[str, Any]:
    words = (row(number).decode() for number in range(0, 2000, 7))
    write_tokenizer(words, 2000, folder / "model")
    result: dict[str, Any] = {"lists": [], "digests": None}
    for count, name in ((measured // 10, "tenth"), (measured, "whole")):
        write_corpus(folder / name, count)
        result["lists"].append(answer(in_a_process("list", str(folder), name)))
    result["digests"] = answer(in_a_process("digests", str(folder), "whole"))
    write_corpus(folder / "shard", min(measured, SHARD_TEXTS))
    result["records"] = answer(in_a_process("records", str(folder), "shard"))
    real = msgspec.json.decode((folder / "tenth.list").read_bytes(), type=WorkList)
    made = made_up_list(measured // 10, "f")
    assert msgspec.structs.replace(real, checksum="") == made, "the made-up list is not what a real pass makes"
    shutil.rmtree(folder / "whole")
    result["restart"] = {**make_up(folder, texts), **kill_and_restart(folder, run_seconds)}
    return result


TASKS = {
    "list": time_list,
    "digests": time_digests,
    "records": time_records,
    "run": lambda folder, corpus: run_until_first_request(folder, corpus, False),
    "restart": lambda folder, corpus: run_until_first_request(folder, corpus, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=40_000_000)
    parser.add_argument("--measured", type=int, default=1_000_000)
    parser.add_argument("--run-seconds", type=float, default=20.0, help="how long the first run lives")
    parser.add_argument("--folder", help="where to work; a temporary folder by default")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        folder, corpus = given.arguments
        print(json.dumps(TASKS[given.task](Path(folder), corpus)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        print(json.dumps(measure(Path(folder), given.texts, given.measured, given.run_seconds), indent=1))


if __name__ == "__main__":
    main()
