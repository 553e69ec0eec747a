"""The run of `synth decontaminate`: every input becomes a new directory beside the others, shard by shard.

Guaranteed: the output of an input holds its records in their order, those of groups all, marked, and of documents those
that share no run of words with a benchmark; one shard a shard, or 64 MB of raw text, written whole; a second run goes
on. `removed.jsonl` lists every match. Memory holds the benchmarks and a batch of records. Raw texts come out as
Documents.
"""

import json
import os
import re
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ipt_jax.core.errors import UserError
from ipt_jax.core.executor import run_units
from ipt_jax.core.files import TEMPORARY, sync_directory, writing
from ipt_jax.core.hashing import digest, file_digest
from ipt_jax.core.progress import Progress
from ipt_jax.core.settings import Settings
from ipt_jax.corpus.row_reader import SourceSettings
from ipt_jax.corpus.shards import Output, Shards, load_manifest
from ipt_jax.corpus.sources import plan_units, source_identity
from synth.decontaminate.benchmarks import BenchmarkSettings, read_items
from synth.decontaminate.clean import REMOVED, CleanedUnit, CleanJob, clean_unit, removed_path
from synth.decontaminate.ngram_index import BenchmarkItem, Bounds, NgramIndex
from synth.groups import decode_group

STAGE = "decontaminate"
NAME = re.compile(r"\w[\w.-]*")
KINDS = ("pairs", "texts", "documents")
NEEDLES = f"needles.msgpack{TEMPORARY}"


class DecontaminateInput(SourceSettings):
    """Groups, documents or raw text."""

    name: str | None = None
    """Folder in the output directory. null: the last part of `path`."""

    @property
    def label(self) -> str:
        return self.name or Path(self.path).name.split(".")[0]


class DecontaminateSettings(Settings):
    """The recipe of `synth decontaminate`."""

    inputs: list[DecontaminateInput] = Field(min_length=1)
    """Sources to clean: groups, documents or raw texts."""
    benchmarks: list[BenchmarkSettings] = Field(min_length=1)
    """Benchmarks to look for."""
    ngram: int = Field(13, ge=2, le=1000)
    """Consecutive words that count as a match."""
    shortest: int = Field(4, ge=1)
    """Minimum words of a benchmark item. Shorter items are skipped and counted."""
    workers: int | None = Field(default=None, ge=1)
    """Worker processes. null: one per CPU core."""
    output: str
    """Directory to write, not one of the inputs. It must be empty or hold output of this command, which is resumed."""


def run_decontaminate(settings: DecontaminateSettings) -> dict[str, Any]:
    names = [one.label for one in settings.benchmarks]
    check_names("inputs", [one.label for one in settings.inputs])
    check_names("benchmarks", names)
    check_apart(settings)
    items = [item for number, one in enumerate(settings.benchmarks) for item in read_items(number, one)]
    needles = NgramIndex.build(items, names, Bounds(settings.ngram, min(settings.shortest, settings.ngram)))
    root = Path(settings.output)
    with ExitStack() as stack:
        outputs = [stack.enter_context(open_output(settings, one, items)) for one in settings.inputs]
        with writing(root):
            needles.save(root / NEEDLES)
        try:
            fill(settings, outputs, root / NEEDLES)
        finally:
            (root / NEEDLES).unlink()
        for output in outputs:
            if not output.complete:
                output.finish()
        hit = join_matches(root, outputs)
    return figures(settings, outputs, needles, hit)


def check_names(what: str, names: list[str]) -> None:
    """Names tell inputs and benchmarks apart, and those of inputs are folders."""
    if odd := [name for name in names if not NAME.fullmatch(name)]:
        raise UserError(f"{what}: {odd[0]!r} is no name of letters, digits, dots and dashes; give one with `name`")
    if taken := [name for name in names if name == REMOVED or name.endswith(TEMPORARY)]:
        raise UserError(f"{what}: {taken[0]!r} is a file of the output; give another `name`")
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{what}: two are called {doubled[0]!r}; tell them apart with `name`")


def check_apart(settings: DecontaminateSettings) -> None:
    """The output is empty, or this stage's own, and no input lies in it or around it."""
    root = Path(settings.output)
    for one in settings.inputs:
        here, there = root.resolve(), Path(one.path).resolve()
        if here == there or here in there.parents or there in here.parents:
            raise UserError(f"output {root}: input {one.path} is or holds it, or lies in it; give a directory apart")
    if not root.is_dir():
        return
    ours = {".lock", REMOVED, *(one.label for one in settings.inputs)}
    for path in sorted(root.iterdir()):
        if path.name not in ours and path.suffix != TEMPORARY and not is_own(path):
            raise UserError(f"output {root}: holds {path.name!r}, not of this stage; give an empty directory")


def is_own(path: Path) -> bool:
    """Whether this stage made the folder, of another input."""
    return (path / "manifest.json").is_file() and load_manifest(path).stage == STAGE


