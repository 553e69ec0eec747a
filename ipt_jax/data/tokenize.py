"""`ipt tokenize`: documents in, shards of their tokens out, page by page.

One unit of the input (see corpus.sources) becomes one shard, written by a worker process under a temporary name and
sealed by the parent, so that a run again makes only what is missing, and the number of workers changes no byte. A run
again also compares what is there with its checksums: a shard that is damaged is named and made again.

Documents that share an id are kept and counted (`duplicate_ids`): ids are names, not keys, and only `exclude_converted`
needs them unique. Documents that share their whole text drop out where `drop_duplicates` says so.
"""

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from ipt_jax.core.errors import UserError
from ipt_jax.core.executor import run_units
from ipt_jax.core.files import writing
from ipt_jax.core.progress import Progress
from ipt_jax.core.settings import Settings
from ipt_jax.corpus.records import Document, TokenDocument
from ipt_jax.corpus.row_reader import SourceSettings
from ipt_jax.corpus.shards import Manifest, Output
from ipt_jax.corpus.sources import UNIT_BYTES, Unit, plan_units, read_unit, source_identity
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from ipt_jax.data.duplicates import find_duplicates, usable
from ipt_jax.data.encode import token_dtype, tokenize_documents
from ipt_jax.data.token_index import (
    document_count,
    index_damage,
    index_digests,
    index_names,
    name_index_files,
    read_index,
)
from ipt_jax.data.token_shards import RECORDS, Written, write_token_shard

STAGE = "tokenize"
SHARD = "tokens"
BATCH_CHARACTERS = 1 << 18  # text that is tokenized at a time: large enough for speed, small enough for memory
IDS_A_PASS = 1 << 23  # 64 MiB of keys


class TokenizeInput(SourceSettings):
    """One input of `ipt tokenize`."""

    bos: bool = True
    """Add BOS before each document that has no control tokens of its own."""
    eos: bool = True
    """Add EOS after each document that has no control tokens of its own."""


class TokenizeSettings(Settings):
    """The recipe of `ipt tokenize`."""

    inputs: list[TokenizeInput] = Field(min_length=1)
    """Sources to tokenize."""
    tokenizer: str
    """Directory or file of the tokenizer: tokenizer.json, or tokenizer.model of SentencePiece."""
    output: str
    """Directory to write. It must be empty or hold output of the same recipe, which is resumed."""
    drop_duplicates: bool = False
    """Keep only the first of documents with identical text, over all inputs."""
    executor: Literal["local", "ray"] = "local"
    """Where workers run. ray: on the cluster at RAY_ADDRESS."""
    workers: int | None = Field(default=None, gt=0)
    """Worker processes. null: one per CPU core."""
    unit_bytes: int = Field(default=UNIT_BYTES, gt=0)
    """Input bytes per output shard. A shard is the unit of parallel work and of resumption."""


class TokenizeJob(NamedTuple):
    """What a worker needs to write one shard. `duplicates`: numbers of the unit's usable documents that drop out."""

    unit: Unit
    source: TokenizeInput
    tokenizer: str
    temporary: Path
    duplicates: np.ndarray | None


class TokenizedUnit(NamedTuple):
    """What a worker says about the shard that it wrote."""

    records: int
    tokens: int
    counts: dict[str, int]
    dropped: dict[str, int]
    sides: dict[str, str]


def run_tokenize(settings: TokenizeSettings) -> dict[str, Any]:
    """Writes the shards of `settings.output`; whole ones are kept. Returns what `--json` prints."""
    tokenizer = load_tokenizer(settings.tokenizer)
    _check_controls(settings, tokenizer)
    units = [(unit, source) for source in settings.inputs for unit in plan_units(source, settings.unit_bytes)]
    if settings.executor == "ray":  # a worker on another machine starts in another folder
        units = [(unit._replace(path=str(Path(unit.path).absolute())), source) for unit, source in units]
    started, made_tokens = time.monotonic(), 0
    identity = _identity(settings, tokenizer)
    with Output(settings.output, stage=STAGE, identity=identity, shard_name=SHARD, remake=True) as output:
        todo = [index for index in range(len(units)) if not _whole(output, index)]
        if todo or not output.complete:
            made_tokens = _make_shards(settings, output, units, todo)
            manifest = _finish(output, tokenizer)
        else:
            manifest = output.manifest
    seconds = time.monotonic() - started
    return {
        "documents": document_count(manifest),
        "tokens": manifest.tokens,
        "dropped": manifest.dropped,
        "tokens_per_second": round(made_tokens / seconds, 1),
        "kinds": manifest.counts,
        "duplicate_ids": manifest.summary["duplicate_ids"],
        "shards": len(manifest.shards),
        "output": settings.output,
    }


def _check_controls(settings: TokenizeSettings, tokenizer: Tokenizer) -> None:
    for source in settings.inputs:
        for name, wanted, found in (("bos", source.bos, tokenizer.bos_id), ("eos", source.eos, tokenizer.eos_id)):
            if wanted and found is None:
                raise UserError(
                    f"tokenizer {settings.tokenizer}: has no {name.upper()}, which input {source.path} puts around "
                    f"each document; set {name}: false there, or give another tokenizer"
                )


def _identity(settings: TokenizeSettings, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "records": RECORDS,
        "tokenizer": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "inputs": [source_identity(source) for source in settings.inputs],
        "drop_duplicates": settings.drop_duplicates,
        "unit_bytes": settings.unit_bytes,
    }


