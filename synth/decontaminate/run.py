"""`synth decontaminate`: copies each input into a directory of its own, without overlap with benchmarks.

Guarantees:
- Groups are all kept, in order. Pairs and texts that share a run of words with a benchmark are marked.
- Documents that share a run of words with a benchmark are dropped, the others are kept in order. Raw texts are written
  as Documents.
- One output shard per input shard, or per 64 MB of raw text.
- `removed.jsonl` lists every match.
- Memory holds the benchmarks and one batch of records.
"""

import json
import os
import re
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import TEMPORARY, writing
from ipt_jax.core.hashing import digest, file_digest
from ipt_jax.core.manifest import load_manifest
from ipt_jax.core.settings import PathText, Settings
from ipt_jax.core.stage import Output, make_shards, sum_counts
from ipt_jax.corpus.duplicates import find_duplicates
from ipt_jax.corpus.records import SynthGroup
from ipt_jax.corpus.row_reader import OneOrMore, SourceSettings
from ipt_jax.corpus.shards import Shards
from ipt_jax.corpus.sources import Corpus
from synth.decontaminate.benchmarks import BenchmarkSettings, read_items
from synth.decontaminate.clean import REMOVED, CleanItem, clean_records
from synth.decontaminate.ngram_index import BenchmarkItem, NgramIndex
from synth.groups import decode_group

STAGE = "decontaminate"
NAME = re.compile(r"\w[\w.-]*")
KINDS = ("pairs", "texts", "documents")
NEEDLES = f"needles.msgpack{TEMPORARY}"


class DecontaminateInput(SourceSettings):
    """Groups, documents or raw texts."""

    name: str | None = None
    """Folder in the output directory. null: the last part of `path`."""

    @property
    def label(self) -> str:
        return self.name or Path(self.path).name.split(".")[0]


class DecontaminateSettings(Settings):
    """The recipe of `synth decontaminate`."""

    inputs: Annotated[list[DecontaminateInput], OneOrMore] = Field(min_length=1)
    """Sources to clean: groups, documents or raw texts."""
    benchmarks: Annotated[list[BenchmarkSettings], OneOrMore] = Field(min_length=1)
    """Benchmarks to compare with."""
    ngram: int = Field(13, ge=2, le=1000)
    """Consecutive words that count as a match."""
    shortest: int = Field(4, ge=1)
    """Minimum words of a benchmark item. Shorter items are skipped and counted."""
    workers: int | None = Field(default=None, ge=1)
    """Worker processes. null: one per CPU core."""
    output: PathText
    """Directory to write, not one of the inputs. It must be empty or hold output of this command, which is resumed."""


def run_decontaminate(settings: DecontaminateSettings) -> dict[str, Any]:
    """Makes the missing shards of every input and returns what `--json` prints."""
    names = [one.label for one in settings.benchmarks]
    check_names("inputs", [one.label for one in settings.inputs])
    check_names("benchmarks", names)
    check_directories(settings)
    items = [item for number, one in enumerate(settings.benchmarks) for item in read_items(number, one)]
    needles = NgramIndex.build(items, names, settings.ngram, settings.shortest)
    root = Path(settings.output)
    with ExitStack() as stack:
        corpora = [
            Corpus(SourceSettings(**one.model_dump(exclude={"name"}, exclude_unset=True))) for one in settings.inputs
        ]
        outputs = [
            stack.enter_context(open_output(settings, one, corpus, items))
            for one, corpus in zip(settings.inputs, corpora, strict=True)
        ]
        work = [
            (output, clean_items(settings, one, corpus, output))
            for one, corpus, output in zip(settings.inputs, corpora, outputs, strict=True)
        ]
        file = (root / NEEDLES).absolute()
        with writing(root):
            needles.save(file)
        try:
            make_shards(
                partial(clean_records, file, file_digest(file)),
                work,
                lambda item: item.unit.size / 2**20,
                unit="MB",
                label="synth decontaminate",
                workers=settings.workers,
            )
        finally:
            file.unlink()
        for output in outputs:
            output.finish()
        matched = join_matches(root, outputs)
    return summary(settings, outputs, needles, matched)


def check_names(what: str, names: list[str]) -> None:
    """Names identify inputs and benchmarks. Those of inputs are directories of the output."""
    if odd := [name for name in names if not NAME.fullmatch(name)]:
        raise UserError(f"{what}: {odd[0]!r} has other characters than letters, digits, dots and dashes; set `name`")
    if taken := [name for name in names if name == REMOVED or name.endswith(TEMPORARY)]:
        raise UserError(f"{what}: {taken[0]!r} is a file of the output; set another `name`")
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{what}: duplicate name {doubled[0]!r}; set a different `name` for one of them")


