"""`ipt tokenize`: documents in, shards of TokenDocuments out.

One unit of the input (see corpus.sources) becomes one shard, written by a worker process under a temporary name and
sealed by the parent, so that a run again makes only what is missing, and the number of workers changes no byte.

A document's segments are tokenized one by one: the first text of an example as a text's start, later ones as going on
from it, so that a prompt's tokens are a prefix of the training row's. Control tokens come from control segments; a
document without any gets BOS and EOS as its input says. Every text token, and the EOS, is a target where its segment
says so; BOS never is. Documents that share an id are kept and counted (`duplicate_ids`): ids are names, not keys, and
only `exclude_converted` needs them unique.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from ipt_jax.corpus.executor import run_units
from ipt_jax.corpus.progress import Progress
from ipt_jax.corpus.records import Document, Segment, TokenDocument, encode
from ipt_jax.corpus.settings import Settings, UserError
from ipt_jax.corpus.shards import Manifest, Output, write_shard, writing
from ipt_jax.corpus.sources import UNIT_BYTES, Dropped, SourceSettings, Unit, plan_units, read_unit, source_identity
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from ipt_jax.data.lengths import SideFiles, name_side_files, read_index, side_digests, whole

STAGE = "tokenize"
SHARD = "tokens"


class InputSettings(SourceSettings):
    """One input of `ipt tokenize`: `bos` and `eos` wrap each document that has no control segments of its own."""

    bos: bool = True
    eos: bool = True


class TokenizeSettings(Settings):
    """The recipe of `ipt tokenize`. `unit_bytes` of JSON Lines make one shard, the grain of sharing and resuming."""

    inputs: list[InputSettings] = Field(min_length=1)
    tokenizer: str
    output: str
    executor: Literal["local", "ray"] = "local"
    workers: int | None = Field(default=None, gt=0)
    unit_bytes: int = Field(default=UNIT_BYTES, gt=0)


class Job(NamedTuple):
    """What a worker needs to write one shard."""

    unit: Unit
    source: InputSettings
    tokenizer: str
    temporary: Path


class Made(NamedTuple):
    """What a worker says about the shard that it wrote."""

    records: int
    tokens: int
    counts: dict[str, int]
    dropped: dict[str, int]


def run_tokenize(settings: TokenizeSettings) -> dict[str, Any]:
    """Writes the shards of `settings.output`; finished ones are kept. Returns what `--json` prints."""
    tokenizer = load_tokenizer(settings.tokenizer)
    _check_controls(settings, tokenizer)
    units = [(unit, source) for source in settings.inputs for unit in plan_units(source, settings.unit_bytes)]
    started, made_tokens = time.monotonic(), 0
    with Output(settings.output, stage=STAGE, identity=_identity(settings, tokenizer), shard_name=SHARD) as output:
        todo = [i for i in range(len(units)) if not (output.has(i) and whole(output.path, output.entry(i)))]
        if todo or not output.complete:
            jobs = [Job(*units[i], settings.tokenizer, output.temporary(i)) for i in todo]
            made_tokens = _make_shards(settings, output, todo, jobs, total=len(units))
            manifest = _finish(output, tokenizer)
        else:
            manifest = output.manifest
    seconds = time.monotonic() - started
    return {
        "documents": manifest.records,
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
        "tokenizer": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "inputs": [source_identity(source) for source in settings.inputs],
        "unit_bytes": settings.unit_bytes,
    }


def _make_shards(settings: TokenizeSettings, output: Output, todo: list[int], jobs: list[Job], *, total: int) -> int:
    """Tokenizes the units that are missing; returns the tokens made."""
    tokens = 0
    done = total - len(todo)
    with Progress(total, "shards", "ipt tokenize", done=done) as progress:
        results = run_units(tokenize_unit, jobs, workers=settings.workers, executor=settings.executor)
        for place, made in results:
            index = todo[place]
            with writing(output.path):
                name_side_files(jobs[place].temporary, _shard_name(index, total))
            output.seal_file(index, total, made.records, tokens=made.tokens, counts=made.counts, dropped=made.dropped)
            tokens += made.tokens
            progress.advance(1, tokens=tokens)
    return tokens


def _shard_name(index: int, total: int) -> str:
    return f"{SHARD}-{index:05d}-of-{total:05d}.array_record"


def _finish(output: Output, tokenizer: Tokenizer) -> Manifest:
    """Adds the tokenizer's files and what planning wants to know, and marks the directory complete."""
    if output.manifest.records == 0:
        raise UserError(
            f"output {output.path}: no document is left (dropped {output.manifest.dropped}); mend the inputs"
        )
    with writing(output.path):
        (output.path / "tokenizer").mkdir(exist_ok=True)
        for file in tokenizer.files():
            shutil.copyfile(file, output.path / "tokenizer" / file.name)
    summary = {"side_files": side_digests(output.path, output.manifest)}
    output.manifest.summary = summary
    ids = np.concatenate([index["id"] for index in read_index(output.path, output.manifest)])
    return output.finish(summary | {"duplicate_ids": int(len(ids) - len(np.unique(ids)))})


