"""Kill runs of `synth run` at random moments and check that no group is missing, duplicated or incomplete.

    python benchmarks/kills.py --engine scripted --kills 30     SIGKILL, rerun; byte-identical to an undisturbed run
    python benchmarks/kills.py --engine vllm --kills 5          the same with the real vLLM on this machine's CPU
    python benchmarks/kills.py --ray --kills 3                  SIGKILL of an actor in a run, which continues
    python benchmarks/kills.py --ray --engine vllm --kills 1    the same with a vLLM in each of two actors
    python benchmarks/kills.py --engine openai --kills 1        SIGKILL of a real vLLM server, restarted after 5 s

The model is the random one of `walking_model.py`: 19M parameters, pairs in the right format. Every kill comes after new
groups were stored, so that the next one finds other work. Exits with code 1 if anything is wrong. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import psutil
from walking_model import write_tokenizer, write_walking_model

from synth import read_groups

WORDS = "the river runs past an old mill where bread is made and sold to people from towns on both sides".split()
ROUNDS = 2
TEXTS = {"scripted": 400, "vllm": 80, "openai": 200}  # a kill; enough that no run is over before its kill
LONGEST_WAIT = 3.0  # seconds from new groups to the kill
AWAY = 5.0  # seconds that a killed server stays away
COMMAND = [sys.executable, "-c", "from synth.cli import main; main()", "run"]
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def write_corpus(path: Path, texts: int, rng: Random) -> None:
    with path.open("w") as file:
        for number in range(texts):
            text = " ".join(rng.choices(WORDS, k=rng.randint(20, 90))).capitalize() + "."
            file.write(json.dumps({"id": f"t{number}", "text": text}) + "\n")


def write_recipe(folder: Path, name: str, **changes: Any) -> list[str]:
    """The command of a run whose recipe and output bear the name."""
    synthesizer = {"model": str(folder / "model"), "max_model_len": 1024, "max_new_tokens": 100, "max_num_seqs": 16}
    synthesizer |= changes.pop("synthesizer")
    plain = {
        "synthesizer": synthesizer,
        "corpus": {"path": str(folder / "corpus.jsonl")},
        "rounds": ROUNDS,
        "output": str(folder / name),
        **changes,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(plain))
    return [*COMMAND, str(folder / f"{name}.yaml"), "--json"]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**QUIET, **os.environ})


def journals(output: Path) -> dict[str, int]:
    """Bytes in each journal. One that is sealed meanwhile is skipped."""
    sizes = {}
    for file in output.glob("spool/*.spool"):
        with suppress(FileNotFoundError):
            sizes[file.name] = file.stat().st_size
    return sizes


def stored(output: Path) -> str:
    return f"{len([*output.glob('*.array_record')])} shards and {sum(journals(output).values()):,} bytes stored"


def wait_for_work(process: subprocess.Popen[bytes], output: Path, log: Path, rng: Random) -> None:
    """Returns at a random moment after new groups were stored. Exits when the run is over before that."""
    before = journals(output)
    while all(size <= before.get(name, 0) for name, size in journals(output).items()):
        still_runs(process, log)
        time.sleep(0.01)
    time.sleep(rng.uniform(0, LONGEST_WAIT))
    still_runs(process, log)


def still_runs(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        sys.exit(f"the run ended with {process.returncode} before its kill:\n{log.read_text()[-2000:]}")


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and, after its end, for its remaining children."""
    parent = psutil.Process(pid)
    tree = [parent, *parent.children(recursive=True)]
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(tree, timeout=20)


def kill_runs(command: list[str], output: Path, log: Path, kills: int, rng: Random) -> None:
    """Starts the run, kills its first process alone, and so on; what an engine has started must then end by itself."""
    for number in range(kills):
        process = start(command, log)
        wait_for_work(process, output, log, rng)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, left = psutil.wait_procs(children, timeout=20)
        print(f"kill {number + 1}: {stored(output)}, {len(children)} child processes, {len(left)} remaining")
        if left:
            sys.exit(f"processes outlived their run: {left}")
    finish(start(command, log), log)


def kill_actors(command: list[str], output: Path, log: Path, kills: int, rng: Random) -> None:
    process = start(command, log)
    for number in range(kills):
        wait_for_work(process, output, log, rng)
        actors = [one for one in psutil.Process(process.pid).children(recursive=True) if is_actor(one)]
        rng.choice(actors).kill()
        print(f"kill {number + 1}: {stored(output)}, one of {len(actors)} actors")
    finish(process, log)


