"""Documents as rows of a table: the text, and beside it its pairs, parents and spans. Written to Parquet or JSON Lines.

Guaranteed: one schema for all rows, whatever they hold; spans name a pair by its place in the row's `pairs`; memory for
a thousand rows at a time.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ipt_jax.corpus.records import Document, Pair, SynthGroup
from synth.format.wire import final_answer, question_stem
from synth.render.documents import whole_pair

ROWS = 1000  # rows a row group
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "text": pa.string(),
        "source": pa.string(),
        "kind": pa.string(),
        "layout": pa.string(),
        "pairs": pa.list_(
            pa.struct(
                {
                    "text": pa.int32(),
                    "question": pa.string(),
                    "options": pa.list_(pa.string()),
                    "rationale": pa.string(),
                    "answer": pa.string(),
                    "format": pa.string(),
                    "scores": pa.list_(pa.struct({"name": pa.string(), "value": pa.float64()})),
                }
            )
        ),
        "parents": pa.list_(pa.struct({"id": pa.string(), "start": pa.int64(), "end": pa.int64()})),
        "spans": pa.list_(
            pa.struct(
                {
                    "part": pa.string(),
                    "text": pa.int32(),
                    "pair": pa.int32(),
                    "start": pa.int64(),
                    "end": pa.int64(),
                }
            )
        ),
    }
)


def features(fields: pa.Schema | pa.StructType) -> list[dict[str, Any]]:
    """The schema as the hub writes it in a card."""
    return [{"name": field.name, **feature(field.type)} for field in fields]


def feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        inner = kind.value_type
        return {"list": features(inner) if pa.types.is_struct(inner) else str(inner)}
    return {"dtype": {"double": "float64"}.get(str(kind), str(kind))}


def row(group: SynthGroup, document: Document) -> dict[str, Any]:
    """A document with its pairs beside it; spans name a pair by its place in `pairs`."""
    spans = document.meta.get("spans", {})
    texts = [group.texts[place] for place in document.meta.get("places", [])]
    numbers = {(text, pair): number for number, (text, pair, *_) in enumerate(spans.get("question", []))}
    return {
        "id": document.id,
        "text": document.text,
        "source": document.source,
        "kind": document.kind,
        "layout": document.meta.get("layout"),
        "pairs": [pair_row(texts[text].pairs[pair], text) for text, pair in numbers],
        "parents": [{"id": parent.id, "start": parent.start, "end": parent.end} for parent in document.parents],
        "spans": [
            {"part": part, "text": text, "pair": numbers[text, owner[0]] if owner else None, "start": start, "end": end}
            for part, found in spans.items()
            for text, *owner, start, end in found
        ],
    }


def pair_row(stored: Pair, text: int) -> dict[str, Any]:
    pair = whole_pair(stored)
    return {
        "text": text,
        "question": question_stem(pair).strip(),
        "options": pair.options,
        "rationale": pair.rationale.strip() if pair.rationale is not None else None,
        "answer": final_answer(pair),
        "format": pair.format,
        "scores": [{"name": name, "value": score} for name, score in sorted(pair.scores.items())],
    }


def write_parquet(path: Path, found: Iterator[dict[str, Any]]) -> None:
    with pq.ParquetWriter(path, SCHEMA, compression="zstd", write_page_index=True) as writer:
        while some := list(islice(found, ROWS)):
            writer.write_table(pa.Table.from_pylist(some, schema=SCHEMA))


def write_jsonl(path: Path, found: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for one in found:
            file.write(json.dumps(one, ensure_ascii=False) + "\n")
