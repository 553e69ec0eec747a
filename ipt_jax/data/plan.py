"""The plan of a run's data: the mixture, the order and the packing, decided before training starts.

Guarantees: the row at (step, slot) is a pure function of the plan, so resuming needs the step alone, and any number of
hosts sees the same global batches. The fingerprint covers the contents of the sources, the amounts, the order and the
packing. Memory grows with blocks of documents, not with documents: lengths and tokens are read when a row is read.

A run may change its amounts or batch size at a step. The rows before that step keep their place, each source continues
its sequence of documents where they left it, and the full run gives exactly the new amounts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import digest
from ipt_jax.core.manifest import Manifest
from ipt_jax.corpus.records import KINDS
from ipt_jax.corpus.shards import Shards
from ipt_jax.data.block_table import SourceDocuments, contents, open_documents
from ipt_jax.data.encode import token_dtype
from ipt_jax.data.held_out import HeldOut, Role
from ipt_jax.data.mixture import DataSettings, SourceMix, check_sources, solve_mix
from ipt_jax.data.packing import CHUNK_ROWS, PIECE, BestFit, Concat, Packing, render
from ipt_jax.data.shuffle import MergedOrder, Stream
from ipt_jax.data.token_reader import FOUND, FoundDocuments, TokenReader
from ipt_jax.data.token_shards import open_token_shards

PLAN_VERSION = 3  # incremented when the same settings give other rows
MANY_EPOCHS = 16  # of one source: above, a plan warns
FEW_FACTS = 0.05  # share of augmented text: below, a plan warns. The critical share depends on the model's size.
MANY_INSTRUCTIONS = 0.3  # share of instructions and tuning data without augmented text: above, a plan warns


@dataclass(frozen=True)
class Source:
    """One source of the mix: its directory and documents. `converted`: contents of the source whose parents are
    excluded. `held_out`: the documents that training leaves out for validation."""

    settings: SourceMix
    path: Path
    manifest: Manifest
    documents: SourceDocuments
    converted: str | None = None
    held_out: SourceDocuments | None = None

    @property
    def kind(self) -> str:
        """The kinds of document that it holds, joined by `+`."""
        return "+".join(kind for kind in KINDS if self.manifest.counts.get(kind))


@dataclass(frozen=True)
class Mix:
    """Sources of a recipe, opened, and the tokens that each gives in the full run."""

    settings: DataSettings
    sources: list[Source]
    amounts: list[int]

    @property
    def vocab_size(self) -> int:
        return int(self.sources[0].manifest.identity["vocab_size"])

    @property
    def tokenizer_dir(self) -> Path:
        return self.sources[0].path / "tokenizer"

    def identity(self, rows_per_step: int) -> dict[str, Any]:
        """What the fingerprint of a plan covers, by field, so that an error can name the field that changed."""
        sources = [
            {
                "name": source.settings.name,
                "contents": contents(source.manifest),
                "converted": source.converted,
                "tokens": amount,
            }
            for source, amount in zip(self.sources, self.amounts, strict=True)
        ]
        names = ("seq_len", "packing", "seed") + ("held_out_share",) * (self.settings.held_out_share is not None)
        settings = {name: getattr(self.settings, name) for name in names}
        return settings | {
            "version": PLAN_VERSION,
            "rows_per_step": rows_per_step,
            "tokenizer": self.sources[0].manifest.identity["tokenizer"],
            "sources": sources,
        }


class RunSegment(NamedTuple):
    """Steps of a run with equal settings: the first of them, rows per step, and the tokens that each source gives in
    the full run, by name."""

    step: int
    rows_per_step: int
    amounts: dict[str, int]


class PlannedRows(NamedTuple):
    """Rows `first` to `stop` - 1 of a run, packed together. `streams` of `sources`, indices into those of the plan."""

    first: int
    stop: int
    packing: Packing
    streams: list[Stream]
    sources: list[int]

    def taken(self, row: int) -> dict[int, int]:
        """Tokens that each source has given in all rows before `row`."""
        return dict(zip(self.sources, self.packing.taken(min(row, self.stop) - self.first), strict=True))


class Plan:
    """Rows 0 to rows - 1 of a mix, by index. Other rows are masked padding, which fills the last batch.

    `past`: segments of the run before step `step`, from which `amounts` and `rows_per_step` hold.
    """

    def __init__(self, mix: Mix, *, rows_per_step: int, past: Sequence[RunSegment] = (), step: int = 0):
        self.mix, self.settings, self.sources, self.amounts = mix, mix.settings, mix.sources, mix.amounts
        self.rows_per_step = rows_per_step
        self.names = [source.settings.name for source in mix.sources]
        self.segments = [*past, RunSegment(step, rows_per_step, dict(zip(self.names, mix.amounts, strict=True)))]
        self._first_rows = [0]
        for before, after in pairwise(self.segments):
            self._first_rows.append(self._first_rows[-1] + (after.step - before.step) * before.rows_per_step)
        self._planned = self._plan_segments()
        self._streams = self._planned[-1].streams
        self.rows = self._planned[-1].stop
        self.steps = step + max(-(-(self.rows - self._first_rows[-1]) // rows_per_step), 0)
        self.tokens = sum(mix.amounts)
        self.vocab_size, self.tokenizer_dir = mix.vocab_size, mix.tokenizer_dir
        self._dtype = token_dtype(self.vocab_size)
        self._readers = [
            TokenReader(source.path, source.manifest, source.documents, window=stream.window_blocks, dtype=self._dtype)
            for source, stream in zip(mix.sources, self._streams, strict=True)
        ]

    def _plan_segments(self) -> list[PlannedRows]:
        """The rows of each segment that has other amounts than the one before it."""
        planned: list[PlannedRows] = []
        for number, (segment, row) in enumerate(zip(self.segments, self._first_rows, strict=True)):
            if number and segment.amounts == self.segments[number - 1].amounts:
                continue
            taken: dict[int, int] = {}
            if planned:
                last = planned.pop()
                planned.append(last._replace(stop=last.first + last.packing.cut(row - last.first)))
                taken = planned[-1].taken(planned[-1].stop)
                row = max(row, planned[-1].stop)
            planned.append(self._plan_rows(row, segment, taken))
        return planned

    def _plan_rows(self, first: int, segment: RunSegment, taken: dict[int, int]) -> PlannedRows:
        """The rows of one segment, after rows that took `taken` tokens of each source."""
        sources, streams = [self.names.index(name) for name in segment.amounts], []
        for source, amount in zip(sources, segment.amounts.values(), strict=True):
            begin = taken.get(source, 0)
            if amount < begin:
                raise UserError(
                    f"source {self.names[source]!r}: has given {begin:,} tokens by step {segment.step}, but the recipe "
                    f"asks for {amount:,} in the full run, {begin - amount:,} fewer; raise its amount or "
                    "data.tokens, or set another run_dir"
                )
            documents = self.sources[source].documents
            streams.append(Stream(documents, amount, self.settings.seed, self.names[source], begin))
        order = MergedOrder(streams, CHUNK_ROWS * self.settings.seq_len)
        packing = (Concat if self.settings.packing == "concat" else BestFit)(order, self.settings.seq_len)
        return PlannedRows(first, first + packing.rows, packing, streams, sources)

    def first_row(self, step: int) -> int:
        """The first row of a step."""
        last = max(number for number, segment in enumerate(self.segments) if segment.step <= step)
        return self._first_rows[last] + (step - self.segments[last].step) * self.segments[last].rows_per_step

    def place(self, row: int) -> tuple[int, int]:
        """The step of a row, and its slot in the batch."""
        last = max(number for number, first in enumerate(self._first_rows) if first <= row)
        step, slot = divmod(row - self._first_rows[last], self.segments[last].rows_per_step)
        return self.segments[last].step + step, slot

    def taken(self, step: int) -> dict[str, int]:
        """Tokens that each source has given in all steps before `step`."""
        row = self.first_row(step)
        planned = [one for one in self._planned if one.first <= row][-1]
        return dict.fromkeys(self.names, 0) | {self.names[one]: tokens for one, tokens in planned.taken(row).items()}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the fingerprint covers: that of the mix, and the segments of a run that has several."""
        segments = [[step, rows, list(map(list, amounts.items()))] for step, rows, amounts in self.segments]
        return self.mix.identity(self.rows_per_step) | ({"segments": segments} if len(segments) > 1 else {})

    @cached_property
    def fingerprint(self) -> str:
        return digest(self.identity)

    def summary(self, trained: int = 0) -> dict[str, Any]:
        """What `ipt plan --json` prints, for a run of which `trained` steps are done."""
        counted = [stream.count() for stream in self._streams]
        sources = [
            _source_summary(source, amount, documents, self.tokens)
            for source, amount, (documents, _) in zip(self.sources, self.amounts, counted, strict=True)
        ]
        taken = self.taken(trained)
        segments = [
            {"step": step, "rows_per_step": rows, "tokens": sum(amounts.values())}
            for step, rows, amounts in self.segments
        ]
        return {
            "sources": [source | {"trained_tokens": taken[source["name"]]} for source in sources]
            if trained
            else sources,
            **({"segments": segments} if len(segments) > 1 else {}),
            **({"trained_steps": trained, "trained_tokens": sum(taken.values())} if trained else {}),
            "rows": self.rows,
            "seq_len": self.settings.seq_len,
            "tokens": self.tokens,
            "padding_fraction": 1 - self.tokens / (self.rows * self.settings.seq_len),
            "truncated_tokens": sum(cut for _, cut in counted),
            "steps": self.steps,
            "rows_per_step": self.rows_per_step,
            "packing": self.settings.packing,
            "fingerprint": self.fingerprint,
        }

    def batch(self, rows: Sequence[int], *, by_block: bool = False) -> dict[str, np.ndarray]:
        """Each field's array [len(rows), T]. `by_block`: read and cache complete blocks, for a reader of all rows."""
        pieces = self.pieces(rows)
        return render(pieces, self._read(pieces, by_block), len(rows), self.settings.seq_len, self._dtype)

    def document_ids(self, step: int) -> list[dict[str, Any]]:
        """{step, row, source, ids} of each row and source of a step, from 1: the documents in the rows of all hosts."""
        pieces = self.pieces(range(self.first_row(step - 1), self.first_row(step)))
        found = []
        for source, reader in enumerate(self._readers):
            mine = pieces[pieces["source"] == source]
            ids = np.array(reader.ids(mine["document"]), object)
            for row in np.unique(mine["row"]).tolist():
                of_row = list(dict.fromkeys(ids[mine["row"] == row].tolist()))
                found.append({"step": step, "row": row, "source": self.names[source], "ids": of_row})
        return sorted(found, key=lambda one: one["row"])

    def load_blocks(self, rows: Sequence[int]) -> None:
        """Reads the blocks that `batch(rows, by_block=True)` needs."""
        pieces = self.pieces(rows)
        for source, reader in enumerate(self._readers):
            reader.load_blocks(pieces["document"]["record"][pieces["source"] == source])

    def pieces(self, rows: Sequence[int]) -> np.ndarray:
        """The pieces (data.packing PIECE) of some rows. `row` is the index into `rows`."""
        found = []
        for slot, first, stop in _runs(rows, self.rows):
            for planned in self._planned:
                low, high = max(first, planned.first), min(stop, planned.stop)
                if low < high:
                    pieces = planned.packing.pieces(low - planned.first, high - planned.first).copy()
                    pieces["row"] += slot - first + planned.first
                    pieces["source"] = np.array(planned.sources, np.uint8)[pieces["source"]]
                    found.append(pieces)
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0, PIECE), *found])

    def _read(self, pieces: np.ndarray, by_block: bool) -> FoundDocuments:
        """The document of each piece."""
        places, runs = np.empty(len(pieces), FOUND), [np.zeros((0, 2), np.uint32)]
        buffers: list[bytes] = []
        for source, reader in enumerate(self._readers):
            mine = np.flatnonzero(pieces["source"] == source)
            if not len(mine):
                continue
            found = reader.read(pieces["document"][mine], by_block=by_block)
            found.places["buffer"] += len(buffers)
            found.places["run"] += sum(map(len, runs))
            places[mine] = found.places
            buffers += found.buffers
            runs.append(found.runs)
        return FoundDocuments(places, buffers, np.concatenate(runs))


