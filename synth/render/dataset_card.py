"""Columns and dataset card of a data set for the Hugging Face Hub: YAML metadata, then counts and provenance.

Guarantees: equal documents produce equal cards; strings from records cannot close the block or the table that they
are in.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pyarrow as pa
import yaml

from ipt_jax.corpus.records import Document
from synth.groups import counts_under
from synth.render.documents import HubSettings, RenderSettings

STRING, INDEX, OFFSET = pa.string(), pa.int32(), pa.int64()
PAIR = {
    "text": INDEX,
    "question": STRING,
    "options": pa.list_(STRING),
    "rationale": STRING,
    "answer": STRING,
    "format": STRING,
    "scores": pa.list_(pa.struct({"name": STRING, "value": pa.float64()})),
}
PARENT = {"id": STRING, "start": OFFSET, "end": OFFSET}
SPAN = {"part": STRING, "text": INDEX, "pair": INDEX, "start": OFFSET, "end": OFFSET}
COLUMNS: dict[str, tuple[pa.DataType, str]] = {  # type, and meaning in the card
    "id": (STRING, "the document's name"),
    "text": (STRING, "what a model is trained on: raw texts with their questions and answers, joined by templates"),
    "source": (STRING, "where the raw texts come from; several are joined by +"),
    "kind": (STRING, "`augmented`, or `raw` for a text without pairs"),
    "layout": (STRING, "how texts and pairs were joined; null for raw texts"),
    "pairs": (
        pa.list_(pa.struct(PAIR)),
        "the pairs in `text`: question, options, rationale, answer, format, scores, and the index of their text",
    ),
    "parents": (
        pa.list_(pa.struct(PARENT)),
        "the raw texts, as spans of characters of the corpus they were taken from",
    ),
    "spans": (
        pa.list_(pa.struct(SPAN)),
        "texts (`pair` is null), questions, options, rationales and answers as spans of characters of `text`",
    ),
}
SCHEMA = pa.schema({name: kind for name, (kind, _) in COLUMNS.items()})
SIZES = "1K 10K 100K 1M 10M 100M 1B 10B 100B 1T".split()  # bounds of the hub's size categories
WHAT = (
    "Raw texts with questions and answers that a synthesizer wrote about them, for pre-training language models "
    "([Instruction Pre-Training](https://arxiv.org/abs/2406.14491))."
)
LICENCE = (
    ", as stated by whoever made this data set. The raw texts keep the rights of their sources, and the pairs were "
    "written by a model: check that the licences of both allow your use."
)
EXAMPLE_CHARACTERS = 2000


def dataset_card(
    settings: RenderSettings, hub: HubSettings, counts: Counter[str], examples: Sequence[Document], fingerprint: str
) -> str:
    totals = {
        "documents": counts["documents"],
        "with pairs": counts["kind augmented"],
        "raw texts that kept no pair": counts["kind raw"],
        "pairs": counts["pairs"],
        "characters": counts["characters"],
    }
    synthesizers = [name.split("\t") for name in counts_under(counts, "synthesizer ")]
    provenance = [
        *(["synthesizer", f"{name}, weights {weights}"] for name, weights in sorted(synthesizers)),
        ["filter of pairs", settings.keep or "none: every pair that the parser accepted"],
        ["seed", str(settings.seed)],
        ["epoch of templates", str(settings.epoch)],
        ["share of groups with a document for each text", f"{settings.one_shot:.1%}"],
        ["share of pairs in documents of their own", f"{settings.detached:.1%}"],
        ["fingerprint of the documents", fingerprint],
    ]
    license_name = f"{hub.license_name} ({hub.license_link})" if hub.license == "other" else hub.license
    sections = [
        f"---\n{front_matter(hub, counts)}---",
        f"# {cell(hub.name)}",
        WHAT,
        '```python\nfrom datasets import load_dataset\n\ndocuments = load_dataset("path/to/this", split="train")\n```',
        "## What is in it",
        table(["", "count"], [[name, f"{count:,}"] for name, count in totals.items()]),
        *(share_table(counts, name) for name in ("format", "layout", "source")),
        "## Columns",
        table(["column", "meaning"], [[f"`{name}`", meaning] for name, (_, meaning) in COLUMNS.items()]),
        "## How it was made",
        table(["", ""], provenance),
        "## Licence",
        f"{cell(license_name)}{LICENCE}",
        "## Examples",
        *(fenced(document.text) for document in examples),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def front_matter(hub: HubSettings, counts: Counter[str]) -> str:
    """The YAML metadata that the hub reads."""
    tasks = ["question-answering", "text-generation"]
    if counts["format choice"] + counts["format choice_cot"]:
        tasks.append("multiple-choice")
    fields = {
        "license": hub.license,
        "license_name": hub.license_name or None,
        "license_link": hub.license_link or None,
        "language": hub.language,
        "pretty_name": hub.name,
        "size_categories": [size_category(counts["documents"])],
        "task_categories": tasks,
        "tags": ["synthetic", "instruction-pretraining"],
        "dataset_info": {"features": features(SCHEMA)},
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": f"data/train-*.{hub.format}"}]},
        ],
    }
    known = {name: value for name, value in fields.items() if value is not None}
    return yaml.safe_dump(known, sort_keys=False, allow_unicode=True)


def features(fields: Iterable[pa.Field]) -> list[dict[str, Any]]:
    """The columns in the notation of the hub's `dataset_info`."""
    return [{"name": field.name, **feature(field.type)} for field in fields]


def feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        inner = kind.value_type
        return {"list": features(inner) if pa.types.is_struct(inner) else str(inner)}
    return {"dtype": {"double": "float64"}.get(str(kind), str(kind))}


def size_category(documents: int) -> str:
    """999 -> 'n<1K', 1000 -> '1K<n<10K'"""
    names = [f"n<{SIZES[0]}", *(f"{low}<n<{high}" for low, high in pairwise(SIZES)), f"n>{SIZES[-1]}"]
    return names[min(max(len(str(documents)) - 3, 0), len(SIZES))]


def share_table(counts: Counter[str], kind: str) -> str:
    """The counts 'KIND NAME' with their shares, or nothing."""
    found = Counter(counts_under(counts, f"{kind} "))
    if not found:
        return ""
    rows = [[name, f"{n:,}", f"{n / found.total():.1%}"] for name, n in found.most_common()]
    return table([kind, "pairs" if kind == "format" else "documents", "share"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    """`text` on one line, escaped so that it cannot end a table or a heading. `code` stays."""
    return re.sub(r"([|<>\[\]*_\\])", r"\\\1", " ".join(text.split())) if not text.startswith("`") else text


def fenced(text: str) -> str:
    """A code block with a fence longer than any in `text`."""
    shown = text if len(text) <= EXAMPLE_CHARACTERS else f"{text[:EXAMPLE_CHARACTERS]} …"
    longest = max(map(len, re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown}\n{fence}"