def _whole(output: Output, index: int) -> bool:
    """Whether shard `index` is there with its side files as they were written. One that is damaged is named."""
    if not output.has(index):
        return False
    found = index_damage(output.path, output.entry(index))
    if found:
        print(f"{found}; it is made again", file=sys.stderr)
        output.drop(index)
    return found is None


def _make_shards(
    settings: TokenizeSettings, output: Output, units: list[tuple[Unit, TokenizeInput]], todo: list[int]
) -> int:
    """Tokenizes the units that are missing; returns the tokens made."""
    total, tokens, read = len(units), 0, 0
    duplicates = _duplicates(settings, units)
    tokenizer = str(Path(settings.tokenizer).absolute())
    jobs = [TokenizeJob(*units[i], tokenizer, output.temporary(i).absolute(), duplicates[i]) for i in todo]
    weight = sum(job.unit.size for job in jobs)
    with Progress(None, "tokens", "ipt tokenize") as progress:
        results = run_units(tokenize_unit, jobs, workers=settings.workers, executor=settings.executor)
        for done, (place, made) in enumerate(results, start=total - len(todo) + 1):
            index, name = todo[place], f"{SHARD}-{todo[place]:05d}-of-{total:05d}.array_record"
            with writing(output.path):
                name_index_files(output.temporary(index), name)
            output.seal_file(
                index,
                total,
                made.records,
                tokens=made.tokens,
                counts=made.counts,
                dropped=made.dropped,
                sides=index_names(name, made.sides),
            )
            tokens, read = tokens + made.tokens, read + jobs[place].unit.size
            progress.expect(tokens * weight // max(read, 1))
            progress.advance(made.tokens, shards=f"{done:,}/{total:,}")
    return tokens


def _duplicates(settings: TokenizeSettings, units: list[tuple[Unit, TokenizeInput]]) -> list[np.ndarray | None]:
    """For each unit the numbers of its usable documents that drop out."""
    if not settings.drop_duplicates:
        return [None] * len(units)
    return list(find_duplicates(units, workers=settings.workers, executor=settings.executor))


def _finish(output: Output, tokenizer: Tokenizer) -> Manifest:
    """Adds the tokenizer's files and what planning wants to know, and marks the directory complete."""
    if output.manifest.records == 0:
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in output.manifest.dropped.items())
        for index, entry in enumerate(output.manifest.shards):  # nothing stays that would refuse a mended recipe
            for name in (entry.name, *entry.sides):
                (output.path / name).unlink()
            output.drop(index)
        raise UserError(f"output {output.path}: no document is left (dropped: {dropped}); mend the inputs or filters")
    with writing(output.path):
        (output.path / "tokenizer").mkdir(exist_ok=True)
        for file in tokenizer.files():
            shutil.copyfile(file, output.path / "tokenizer" / file.name)
    summary = {"side_files": index_digests(output.manifest)}
    output.manifest.summary = summary
    return output.finish(summary | {"duplicate_ids": _duplicate_ids(output)})


def _duplicate_ids(output: Output) -> int:
    """Documents whose id stood before, counted in passes over a part of the ids each: memory does not grow."""
    passes = -(-document_count(output.manifest) // IDS_A_PASS)
    count = 0
    for number in range(passes):
        indexes = read_index(output.path, output.manifest)
        ids = np.concatenate([index["id"][index["id"] % np.uint64(passes) == number] for index in indexes])
        ids.sort()
        count += int((ids[1:] == ids[:-1]).sum())
    return count


def tokenize_unit(job: TokenizeJob) -> TokenizedUnit:
    """Writes the shard of one unit and its side files, under temporary names. Runs in a worker process."""
    tokenizer = _open_tokenizer(job.tokenizer)
    counts, dropped = Counter[str](), Counter[str]()
    with writing(job.temporary.parent):
        records, sides = write_token_shard(job.temporary, _written(job, tokenizer, counts, dropped))
    tokens = counts.pop("tokens", 0)
    return TokenizedUnit(records, tokens, dict(counts), dict(dropped), sides)


@lru_cache(maxsize=1)
def _open_tokenizer(path: str) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    return load_tokenizer(path)


def _written(job: TokenizeJob, tokenizer: Tokenizer, counts: Counter[str], dropped: Counter[str]) -> Iterator[Written]:
    dtype = token_dtype(tokenizer)
    little_endian = np.dtype(dtype).newbyteorder("<")
    for batch in _batches(job, dropped):
        rows = tokenize_documents(batch, tokenizer, bos=job.source.bos, eos=job.source.eos)
        for document, row in zip(batch, rows, strict=True):
            if not len(row.tokens):
                dropped["no_token"] += 1
                continue
            counts[document.kind] += 1
            counts["tokens"] += len(row.tokens)
            data = row.tokens.astype(little_endian, copy=False).tobytes()
            made = TokenDocument(
                document.id, document.kind, dtype, data, row.loss_runs, document.parents, document.source
            )
            yield Written(made, row.characters)


def _batches(job: TokenizeJob, dropped: Counter[str]) -> Iterator[list[Document]]:
    """The unit's documents that are to be tokenized, some BATCH_CHARACTERS of text at a time."""
    batch: list[Document] = []
    characters = 0
    for document in _kept(job, dropped):
        batch.append(document)
        characters += sum(len(segment.text) for segment in document.segments)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _kept(job: TokenizeJob, dropped: Counter[str]) -> Iterator[Document]:
    duplicates = set() if job.duplicates is None else set(job.duplicates.tolist())
    for number, document in enumerate(usable(read_unit(job.unit, job.source), dropped)):
        if number in duplicates:
            dropped["duplicate"] += 1
        else:
            yield document