def open_output(settings: DecontaminateSettings, source: DecontaminateInput, items: list[BenchmarkItem]) -> Output:
    """The output of one input. What it depends on: contents of the input and words of the benchmarks, by name."""
    words: dict[str, list[Any]] = {one.label: [] for one in settings.benchmarks}
    for item in items:
        words[settings.benchmarks[item.benchmark].label].append([item.id, *item.fields])
    identity = {
        "input": source_identity(SourceSettings(**source.model_dump(exclude={"name"}))),
        "benchmarks": {name: digest(told) for name, told in words.items()},
        **settings.model_dump(include={"ngram", "shortest"}),
    }
    shard_name = "groups" if holds_groups(source) else "documents"
    path = Path(settings.output) / source.label
    return Output(path, stage=STAGE, identity=identity, shard_name=shard_name, remake=True)


def holds_groups(source: DecontaminateInput) -> bool:
    """Whether the input is a directory of SynthGroups, told by its first record."""
    if not (Path(source.path) / "manifest.json").is_file():
        return False
    shards = Shards(source.path)
    if not len(shards):
        return False
    try:
        decode_group(shards[0], shards)
    except UserError:
        return False
    return True


def fill(settings: DecontaminateSettings, outputs: list[Output], needles: Path) -> None:
    """Makes all shards that are missing, of all inputs side by side."""
    jobs: list[CleanJob] = []
    places: list[tuple[Output, int, int]] = []
    done, contents = 0, file_digest(needles)
    for source, output in zip(settings.inputs, outputs, strict=True):
        units = plan_units(source)
        for index, unit in enumerate(units):
            if is_whole(output, index):
                done += unit.size
                continue
            groups, temporary = output.shard_name == "groups", output.temporary(index).absolute()
            jobs.append(CleanJob(unit, source, source.label, groups, temporary, needles.absolute(), contents))
            places.append((output, index, len(units)))
    total = done + sum(job.unit.size for job in jobs)
    with Progress(total >> 20, "MB", "synth decontaminate", done=done >> 20) as progress:
        for place, made in run_units(clean_unit, jobs, workers=settings.workers):
            seal(*places[place], made)
            before, done = done, done + jobs[place].unit.size
            progress.advance((done >> 20) - (before >> 20))


def is_whole(output: Output, index: int) -> bool:
    """Whether a shard is there with its list of matches as it was written; what lost it is made again."""
    if not output.has(index):
        return False
    for name, digest_then in output.entry(index).sides.items():
        path = output.path / name
        if not path.is_file() or file_digest(path) != digest_then:
            print(f"{path}: absent or changed; its shard is made again", file=sys.stderr)
            output.drop(index)
            return False
    return True


def seal(output: Output, index: int, total: int, made: CleanedUnit) -> None:
    """Names the shard and its list of matches; a named shard has its list."""
    name = f"{output.shard_name}-{index:05d}-of-{total:05d}.{REMOVED}"
    with writing(output.path):
        os.replace(removed_path(output.temporary(index)), output.path / name)
        sync_directory(output.path)
    output.seal_file(index, total, made.records, counts=made.counts, dropped=made.dropped, sides={name: made.removed})


def join_matches(root: Path, outputs: list[Output]) -> dict[str, set[str]]:
    """Writes the lists of all shards as one; returns each benchmark's items in it."""
    hit: dict[str, set[str]] = {}
    whole = root / f"{REMOVED}{TEMPORARY}"
    with writing(root), whole.open("wb") as file:
        for output in outputs:
            for entry in output.manifest.shards:
                with (output.path / next(iter(entry.sides))).open("rb") as listing:
                    for line in listing:
                        match = json.loads(line)
                        hit.setdefault(match["benchmark"], set()).add(match["item"])
                        file.write(line)
    os.replace(whole, root / REMOVED)
    return hit


def figures(
    settings: DecontaminateSettings, outputs: list[Output], needles: NgramIndex, hit: dict[str, set[str]]
) -> dict[str, Any]:
    """What `--json` prints. `removed`: pairs, texts and documents that share words with each benchmark, together."""
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for output in outputs:
        counts.update(output.manifest.counts)
        dropped.update(output.manifest.dropped)
    report = {}
    for number, name in enumerate(needles.names):
        items = [place for place, item in enumerate(needles.items) if item.benchmark == number]
        report[name] = {
            "items": len(items),
            "items_hit": len(hit.get(name, ())),
            "too_short": len(set(items) & set(needles.too_short)),
            **{f"{kind}_removed": counts[f"removed.{name}.{kind}"] for kind in KINDS},
        }
    removed = {name: sum(one[f"{kind}_removed"] for kind in KINDS) for name, one in report.items()}
    return {
        **{kind: counts[kind] for kind in KINDS},
        "removed": removed,
        **{f"{kind}_removed": counts[f"{kind}_removed"] for kind in KINDS},
        "benchmarks": report,
        "dropped": dict(sorted(dropped.items())),
        "outputs": {one.label: output.manifest.records for one, output in zip(settings.inputs, outputs, strict=True)},
    }


def show_report(result: dict[str, Any]) -> None:
    """The figures of each benchmark, a line each."""
    columns = list(next(iter(result["benchmarks"].values())))
    table = Table("benchmark", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for name, figures in result["benchmarks"].items():
        table.add_row(Text(name), *(f"{figures[column]:,}" for column in columns))
    Console(highlight=False).print(table)
