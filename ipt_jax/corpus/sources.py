"""The inputs of all stages: which files a path names, their names and identity, the units they are cut into, rows.

A path names a file, a directory, a glob, a URL, the output of a stage or `hf:NAME`; a corpus is a list of such sources.
Formats are those of corpus.text_files and corpus.datasets, shards of Documents, and TFDS. A corpus is cut into units:
byte ranges of plain JSON Lines, row groups of Parquet, record batches of Arrow, complete other files, complete shards,
records of TFDS files, runs of text files. Processes share the units, which depend on the contents and `unit_bytes`
alone. Ids of rows without one are made of the file's name and the row: the name is relative to the path of the source.
"""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import DigestOf, digest, file_digest
from ipt_jax.core.manifest import InputEntry, Inputs, Manifest
from ipt_jax.corpus import datasets
from ipt_jax.corpus.datasets import INFO_FILES
from ipt_jax.corpus.paths import (
    LFS,
    Listing,
    compression,
    contents_digest,
    exists,
    file_name,
    file_size,
    is_remote,
    open_file,
    reading,
)
from ipt_jax.corpus.records import Document, decode
from ipt_jax.corpus.row_reader import Dropped, RowReader, SourceSettings
from ipt_jax.corpus.shards import Shards, read_manifest
from ipt_jax.corpus.text_files import EXPECTED, holds_lines, kind_of, read_range, read_text_file

UNIT_BYTES = 64 << 20
READ_BYTES = 4 << 20
DIGEST_THREADS = 8
Form = Literal["jsonl", "stream", "text", "parquet", "arrow", "shards", "tfds"]


class InputFile(NamedTuple):
    """A file, a directory of shards, or one split of a TFDS directory.

    `name` is its name in ids and manifests; `source` the number of its source; `origin` the default source of its rows.
    """

    path: str
    form: Form
    name: str
    split: str = ""
    source: int = 0
    origin: str = ""


class Unit(NamedTuple):
    """Rows of `file`: bytes [start, stop) of plain JSON Lines, or row groups, record batches, shards or records.

    Row numbers begin after `rows_before` rows of the file (lines for JSON Lines). `size` in bytes is for progress.
    A unit of text files holds `file` and the files of `more`, a row each.
    """

    file: InputFile
    start: int
    stop: int
    rows_before: int
    size: int
    more: tuple[InputFile, ...] = ()

    @property
    def files(self) -> tuple[InputFile, ...]:
        return (self.file, *self.more)


class Located(Protocol):
    """Settings that name an input."""

    @property
    def path(self) -> str: ...
    @property
    def split(self) -> str | None: ...
    @property
    def subset(self) -> str | None: ...


# ---- the files of a source


def find_files(settings: Located, one_set: bool = False) -> list[InputFile]:
    """The files and data sets of an input, sorted. Files that are passed over are reported on stderr.

    `one_set`: files whose names are of several splits are refused unless `split` selects one. Raises UserError if an
    input is missing, has no file of rows, or is of unknown kind.
    """
    path = settings.path
    if path.startswith(datasets.HUB) and not is_remote(path):
        files = datasets.hub_files(path.removeprefix(datasets.HUB), settings.subset, settings.split)
        return [InputFile(str(file), "arrow", file.name) for file in files]
    listing = Listing(path, _directory_form)
    rows = [name for name in listing.names if _is_input(listing.full(name)) and file_name(name) not in INFO_FILES]
    whole = [name for name in rows if _is_directory(listing.full(name))]
    names = [name for name in rows if name not in whole]
    prepared = [name for name in whole if _directory_form(Path(listing.full(name))) == "tfds"]
    if len(prepared) > 1:
        raise UserError(f"input {path}: has {len(prepared)} TFDS data sets; set one of them, such as {prepared[0]}")
    if listing.kind == "file" and not rows and exists(listing.full(listing.names[0])):
        raise UserError(f"input {path}: unknown kind of file; expected {EXPECTED}")
    names = _chosen_files(settings, listing, names, one_set)
    _report_others(listing, {*names, *whole})
    found = [file for name in [*names, *whole] for file in _open_input(listing, name, settings)]
    if not found:
        fault = "no such file" if listing.kind == "file" or not listing.names else f"has no file of rows ({EXPECTED})"
        raise UserError(f"input {path}: {fault}; set a file, a directory, a glob, or the output of a stage")
    order = {name: place for place, name in enumerate(listing.names)}
    return sorted(found, key=lambda file: order.get(file.name, order.get(file.name.rpartition("/")[0], 0)))


