"""`ipt tokenize`: writes token shards of documents.

Each unit of the input (see corpus.sources) is one shard. A rerun makes the missing shards, and the shards that are
damaged. Rows that share an id are refused (corpus.duplicates). Documents of a stage that share one, such as those of
several epochs, are kept and counted (`duplicate_ids`): only `exclude_converted` needs unique ids. `drop_duplicates`
drops all but the first document with a text, over all inputs.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from ipt_jax.core.errors import UserError
from ipt_jax.core.executor import ExecutorName
from ipt_jax.core.files import writing
from ipt_jax.core.settings import PathText, Settings
from ipt_jax.core.stage import UNPACKED, NewShard, Output, make_shards
from ipt_jax.corpus.duplicates import find_duplicates, read_once
from ipt_jax.corpus.paths import is_remote
from ipt_jax.corpus.records import Document, TokenDocument
from ipt_jax.corpus.row_reader import Dropped, OneOrMore, SourceSettings
from ipt_jax.corpus.sources import UNIT_BYTES, Corpus, InputFile, Unit
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from ipt_jax.data.encode import token_dtype, tokenize_documents
from ipt_jax.data.token_index import document_count, index_digests, read_index
from ipt_jax.data.token_shards import RECORDS, Written, token_pages

BATCH_CHARACTERS = 1 << 18  # text that is tokenized at a time: large enough for speed, small enough for memory
IDS_PER_PASS = 1 << 23  # 64 MiB of keys


class TokenizeInput(SourceSettings):
    """One input of `ipt tokenize`."""

    bos: bool = True
    """Add BOS before each document that has no control tokens of its own."""
    eos: bool = True
    """Add EOS after each document that has no control tokens of its own."""


class TokenizeSettings(Settings):
    """The recipe of `ipt tokenize`."""

    inputs: Annotated[list[TokenizeInput], OneOrMore] = Field(min_length=1)
    """Sources to tokenize."""
    tokenizer: PathText
    """Directory or file of the tokenizer: tokenizer.json, or tokenizer.model of SentencePiece."""
    output: PathText
    """Directory to write. It must be empty or hold output of the same recipe, which is resumed."""
    drop_duplicates: bool = False
    """Keep only the first of documents with identical text, over all inputs."""
    executor: ExecutorName = "local"
    """Where workers run. ray: on the cluster at RAY_ADDRESS."""
    workers: int | None = Field(default=None, gt=0)
    """Worker processes. null: one per CPU core."""
    unit_bytes: int = Field(default=UNIT_BYTES, gt=0)
    """Input bytes per output shard. A shard is the unit of parallel work and of resumption."""


class TokenizeItem(NamedTuple):
    """The input of one shard. `duplicates`: rows to drop."""

    unit: Unit
    source: TokenizeInput
    duplicates: list[int]


def run_tokenize(settings: TokenizeSettings) -> dict[str, Any]:
    """Makes the missing shards of `settings.output` and returns what `--json` prints."""
    tokenizer = load_tokenizer(settings.tokenizer)
    _check_controls(settings, tokenizer)
    corpus = Corpus(settings.inputs)
    started = time.monotonic()
    contents = corpus.identity()
    identity = {
        "records": RECORDS,
        "tokenizer": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "inputs": contents if isinstance(contents, list) else [contents],
        **settings.model_dump(include={"drop_duplicates", "unit_bytes"}),
    }
    output = Output(
        settings.output, stage="tokenize", identity=identity, shard_name="tokens", remake=True, inputs=corpus.inputs()
    )
    with output:
        kept_tokens = output.manifest.tokens
        if not output.manifest.complete:
            corpus.restore(output.manifest)
            make_shards(
                partial(_token_records, str(Path(settings.tokenizer).absolute())),
                [(output, _items(settings, corpus))],
                lambda item: item.unit.size / 2**20,
                unit="MB",
                label="ipt tokenize",
                workers=settings.workers,
                executor=settings.executor,
                options=UNPACKED,
            )
            output.refuse_empty(f"output {output.path}: every document was dropped", "correct the inputs or filters")
            _finish(output, tokenizer)
    manifest = output.manifest
    return {
        "documents": document_count(manifest),
        "tokens": manifest.tokens,
        "dropped": manifest.dropped,
        "tokens_per_second": round((manifest.tokens - kept_tokens) / (time.monotonic() - started), 1),
        "kinds": manifest.counts,
        "duplicate_ids": manifest.summary["duplicate_ids"],
        "shards": len(manifest.shards),
        "output": settings.output,
    }


def _check_controls(settings: TokenizeSettings, tokenizer: Tokenizer) -> None:
    for source in settings.inputs:
        for name, added, found in (("bos", source.bos, tokenizer.bos_id), ("eos", source.eos, tokenizer.eos_id)):
            if added and found is None:
                raise UserError(
                    f"tokenizer {settings.tokenizer}: has no {name.upper()}, which input {source.path} adds to "
                    f"each document; set {name}: false there, or set another tokenizer"
                )


def _items(settings: TokenizeSettings, corpus: Corpus) -> list[TokenizeItem]:
    units = corpus.units(settings.unit_bytes)
    if settings.executor == "ray":  # a worker on another machine starts in another directory
        units = [unit._replace(file=_absolute(unit.file), more=tuple(map(_absolute, unit.more))) for unit in units]
    found = find_duplicates(
        corpus,
        units,
        drop=settings.drop_duplicates,
        workers=settings.workers,
        executor=settings.executor,
        label="ipt tokenize",
    )
    sources = [settings.inputs[unit.file.source] for unit in units]
    return [TokenizeItem(*one, found.texts.get(n, [])) for n, one in enumerate(zip(units, sources, strict=True))]


def _absolute(file: InputFile) -> InputFile:
    return file if is_remote(file.path) else file._replace(path=str(Path(file.path).absolute()))


def _finish(output: Output, tokenizer: Tokenizer) -> None:
    """Adds the tokenizer's files and what planning reads, and marks the directory complete."""
    with writing(output.path):
        tokenizer.save(output.path / "tokenizer")
    output.manifest.summary = summary = {"side_files": index_digests(output.manifest)}
    output.finish(summary | {"duplicate_ids": _duplicate_ids(output)})