def _runs(rows: Sequence[int], end: int) -> Iterator[tuple[int, int, int]]:
    """(slot, first row, stop row) of each run of consecutive rows before `end`."""
    numbers = np.asarray(rows, np.int64)
    for run in np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(numbers) != 1) + 1):
        if len(run) and numbers[run[0]] < end:
            yield int(run[0]), int(numbers[run[0]]), min(int(numbers[run[-1]]) + 1, end)


def _source_summary(source: Source, amount: int, documents: int, total: int) -> dict[str, Any]:
    converted, converted_tokens, elsewhere, *neither = source.documents.table.remains.counts
    held_out = source.held_out and {
        "held_out_documents": source.held_out.documents,
        "held_out_tokens": source.held_out.tokens,
        "copies_of_held_out": neither[0],
    }
    return {
        "name": source.settings.name,
        "kind": source.kind,
        "documents": documents,
        "tokens": amount,
        "epochs": amount / source.documents.tokens,
        "share": amount / total,
        "asked": source.settings.asked,
        "max_epochs": 1 if source.settings.asked == "the rest" else source.settings.max_epochs,
        "available_documents": source.documents.documents,
        "available_tokens": source.documents.tokens,
        "converted_documents": converted,
        "converted_tokens": converted_tokens,
        "converted_elsewhere": elsewhere,
        **(held_out or {}),
    }