def _chosen_files(settings: Located, listing: Listing, names: list[str], one_set: bool) -> list[str]:
    """The files that a card, a clone of the hub or `split` selects; without empty ones beside others."""
    card = "README.md" if listing.kind == "folder" and "README.md" in listing.names else None
    where = settings.path
    if card is not None:
        with reading(where), open_file(listing.full(card)) as file:
            text = file.read().decode("utf-8", "replace")
        if (declared := datasets.card_files(where, text, names, settings.split, settings.subset)) is not None:
            return declared
        one_set = one_set or datasets.FRONT_MATTER.match(text) is not None
    if settings.subset is not None:
        raise UserError(f"input {where}: subset {settings.subset} is only for {datasets.HUB}NAME; remove it")
    if listing.kind == "folder" and (one_set or INFO_FILES & {*listing.names}):
        names, one_set = datasets.clone_files(names), True
    if names:
        names = datasets.files_of_split(where, names, settings.split, one_set)
    return [name for name in names if len(names) == 1 or file_size(listing.full(name)) or kind_of(name) == "txt"]


def _report_others(listing: Listing, used: set[str]) -> None:
    others = [] if listing.kind == "file" else [name for name in listing.names if name not in used]
    if others and used:
        names = f"{others[0]}{', …' if len(others) > 1 else ''}"
        print(f"input {listing.path}: files not read: {len(others)} ({names}); expected {EXPECTED}", file=sys.stderr)


def _directory_form(path: Path) -> str | None:
    if (path / "manifest.json").is_file():
        return "shards"
    return "hf" if datasets.is_hf(path) else "tfds" if datasets.is_tfds(path) else None


def _is_directory(path: str) -> bool:
    return not is_remote(path) and Path(path).is_dir()


def _is_input(path: str) -> bool:
    return _directory_form(Path(path)) is not None if _is_directory(path) else kind_of(path) is not None


def _open_input(listing: Listing, name: str, settings: Located) -> Iterator[InputFile]:
    path = listing.full(name)
    form = _directory_form(Path(path)) if _is_directory(path) else _file_form(path)
    inner = "" if listing.kind == "file" else f"{name}/"
    if form == "hf":
        for file in datasets.hf_files(Path(path), settings.split):
            yield InputFile(str(file), "arrow", f"{inner}{file.name}")
    elif form == "tfds":
        yield InputFile(path, "tfds", name, datasets.tfds_split(Path(path), settings.split))
    elif form == "shards" and settings.split is not None:
        raise UserError(f"input {path}: has no splits, but split is {settings.split}; remove split")
    elif exists(path) or form == "shards":
        yield InputFile(path, form, name)  # type: ignore[arg-type]


def _file_form(path: str) -> Form:
    kind = kind_of(path)
    if kind == "parquet" or kind == "arrow":
        return kind
    if kind == "txt":
        return "text"
    if compression(path) or is_remote(path) and kind == "json":
        return "stream"
    return "jsonl" if kind == "jsonl" or (kind == "json" and holds_lines(path)) else "stream"


# ---- a corpus