def _duplicate_ids(output: Output) -> int:
    """Documents whose id an earlier document has. Each pass counts a part of the ids, so memory is bounded."""
    passes = -(-document_count(output.manifest) // IDS_PER_PASS)
    count = 0
    for number in range(passes):
        indexes = read_index(output.path, output.manifest)
        ids = np.concatenate([index["id"][index["id"] % np.uint64(passes) == number] for index in indexes])
        ids.sort()
        count += int((ids[1:] == ids[:-1]).sum())
    return count


# ---- in a worker process


def _usable(item: TokenizeItem, dropped: Counter[str]) -> Iterator[Document]:
    """The documents with text. Others are counted by reason."""
    for row in read_once(item.unit, item.source, item.duplicates):
        if isinstance(row, Dropped):
            dropped[row.reason] += 1
        elif not any(segment.text and not segment.text.isspace() for segment in row.segments):
            dropped["empty_text"] += 1
        else:
            yield row


def _token_records(tokenizer: str, item: TokenizeItem, shard: NewShard) -> Iterator[bytes]:
    return token_pages(_token_documents(item, _open_tokenizer(tokenizer), shard), shard)


@lru_cache(maxsize=1)
def _open_tokenizer(path: str) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    return load_tokenizer(path)


def _token_documents(item: TokenizeItem, tokenizer: Tokenizer, shard: NewShard) -> Iterator[Written]:
    dtype = token_dtype(tokenizer.vocab_size)
    little_endian = np.dtype(dtype).newbyteorder("<")
    for batch in _batches(item, shard):
        rows = tokenize_documents(batch, tokenizer, bos=item.source.bos, eos=item.source.eos)
        for document, row in zip(batch, rows, strict=True):
            if not len(row.tokens):
                shard.dropped["no_token"] += 1
                continue
            shard.counts[document.kind] += 1
            shard.tokens += len(row.tokens)
            data = row.tokens.astype(little_endian, copy=False).tobytes()
            tokens = TokenDocument(
                document.id, document.kind, dtype, data, row.loss_runs, document.parents, document.source
            )
            yield Written(tokens, row.characters)


def _batches(item: TokenizeItem, shard: NewShard) -> Iterator[list[Document]]:
    """The documents to tokenize, in batches of about BATCH_CHARACTERS."""
    batch: list[Document] = []
    characters = 0
    for document in _usable(item, shard.dropped):
        batch.append(document)
        characters += sum(len(segment.text) for segment in document.segments)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