def is_actor(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline()).startswith("ray::Worker")
    return False


def kill_server(command: list[str], output: Path, log: Path, kills: int, rng: Random, server: Server) -> None:
    process = start(command, log)
    for number in range(kills):
        wait_for_work(process, output, log, rng)
        server.kill()
        print(f"kill {number + 1}: {stored(output)}; the server is away for {AWAY:g} s and its start")
        time.sleep(AWAY)
        server.start()
    finish(process, log)


class Server:
    """A real vLLM server of the model in `folder`, on a free port of this machine alone."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = folder / "server.log"
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
        self.command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(self.port)]
        self.command += ["--enforce-eager", "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16"]
        self.command += ["--skip-tokenizer-init", "--enable-prompt-tokens-details"]

    def start(self) -> None:
        begun = time.monotonic()
        self.process = start(self.command, self.log)
        while True:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                break
            still_runs(self.process, self.log)
            time.sleep(0.2)
        print(f"server: up after {time.monotonic() - begun:.0f} s")

    def kill(self) -> None:
        kill_tree(self.process.pid)
        self.process.wait()


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.wait() != 0:
        sys.exit(f"the run ended with {process.returncode}:\n{log.read_text()[-2000:]}")


def check(folder: Path, texts: int) -> dict[str, int]:
    """What is wrong with the output, by kind. Reading it compares every checksum."""
    output = folder / "killed"
    groups = list(read_groups(output))
    ids = Counter(text.raw_id for group in groups for text in group.texts)
    found = {
        "groups": len(groups),
        "missing": sum(f"t{number}" not in ids for number in range(texts)),
        "doubled": sum(ids.values()) - len(ids) + len(groups) - len({group.id for group in groups}),
        "half-written": sum(len(group.texts) != ROUNDS for group in groups),
        "failed": sum(text.finish_reason not in ("stop", "length") for group in groups for text in group.texts),
        "left over": len([*output.glob("*.tmp"), *output.glob("spool/*")]),
    }
    if (folder / "undisturbed").exists():
        ours, theirs = ({p.name: p.read_bytes() for p in one.glob("*.array_record")} for one in undisturbed_and(folder))
        found["files that differ"] = sum(ours.get(name) != theirs.get(name) for name in ours.keys() | theirs.keys())
    return found


def undisturbed_and(folder: Path) -> tuple[Path, Path]:
    return folder / "undisturbed", folder / "killed"


def play(arguments: argparse.Namespace, folder: Path) -> dict[str, int]:
    rng, engine = Random(arguments.seed), arguments.engine
    texts = TEXTS[engine] * (arguments.kills + 1)
    write_corpus(folder / "corpus.jsonl", texts, rng)
    write_tokenizer(folder / "model") if engine == "scripted" else write_walking_model(folder / "model")
    output, log = folder / "killed", folder / "run.log"
    shards: dict[str, Any] = {"groups_per_shard": max(texts // ROUNDS // 12, 1)}
    synthesizer: dict[str, Any] = {"engine": engine}
    kill: Callable[..., None] = kill_runs
    if engine == "scripted":
        finish(start(write_recipe(folder, "undisturbed", synthesizer=synthesizer, **shards), log), log)
        synthesizer["faults"] = {"latency_seconds": 0.1}
    if arguments.ray:
        kill, shards["executor"] = kill_actors, "ray"
    server = Server(folder)
    if engine == "openai":
        synthesizer["server"] = f"http://127.0.0.1:{server.port}/v1"
        server.start()
    command = write_recipe(folder, "killed", synthesizer=synthesizer, **shards)
    try:
        if engine == "openai":
            kill_server(command, output, log, arguments.kills, rng, server)
        else:
            kill(command, output, log, arguments.kills, rng)
    finally:
        if engine == "openai":
            server.kill()
    print("".join(line for line in log.open() if "lost engine" in line or "server http" in line), end="")
    return check(folder, texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=list(TEXTS), default="scripted")
    parser.add_argument("--ray", action="store_true", help="kill actors of executor: ray")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a server is ended too
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ipt-kills-") as folder:
        found = play(arguments, Path(folder))
    where = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{arguments.kills} kills in {time.monotonic() - begun:.0f} s ({where})")
    print(", ".join(f"{name} {count:,}" for name, count in found.items()))
    sys.exit(any(count for name, count in found.items() if name != "groups"))


if __name__ == "__main__":
    main()