def check_directories(settings: DecontaminateSettings) -> None:
    """Raises UserError if an input overlaps with the output, or if the output holds files of another origin."""
    root = Path(settings.output)
    for one in settings.inputs:
        here, there = root.resolve(), Path(one.path).resolve()
        if here == there or here in there.parents or there in here.parents:
            raise UserError(f"output {root}: overlaps with input {one.path}; set a separate directory")
    if not root.is_dir():
        return
    ours = {".lock", REMOVED, *(one.label for one in settings.inputs)}
    for path in sorted(root.iterdir()):
        if path.name in ours or path.suffix == TEMPORARY:
            continue
        if not (path / "manifest.json").is_file() or load_manifest(path).stage != STAGE:
            raise UserError(f"output {root}: holds {path.name!r}, not of this stage; set an empty directory")


def clean_items(
    settings: DecontaminateSettings, source: DecontaminateInput, corpus: Corpus, output: Output
) -> list[CleanItem]:
    """What each shard of an input is made of."""
    corpus.restore(output.manifest)
    units = corpus.units()
    found = find_duplicates(corpus, units, drop=False, workers=settings.workers, label="synth decontaminate")
    groups = output.shard_name == "groups"
    return [
        CleanItem(unit, source, source.label, groups, found.texts.get(number, [])) for number, unit in enumerate(units)
    ]


def open_output(
    settings: DecontaminateSettings, source: DecontaminateInput, corpus: Corpus, items: list[BenchmarkItem]
) -> Output:
    """The output of one input, identified by the contents of the input and the words of the benchmarks."""
    words: dict[str, list[Any]] = {one.label: [] for one in settings.benchmarks}
    for item in items:
        words[settings.benchmarks[item.benchmark].label].append([item.id, *item.fields])
    identity = {
        "input": corpus.identity(),
        "benchmarks": {name: digest(listed) for name, listed in words.items()},
        **settings.model_dump(include={"ngram", "shortest"}),
    }
    shard_name = "groups" if holds_groups(source) else "documents"
    path = Path(settings.output) / source.label
    inputs = corpus.inputs()
    return Output(path, stage=STAGE, identity=identity, shard_name=shard_name, remake=True, inputs=inputs)


def holds_groups(source: DecontaminateInput) -> bool:
    """Whether the first record of the input is a SynthGroup."""
    if not (Path(source.path) / "manifest.json").is_file():
        return False
    shards = Shards(source.path)
    try:
        return len(shards) > 0 and isinstance(decode_group(shards[0], shards), SynthGroup)
    except UserError:
        return False


def join_matches(root: Path, outputs: list[Output]) -> dict[str, set[str]]:
    """Joins the lists of all shards into one file. Returns the matched items of each benchmark."""
    matched: dict[str, set[str]] = {}
    joined = root / f"{REMOVED}{TEMPORARY}"
    with writing(root), joined.open("wb") as file:
        for output in outputs:
            for entry in output.manifest.shards:
                with (output.path / next(iter(entry.side_files))).open("rb") as listing:
                    for line in listing:
                        match = json.loads(line)
                        matched.setdefault(match["benchmark"], set()).add(match["item"])
                        file.write(line)
    os.replace(joined, root / REMOVED)
    return matched


def summary(
    settings: DecontaminateSettings, outputs: list[Output], needles: NgramIndex, matched: dict[str, set[str]]
) -> dict[str, Any]:
    """`removed`: pairs, texts and documents that share words with each benchmark, together."""
    counts = Counter(sum_counts(output.manifest.counts for output in outputs))
    report = {}
    for number, name in enumerate(needles.names):
        items = {place for place, item in enumerate(needles.items) if item.benchmark == number}
        report[name] = {
            "items": len(items),
            "items_hit": len(matched.get(name, ())),
            "too_short": len(items.intersection(needles.too_short)),
            **{f"{kind}_removed": counts[f"removed.{name}.{kind}"] for kind in KINDS},
        }
    return {
        **{kind: counts[kind] for kind in KINDS},
        "removed": {name: sum(one[f"{kind}_removed"] for kind in KINDS) for name, one in report.items()},
        **{f"{kind}_removed": counts[f"{kind}_removed"] for kind in KINDS},
        "benchmarks": report,
        "dropped": sum_counts(output.manifest.dropped for output in outputs),
        "outputs": {one.label: output.manifest.records for one, output in zip(settings.inputs, outputs, strict=True)},
    }


def show_report(result: dict[str, Any]) -> None:
    """Prints one line of figures per benchmark."""
    columns = list(next(iter(result["benchmarks"].values())))
    table = Table("benchmark", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for name, figures in result["benchmarks"].items():
        table.add_row(Text(name), *(f"{figures[column]:,}" for column in columns))
    Console(highlight=False).print(table)