class Corpus:
    """The files of one source or of a list of sources, in reading order."""

    def __init__(self, sources: SourceSettings | Sequence[SourceSettings]):
        self.sources = [sources] if isinstance(sources, SourceSettings) else list(sources)
        self.files: list[InputFile] = []
        for number, source in enumerate(self.sources):
            found = [file._replace(source=number, origin=_origin(source.path)) for file in find_files(source)]
            self.files += _distinct(found, {file.name for file in self.files}, source.path)
        self._digests: dict[str, str] = {}

    @property
    def name(self) -> str:
        """Its paths, for messages."""
        return ", ".join(source.path for source in self.sources)

    def source_of(self, unit: Unit) -> SourceSettings:
        return self.sources[unit.file.source]

    def _hash(self, digest_of: DigestOf) -> None:
        with ThreadPoolExecutor(DIGEST_THREADS) as pool:
            contents = pool.map(lambda file: _contents(file, digest_of), self.files)
            self._digests = dict(zip((_key(file) for file in self.files), contents, strict=True))

    def identity(self, digest_of: DigestOf = file_digest) -> Any:
        """The corpus as part of a fingerprint: contents and settings, neither paths nor names nor the order of files.

        An output keeps the names and the order of its start (`restore`).
        """
        self._hash(digest_of)
        each = []
        for number, source in enumerate(self.sources):
            contents = sorted(self._digests[_key(file)] for file in self.files if file.source == number)
            each.append({**source.model_dump(exclude={"path"}), "contents": contents})
        return each[0] if len(each) == 1 else each

    def inputs(self) -> Inputs:
        """The files as a manifest lists them, after `identity`."""
        files = [InputEntry(file.source, file.origin, file.name, self._digests[_key(file)]) for file in self.files]
        return Inputs([source.id_rule for source in self.sources], files)

    def restore(self, manifest: Manifest) -> None:
        """Takes over the names and the order that an output with the same contents was begun with.

        Files that were renamed since then keep their ids.
        """
        if manifest.inputs is msgspec.UNSET:  # of an earlier version
            return
        left: dict[tuple[int, str], list[InputFile]] = {}
        for file in self.files:
            left.setdefault((file.source, self._digests[_key(file)]), []).append(file)
        restored = []
        for entry in manifest.inputs.files:
            same = left[entry.source, entry.contents]
            file = next((one for one in same if one.name == entry.name), same[0])
            same.remove(file)
            restored.append(file._replace(name=entry.name, origin=entry.origin))
        self.files = restored

    def units(self, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
        """The units in reading order. Raises UserError for missing and empty files."""
        units: list[Unit] = []
        for file in self.files:
            with reading(file.path):
                for unit in _units(file, unit_bytes):
                    if units and file.form == "text" and _fits(units[-1], unit, unit_bytes):
                        units[-1] = units[-1]._replace(more=(*units[-1].more, file), size=units[-1].size + unit.size)
                    else:
                        units.append(unit)
        return units


def _key(file: InputFile) -> str:
    return f"{file.source} {file.path} {file.split}"


def _origin(path: str) -> str:
    return file_name(path.removeprefix("hf:")).split(".")[0]


def _distinct(files: list[InputFile], taken: set[str], path: str) -> list[InputFile]:
    """The files of a further source. If an earlier one has a file of the same name, the last parts of the path that
    make all names different come before them."""
    parts = [part for part in path.replace("://", "/").split("/") if part and "*" not in part]
    for count in range(len(parts) + 1):
        before = "".join(f"{part}/" for part in parts[len(parts) - count :])
        if not taken.intersection(before + file.name for file in files):
            return [file._replace(name=before + file.name) for file in files]
    return [file._replace(name=f"{file.source}/{file.name}") for file in files]


def _contents(file: InputFile, digest_of: DigestOf) -> str:
    if file.form == "shards":
        return read_manifest(file.path).fingerprint
    if file.form == "tfds":
        return digest([digest_of(one) for one, _ in datasets.tfds_files(Path(file.path), file.split)])
    return contents_digest(file.path, digest_of)


# ---- units


def _fits(last: Unit, unit: Unit, unit_bytes: int) -> bool:
    return last.file.form == "text" and last.file.source == unit.file.source and last.size + unit.size <= unit_bytes


def _units(file: InputFile, unit_bytes: int) -> Iterator[Unit]:
    if file.form == "shards":
        before = 0
        for index, shard in enumerate(read_manifest(file.path).shards):
            yield Unit(file, index, index + 1, before, shard.bytes)
            before += shard.records
    elif file.form == "tfds":
        yield from _tfds_units(file, unit_bytes)
    else:
        yield from _file_units(file, unit_bytes)


def _file_units(file: InputFile, unit_bytes: int) -> Iterator[Unit]:
    path = file.path
    if not exists(path):
        raise UserError(f"input {path}: no such file, but its data set lists it; download or save the data set again")
    size = file_size(path)
    if size == 0 and file.form != "text":
        raise UserError(f"input {path}: the file is empty; set a file with one record per line")
    if size < 1000:
        with open_file(path) as opened:
            if opened.read(len(LFS)) == LFS:
                raise UserError(f"input {path}: a pointer of Git LFS, not the data; run git lfs pull in its folder")
    if file.form == "jsonl":
        yield from _jsonl_units(file, size, unit_bytes)
    elif file.form in ("stream", "text"):
        yield Unit(file, 0, size, 0, size)
    else:
        parts = datasets.parquet_parts(path) if file.form == "parquet" else datasets.arrow_parts(path, unit_bytes)
        yield from (Unit(file, *part) for part in parts)


def _jsonl_units(file: InputFile, size: int, unit_bytes: int) -> Iterator[Unit]:
    """Ranges of `unit_bytes`, with the number of lines that begin before each. Reads the file once."""
    lines, last = 0, b"\n"
    with open_file(file.path) as opened:
        for start in range(0, size, unit_bytes):
            stop = min(start + unit_bytes, size)
            yield Unit(file, start, stop, lines + (last != b"\n"), stop - start)
            left = stop - start
            while left > 0 and (block := opened.read(min(left, READ_BYTES))):
                lines, last, left = lines + block.count(b"\n"), block[-1:], left - len(block)


def _tfds_units(file: InputFile, unit_bytes: int) -> Iterator[Unit]:
    """Ranges of records of about `unit_bytes` of their file, with rows counted over the split."""
    before = 0
    for one, records in datasets.tfds_files(Path(file.path), file.split):
        size = one.stat().st_size if one.is_file() else 0
        step = max(1, -(-records * unit_bytes // max(size, unit_bytes)))
        for start in range(0, records, step):
            rows = min(step, records - start)
            place = before + start
            yield Unit(file, place, place + rows, place, size * rows // records)
        before += records


# ---- rows


def read_unit(unit: Unit, settings: SourceSettings) -> Iterator[Document | Dropped]:
    """The rows of one unit, in order."""
    for file in unit.files:
        with reading(file.path):
            if file.form == "shards":
                yield from _read_shard(Path(file.path), unit, settings)
                continue
            reader = RowReader(settings, file.name, file.path, row_word(file), file.origin)
            for number, row in _rows(file, unit, settings):
                yield reader.document(row, number)


def row_places(unit: Unit, settings: SourceSettings) -> Iterator[tuple[InputFile, int]]:
    """(file, number in the file) of each row of a unit of files, in order."""
    for file in unit.files:
        yield from ((file, number) for number, _ in _rows(file, unit, settings))


def row_word(file: InputFile) -> str:
    """What the numbers of a file's rows count."""
    return "line" if file.form == "jsonl" or kind_of(file.path) == "jsonl" else "row"


def _rows(file: InputFile, unit: Unit, settings: SourceSettings) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number in its file, row)."""
    path = file.path
    if file.form == "text":
        (_, row), *_ = read_text_file(path, "txt")
        first = settings.fields[0] if settings.template is None else "text"
        return iter([(1, dict.fromkeys([*settings.fields, settings.id_field or "id"]) | {first: row["text"]})])
    if file.form == "stream":
        kind = kind_of(path)
        assert kind is not None, path
        return read_text_file(path, kind)
    if file.form == "jsonl":
        return read_range(path, unit.start, unit.stop, unit.rows_before)
    optional = [*([settings.id_field] if settings.id_field else []), "source"]
    if file.form == "tfds":
        rows = datasets.read_tfds(Path(path), file.split, unit.start, unit.stop)
    elif file.form == "parquet":
        rows = datasets.read_parquet(path, unit.start, unit.stop, settings.fields, optional)
    else:
        rows = datasets.read_arrow(path, unit.start, unit.stop, settings.fields, optional)
    return enumerate(rows, start=unit.rows_before + 1)


def _read_shard(path: Path, unit: Unit, settings: SourceSettings) -> Iterator[Document | Dropped]:
    """Documents of a shard. They have text, id and kind; of the settings, only the bounds of length apply."""
    shards = Shards(path, verify=False)
    longest = settings.max_characters
    for number, record in enumerate(shards.stream(unit.start), start=unit.rows_before + 1):
        where = f"input {shards.paths[unit.start]}: record {number}"
        try:
            document = decode(record, Document)
        except UserError as error:
            raise UserError(
                f"{where} is not a document (made by stage {shards.manifest.stage!r}); set raw text, or the output of "
                "synth collect or synth render"
            ) from error
        if "kind" in settings.model_fields_set and document.kind != settings.kind:
            raise UserError(f"{where} has kind {document.kind}, the recipe sets kind {settings.kind}; remove kind")
        characters = sum(len(segment.text) for segment in document.segments)
        if characters < settings.min_characters:
            yield Dropped("too_short")
        elif longest is not None and characters > longest:
            yield Dropped("too_long")
        else:
            yield document


def read_rows(file: InputFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a file with all its columns, for adapters that choose their fields themselves."""
    with reading(file.path):
        if file.form == "parquet":
            rows = datasets.read_parquet(file.path, 0, datasets.row_groups(file.path), None, [])
            yield from enumerate(rows, start=1)
        elif file.form == "arrow":
            yield from enumerate(datasets.read_arrow(file.path, 0, sys.maxsize, None, []), start=1)
        else:
            kind = kind_of(file.path)
            assert kind is not None, file
            if file_size(file.path) == 0 and kind != "txt":
                raise UserError(f"input {file.path}: the file is empty; set a file with one record per line")
            yield from read_text_file(file.path, kind)
