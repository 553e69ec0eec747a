"""Golden run: SHA-256 of all deterministic output of a small pipeline, to compare before and after a refactoring.

    python tests/golden.py -o FILE.json          run the pipeline, write {name: hash}
    python tests/golden.py --compare FILE.json   run it, print same or different for each name; exit 1 on a difference

About one minute on two cores. It drives the product through its console commands alone, in this checkout, so that
moved and renamed modules need no change here. What it hashes: every file of every output directory (shards record by
record), the plan, the losses of ten float32 training steps on one CPU device, and an export's tensors. What it leaves
out: times and speeds, lock files, paths.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VOLATILE = {  # facts of one execution, not of what was asked for
    "seconds", "tokens_per_second", "pairs_per_second", "documents_per_second", "texts_per_second", "created", "output",
    "peak_rss_bytes", "date",
}  # fmt: skip
STAMPED = {"digests.json"}  # known by a file's time of change
MODEL = {"preset": "tiny", "layers": 2, "q_heads": 4, "kv_heads": 4, "head_dim": 32, "intermediate_size": 256}
TOKENIZER = "world/tokenizer"
ENGINE = {
    "model": TOKENIZER,
    "engine": "scripted",
    "max_model_len": 1024,
    "max_new_tokens": 300,
    "max_num_seqs": 8,
    "faults": {"malformed": 0.1, "truncated": 0.05},
}
CORPUS = {"path": "world/raw/articles.jsonl", "source": "world"}
TEXT_SCORES = (
    "grounded quoted located question_grounded entities polarity answer_type unrepeated language combined options"
)


def render(epoch: int) -> dict[str, Any]:
    return {
        "groups": "verified",
        "layouts": {"text_first": 0.4, "questions_first": 0.2, "dialogue": 0.2, "numbered": 0.1, "few_shot": 0.1},
        "one_shot": 0.3,
        "keep": "grounded >= 0.3 or located >= 0.5",
        "epoch": epoch,
        "output": f"augmented{epoch}",
    }


def tokenize(inputs: list[dict[str, Any]], output: str) -> dict[str, Any]:
    return {"inputs": inputs, "tokenizer": TOKENIZER, "output": f"tokens/{output}"}


RECIPES: dict[str, dict[str, Any]] = {
    "collect": {
        "inputs": [{"path": "world/tuning"}],
        "max_contexts": 1000,
        "exclude": ["gazette_choice"],
        "few_shot": {"tokenizer": TOKENIZER, "max_tokens": 512},
        "output": "tuning",
    },
    "run": {"synthesizer": ENGINE, "corpus": CORPUS, "rounds": 2, "groups_per_shard": 50, "output": "groups"},
    "mine": {
        "corpus": CORPUS,
        "patterns": "cloze title definition connective summary words paraphrase completion".split(),
        "rounds": 3,
        "output": "mined",
    },
    "verify": {"groups": "groups", "scores": TEXT_SCORES.split(), "output": "verified"},
    "render0": render(0),
    "render1": render(1),
    "decontaminate": {
        "inputs": [{"path": "verified"}, {"path": "augmented0"}, CORPUS],
        "benchmarks": [{"path": "world/raw/heldout.jsonl", "fields": ["text"]}],
        "ngram": 5,
        "output": "clean",
    },
    "tokenize_raw": tokenize([{"path": "world/raw", "source": "world"}], "raw"),
    "tokenize_tuning": tokenize([{"path": "tuning"}], "tuning"),
    "tokenize_augmented": tokenize([{"path": "augmented0"}, {"path": "augmented1"}], "augmented"),
    "train": {
        "model": MODEL,
        "data": {
            "seq_len": 128,
            "packing": "best_fit",
            "cross_document": "block",
            "tokens": 9600,
            "sources": [
                {"name": "raw", "path": "tokens/raw", "exclude_converted": "augmented", "share": 0.4},
                {"name": "augmented", "path": "tokens/augmented", "share": 0.4},
                {"name": "tuning", "path": "tokens/tuning", "share": 0.2},
            ],
        },
        "train": {"batch_tokens": 1024, "compute_dtype": "float32", "log_every": 1, "checkpoint_every": 5},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 3},
        "run_dir": "run",
    },
}
COMMANDS: list[list[str]] = [
    "synth miniworld -o world --articles 240 --tuning-articles 1500".split(),
    "synth collect collect.yaml".split(),
    "synth run run.yaml".split(),
    "synth mine mine.yaml".split(),
    "synth verify verify.yaml".split(),
    "synth render render0.yaml".split(),
    "synth render render1.yaml".split(),
    "synth decontaminate decontaminate.yaml".split(),
    "ipt tokenize tokenize_raw.yaml".split(),
    "ipt tokenize tokenize_tuning.yaml".split(),
    "ipt tokenize tokenize_augmented.yaml".split(),
    "ipt plan train.yaml".split(),
    ["ipt", "plan", "train.yaml", "data.packing=concat", "data.cross_document=allow"],
    "ipt show train.yaml --rows 6 -o rows.html".split(),
    "synth inspect verified -o groups.html".split(),
    "ipt train train.yaml".split(),
    "ipt export run -o model".split(),
    "ipt eval run --tasks world/heldout/recall.jsonl --limit 8".split(),
]
SPEEDS = ("mfu", "goodput", "peak_memory_bytes")
DIRECTORIES = "world tuning groups mined verified augmented0 augmented1 clean tokens model".split()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def command(folder: Path, words: list[str]) -> dict[str, Any]:
    """Runs one console command of this checkout in `folder`; what it prints as JSON."""
    package = {"ipt": "ipt_jax", "synth": "synth"}[words[0]]
    code = f"from {package}.cli import main; main()"
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    env.pop("JAX_NUM_CPU_DEVICES", None)
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *words[1:], "--json"], cwd=folder, env=env, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr.decode()[-4000:]}")
    print(f"{time.monotonic() - begun:6.1f} s  {' '.join(words)}", file=sys.stderr, flush=True)
    return json.loads(done.stdout)


def steady(value: Any) -> Any:
    """A JSON value without times, speeds and paths."""
    if isinstance(value, dict):
        return {name: steady(inner) for name, inner in value.items() if name not in VOLATILE}
    return [steady(inner) for inner in value] if isinstance(value, list) else value


def canonical(value: Any) -> bytes:
    return json.dumps(steady(value), sort_keys=True).encode()


def shard_hash(path: Path) -> str:
    """Over the records, in order."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    total = hashlib.sha256()
    for record in reader.read(0, reader.num_records()) if reader.num_records() else []:
        total.update(len(record).to_bytes(8, "little") + record)
    return total.hexdigest()