def build_plan(settings: DataSettings, *, rows_per_step: int) -> Plan:
    """The plan of `settings` for a run of one segment. Raises UserError for damage and for an amount that cannot be
    met."""
    return Plan(open_mix(settings), rows_per_step=rows_per_step)


def open_mix(settings: DataSettings) -> Mix:
    """The sources of `settings`, and the tokens that each gives.

    Shards are checked by size, index files by checksum when their block table is made, each record when it is read.
    """
    check_sources(settings.sources)
    opened = {source.name: open_token_shards(source.path, verify=False) for source in settings.sources}
    _check_tokenizers(settings, opened)
    share = settings.held_out_share
    held_out = HeldOut(share, [(one.path, one.manifest) for one in opened.values()]) if share else None
    sources = [_open_source(source, opened, held_out) for source in settings.sources]
    return Mix(settings, sources, solve_mix(settings, [source.documents.tokens for source in sources]))


def run_segments(identity: dict[str, Any]) -> list[RunSegment]:
    """The segments of a run, from the identity of its plan."""
    amounts = [[source["name"], source["tokens"]] for source in identity["sources"]]
    found = identity.get("segments", [[0, identity["rows_per_step"], amounts]])
    return [RunSegment(step, rows, dict(amounts)) for step, rows, amounts in found]


