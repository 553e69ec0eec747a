"""The data card of a data set for the hub: YAML that the hub reads, then what the data are, counted.

Guaranteed: the same documents give the same card; strings from records cannot end the block or the table they stand in.
"""

import re
from collections import Counter
from collections.abc import Sequence

import yaml

from ipt_jax.corpus.records import Document
from synth.render.documents import HubSettings, RenderSettings
from synth.render.hub_rows import SCHEMA, features

SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
    (10**10, "1B<n<10B"),
    (10**11, "10B<n<100B"),
    (10**12, "100B<n<1T"),
)
WHAT = (
    "Raw texts with questions and answers that a synthesizer wrote about them, for pre-training language models "
    "([Instruction Pre-Training](https://arxiv.org/abs/2406.14491))."
)
EXCERPT = 2000  # characters of an example
COLUMNS = {
    "id": "the document's name",
    "text": "what a model is trained on: raw texts with their questions and answers, laid out by templates",
    "source": "where the raw texts come from; several are joined by +",
    "kind": "`augmented`, or `raw` where no pair was left",
    "layout": "how texts and pairs were joined; null for raw texts",
    "pairs": "the pairs in `text`: question, options, rationale, answer, format, scores, and the index of their text",
    "parents": "the raw texts, as spans of characters of the corpus they were taken from",
    "spans": "where texts (`pair` is null), questions, options, rationales and answers stand in `text`, in characters",
}


def dataset_card(
    settings: RenderSettings, hub: HubSettings, counts: Counter[str], examples: Sequence[Document], fingerprint: str
) -> str:
    sections = [
        f"---\n{front_matter(hub, counts)}---",
        f"# {cell(hub.name)}",
        WHAT,
        '```python\nfrom datasets import load_dataset\n\ndocuments = load_dataset("path/to/this", split="train")\n```',
        "## What is in it",
        totals(counts),
        *(named_table(counts, name) for name in ("format", "layout", "source")),
        "## Columns",
        table(["column", "meaning"], [[f"`{name}`", meaning] for name, meaning in COLUMNS.items()]),
        "## How it was made",
        making(settings, counts, fingerprint),
        "## Licence",
        licence_words(hub),
        "## Examples",
        *(fenced(document.text) for document in examples),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def front_matter(hub: HubSettings, counts: Counter[str]) -> str:
    named = {"license_name": hub.license_name, "license_link": hub.license_link}
    tasks = ["question-answering", "text-generation"]
    if counts["format choice"] + counts["format choice_cot"]:
        tasks.append("multiple-choice")
    fields = {
        "license": hub.license,
        **{name: value for name, value in named.items() if value},
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
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def size_category(documents: int) -> str:
    return next((name for limit, name in SIZES if documents < limit), "n>1T")


def totals(counts: Counter[str]) -> str:
    rows = {
        "documents": counts["documents"],
        "with pairs": counts["kind augmented"],
        "raw texts that kept no pair": counts["kind raw"],
        "pairs": counts["pairs"],
        "characters": counts["characters"],
    }
    return table(["", "count"], [[name, f"{count:,}"] for name, count in rows.items()])


def named_table(counts: Counter[str], kind: str) -> str:
    found = Counter({name.removeprefix(f"{kind} "): n for name, n in counts.items() if name.startswith(f"{kind} ")})
    if not found:
        return ""
    of = "pairs" if kind == "format" else "documents"
    rows = [[name, f"{n:,}", f"{n / found.total():.1%}"] for name, n in found.most_common()]
    return table([kind, of, "share"], rows)


def making(settings: RenderSettings, counts: Counter[str], fingerprint: str) -> str:
    synthesizers = [name.removeprefix("synthesizer ").split("\t") for name in counts if name.startswith("synthesizer ")]
    rows = [
        *(["synthesizer", f"{name}, weights {weights}"] for name, weights in sorted(synthesizers)),
        ["filter of pairs", settings.keep or "none: every pair that the parser accepted"],
        ["seed", str(settings.seed)],
        ["epoch of templates", str(settings.epoch)],
        ["share of groups with a document for each text", f"{settings.one_shot:.1%}"],
        ["fingerprint of the documents", fingerprint],
    ]
    return table(["", ""], rows)


def licence_words(hub: HubSettings) -> str:
    named = f"{hub.license_name} ({hub.license_link})" if hub.license == "other" else hub.license
    return (
        f"{cell(named)}, as stated by whoever made this data set. The raw texts keep the rights of their sources, and "
        "the pairs were written by a model: check that the licences of both allow your use."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    """One line that no table or heading is ended by."""
    return re.sub(r"([|<>\[\]*_\\])", r"\\\1", " ".join(text.split())) if not text.startswith("`") else text


def fenced(text: str) -> str:
    """A block of code whose fence is longer than any in the text."""
    shown = text if len(text) <= EXCERPT else f"{text[:EXCERPT]} …"
    longest = max(map(len, re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown}\n{fence}"