def json_hash(path: Path) -> str:
    return sha256(canonical(json.loads(path.read_bytes())))


def directory_hashes(folder: Path, name: str) -> dict[str, str]:
    """Of every file under `folder`/`name`: {path: hash}."""
    kinds: dict[str, Callable[[Path], str]] = {".array_record": shard_hash, ".json": json_hash}
    found = {}
    for path in sorted((folder / name).rglob("*")):
        if path.is_file() and not path.name.startswith(".") and path.name not in STAMPED:
            read = kinds.get(path.suffix, lambda path: sha256(path.read_bytes()))
            found[path.relative_to(folder).as_posix()] = read(path)
    return found


def golden(folder: Path) -> dict[str, str]:
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    found = {}
    for number, words in enumerate(COMMANDS):
        found[f"stdout {number:02} {' '.join(words)}"] = sha256(canonical(command(folder, words)))
    for name in DIRECTORIES:
        found |= directory_hashes(folder, name)
    for page in ("rows.html", "groups.html"):
        found[page] = sha256((folder / page).read_bytes())
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 10, f"{len(lines)} steps instead of ten"
    for line in lines:
        losses = {name: value for name, value in line.items() if "second" not in name and name not in SPEEDS}
        found[f"run/metrics step {line['step']}"] = sha256(canonical(losses))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--keep", type=Path, help="run in this empty directory and keep it")
    options = parser.parse_args()
    if (options.output is None) == (options.compare is None):
        parser.error("give -o FILE.json or --compare FILE.json")
    expected = json.loads(options.compare.read_text()) if options.compare else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = golden(folder)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{len(found)} hashes in {options.output}")
        return
    different = 0
    for name in sorted(found.keys() | expected.keys()):
        same = found.get(name) == expected.get(name)
        different += not same
        print(f"{'same     ' if same else 'DIFFERENT'}  {name}")
    print(f"{different} of {len(found.keys() | expected.keys())} different")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