def continue_plan(mix: Mix, *, rows_per_step: int, past: Sequence[RunSegment], step: int) -> Plan:
    """The plan of a run with the segments `past` whose next step is `step`. A new segment begins there if the amounts
    or the batch are others."""
    last = past[-1]
    amounts = [(source.settings.name, amount) for source, amount in zip(mix.sources, mix.amounts, strict=True)]
    if (last.rows_per_step, list(last.amounts.items())) == (rows_per_step, amounts):
        return Plan(mix, rows_per_step=rows_per_step, past=past[:-1], step=last.step)
    return Plan(mix, rows_per_step=rows_per_step, past=past, step=step)


def _check_tokenizers(settings: DataSettings, opened: dict[str, Shards]) -> None:
    first, *others = settings.sources
    for source in others:
        if opened[source.name].manifest.identity["tokenizer"] != opened[first.name].manifest.identity["tokenizer"]:
            raise UserError(
                f"sources {first.name!r} ({first.path}) and {source.name!r} ({source.path}) were tokenized with "
                "different tokenizers; run ipt tokenize for both with the same one"
            )


def _open_source(source: SourceMix, opened: dict[str, Shards], held_out: HeldOut | None) -> Source:
    path, manifest = opened[source.name].path, opened[source.name].manifest
    other = opened[source.exclude_converted] if source.exclude_converted else None
    of_role = partial(
        open_documents, source.name, path, manifest, (other.path, other.manifest) if other else None, held_out
    )
    kept = of_role(Role.HELD_OUT) if held_out else None
    return Source(source, path, manifest, of_role(), contents(other.manifest) if other else None, kept)


def print_plan(summary: dict[str, Any]) -> None:
    Console().print(plan_summary_table(summary))