def tokenize_unit(job: Job) -> Made:
    """Writes the shard of one unit and its side files, under temporary names. Runs in a worker process."""
    tokenizer = _open_tokenizer(job.tokenizer)
    side, counts, dropped = SideFiles(), Counter[str](), Counter[str]()
    with writing(job.temporary.parent):
        records = write_shard(job.temporary, _records(job, tokenizer, side, counts, dropped))
        side.write(job.temporary)
    tokens = counts.pop("tokens", 0)
    return Made(records, tokens, dict(counts), dict(dropped))


@lru_cache(maxsize=1)
def _open_tokenizer(path: str) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    return load_tokenizer(path)


def _records(
    job: Job, tokenizer: Tokenizer, side: SideFiles, counts: Counter[str], dropped: Counter[str]
) -> Iterator[bytes]:
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    for document in read_unit(job.unit, job.source):
        if isinstance(document, Dropped):
            dropped[document.reason] += 1
            continue
        if not document.text.strip():
            dropped["empty_text"] += 1
            continue
        row = tokenize_document(document, tokenizer, bos=job.source.bos, eos=job.source.eos)
        if not row.ids:
            dropped["no_token"] += 1
            continue
        ends = np.array(row.ends) if document.kind == "raw" else None
        side.add(document.id, len(row.ids), ends, document.parents)
        counts[document.kind] += 1
        counts["tokens"] += len(row.ids)
        tokens = np.array(row.ids, np.dtype(dtype).newbyteorder("<")).tobytes()
        yield encode(
            TokenDocument(document.id, document.kind, dtype, tokens, row.loss_runs, document.parents, document.source)
        )


class TokenRow(NamedTuple):
    """Ids, the ranges of them that are targets, and (raw documents) the character position where each token ends."""

    ids: list[int]
    loss_runs: list[tuple[int, int]]
    ends: list[int]


def tokenize_document(document: Document, tokenizer: Tokenizer, *, bos: bool = True, eos: bool = True) -> TokenRow:
    """The tokens of one document. `bos` and `eos` act only where the document has no control segment."""
    segments = document.segments
    if not any(segment.control for segment in segments):
        segments = [Segment(control="bos")] * bos + segments + [Segment(control="eos")] * eos
    row, continuing, position = TokenRow([], [], []), False, 0
    for segment in segments:
        start = len(row.ids)
        if segment.control:
            row.ids.append(_control_id(segment.control, tokenizer, document))
            row.ends.append(position)
            continuing = segment.control == "eos"
        elif segment.text:
            ids, ends = _encode(segment.text, tokenizer, continuing=continuing, raw=document.kind == "raw")
            row.ids.extend(ids)
            row.ends.extend([position + end for end in ends] if position else ends)
            position += len(segment.text)
            continuing = True
        if segment.loss and segment.control != "bos":
            _add_run(row.loss_runs, start, len(row.ids))
    return row


def _encode(text: str, tokenizer: Tokenizer, *, continuing: bool, raw: bool) -> tuple[list[int], list[int]]:
    """Ids and character ends. Only a raw document's first segment needs ends within the segment."""
    if raw and not continuing:
        return tokenizer.char_ends(text)
    ids = tokenizer.encode(text, continuing=continuing)
    return ids, [len(text)] * len(ids)


def _control_id(control: str, tokenizer: Tokenizer, document: Document) -> int:
    found = tokenizer.bos_id if control == "bos" else tokenizer.eos_id
    if found is None:
        raise UserError(
            f"document {document.id!r} holds a {control} control, but the tokenizer has none; give one that has"
        )
    return found


def _add_run(runs: list[tuple[int, int]], start: int, stop: int) -> None:
    if start == stop:
        return
    if runs and runs[-1][1] == start:
        runs[-1] = (runs[-1][0], stop)
    else:
        runs.append((start, stop))