def plan_summary_table(summary: dict[str, Any]) -> Table:
    """`Plan.summary()` as a table."""
    table = Table(
        title="{tokens:,} tokens in {rows:,} rows of {seq_len:,} ({packing})".format(**summary),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # a plan of 100B tokens fits 80 columns
        pad_edge=False,
        caption=Text(_caption(summary)),
        caption_justify="left",
    )
    for heading in ("source", "kind", "asked"):
        table.add_column(heading, min_width=6, overflow="fold")
    for heading in ("documents", "tokens", "share", "epochs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for source in summary["sources"]:
        table.add_row(
            escape(source["name"]),
            source["kind"],
            source["asked"],
            f"{source['documents']:,}",
            f"{source['tokens']:,}",
            f"{source['share']:.2%}",
            f"{source['epochs']:.4g}{_cap(source)}",
        )
    return table


def _cap(source: dict[str, Any]) -> str:
    """The maximum number of epochs, if the recipe states it or the source repeats without one."""
    if source["max_epochs"]:
        return f" of {source['max_epochs']:g}"
    return " (no cap)" if source["epochs"] > 1 and not source["asked"].startswith("epochs") else ""


def _caption(summary: dict[str, Any]) -> str:
    steps = "{steps:,} steps of {rows_per_step:,} rows, padding {padding_fraction:.3%}".format(**summary)
    cut = "{truncated_tokens:,} tokens cut from last documents, plan {fingerprint:.12}".format(**summary)
    excluded = (
        "{name}: {converted_tokens:,} tokens of {converted_documents:,} converted documents excluded; "
        "{converted_elsewhere:,} converted texts are of other sources"
    )
    lines = [excluded.format(**source) for source in summary["sources"] if source["converted_documents"]]
    lines += held_out_lines(summary)
    if trained := summary.get("trained_steps"):
        parts = [("all", summary), *((source["name"], source) for source in summary["sources"])]
        done = "{name}: {trained_tokens:,} tokens in {trained:,} steps, {left:,} to come"
        for name, one in parts:
            left = one["tokens"] - one["trained_tokens"]
            lines.append(done.format(name=name, trained_tokens=one["trained_tokens"], trained=trained, left=left))
    return "\n".join([f"{steps}, {cut}", *lines])


def held_out_lines(summary: dict[str, Any]) -> list[str]:
    """What each source holds out of training, for people."""
    words = (
        "{name}: {held_out_documents:,} documents with {held_out_tokens:,} tokens are held out by id; "
        "{copies_of_held_out:,} made partly of held-out texts are not used"
    )
    return [words.format(**source) for source in summary["sources"] if "held_out_documents" in source]


def plan_warnings(summary: dict[str, Any]) -> list[str]:
    """What of a mix is known to fail, each with its source: sources that repeat more often than MANY_EPOCHS where the
    recipe states no epochs, little augmented text, and instructions without other text. Tuning alone is exempt."""
    lines = [
        f"warning: source {source['name']!r} is repeated for {source['epochs']:,.4g} epochs of its "
        f"{source['available_tokens']:,} tokens; set its max_epochs if this is intended"
        for source in summary["sources"]
        if source["epochs"] > MANY_EPOCHS and not source["max_epochs"] and not source["asked"].startswith("epochs")
    ]
    augmented, tasks, instructions = (_share_of_kind(summary, kind) for kind in ("augmented", "task", "instruction"))
    if 0 < augmented < FEW_FACTS:
        lines.append(
            f"warning: augmented text is {augmented:.1%} of the tokens; below a critical share, which is larger for "
            f"smaller models, facts of a source are not learned however long a run is (arXiv 2505.18091); raise it to "
            f"{FEW_FACTS:.0%} or more, or compare shares with ipt ablate"
        )
    if not augmented and MANY_INSTRUCTIONS < tasks + instructions < 0.999:
        lines.append(
            f"warning: instructions and tuning data are {tasks + instructions:.0%} of the tokens, without augmented "
            f"text; marin's 8B ablations found {MANY_INSTRUCTIONS:.0%} of FLAN beside web text alone worse than none "
            "(marin.readthedocs.io/en/latest/reports/marin-8b-retro); lower it, or add text of high quality"
        )
    return lines


def _share_of_kind(summary: dict[str, Any], kind: str) -> float:
    return sum(source["share"] for source in summary["sources"] if kind in source["kind"].split("+"))
