"""What one group becomes: its Documents, through the filter and the look that was drawn.

Guaranteed: a pure function of (group, settings), whatever stands beside it; inputs are not changed; no Document is
empty; every pair is shown once or counted under a reason. `meta` names the layout, where texts, questions, options,
reasoning and answers stand (`spans`, see synth/render/spans.py) and which texts of the group they are (`places`).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from math import isinf
from typing import Literal

import msgspec
from pydantic import Field, ValidationInfo, field_validator

from ipt_jax.core.settings import Settings
from ipt_jax.corpus.records import Document, Pair, Parent, Segment, SynthGroup
from ipt_jax.corpus.shards import Shards
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth.format.parser import read_format, reject
from synth.groups import contaminated_places, decode_group
from synth.render.layout import Shot, has_example, lay_out
from synth.render.pair_filter import keeps, read_keep
from synth.render.row_budget import count_tokens, fit_rows, pairs_of, raw_parts
from synth.render.templates import Draws, Layout, draw_style

LAYOUT_COUNT = "layout."


class LayoutShares(Settings):
    """Relative frequency of each layout. The values need not sum to one."""

    text_first: float = Field(0.0, ge=0)
    """Weight of: each text, then its questions with answers."""
    questions_first: float = Field(0.0, ge=0)
    """Weight of: questions with answers, then the text."""
    dialogue: float = Field(0.0, ge=0)
    """Weight of: the text, then a dialogue of two speakers."""
    numbered: float = Field(0.0, ge=0)
    """Weight of: the text, all questions, all answers."""
    few_shot: float = Field(0.0, ge=0)
    """Weight of: worked examples, then a test item."""

    @property
    def weights(self) -> dict[Layout, float]:
        return {
            "text_first": self.text_first,
            "questions_first": self.questions_first,
            "dialogue": self.dialogue,
            "numbered": self.numbered,
            "few_shot": self.few_shot,
        }


class HubSettings(Settings):
    """A data set for the hub: a directory to push, with a card. The licence is for the user to state."""

    output: str
    """Directory of the data set to write."""
    name: str
    """Title of the dataset card."""
    license: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    """License identifier of the Hugging Face Hub, or other."""
    license_name: str | None = None
    """Name of the license. Required with `license: other`."""
    license_link: str | None = Field(None, validate_default=True)
    """Link to the license. Required with `license: other`."""
    language: list[str] = Field(min_length=1)
    """Language codes, such as `[en]`."""
    format: Literal["parquet", "jsonl"] = "parquet"
    """File format of the rows."""

    @field_validator("license_link")
    @classmethod
    def _names_the_other(cls, link: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("license") == "other" and not (link and info.data.get("license_name")):
            raise ValueError("license: other needs license_name and license_link; state both")
        return link


class RenderSettings(Settings):
    """The recipe of `synth render`."""

    groups: str
    """Output of `synth run`, `mine`, `verify` or `decontaminate`."""
    layouts: LayoutShares = LayoutShares(text_first=0.6, questions_first=0.1, dialogue=0.1, numbered=0.1, few_shot=0.1)
    """Relative frequency of each layout (docs/render.md). The values need not sum to one."""
    one_shot: float = Field(0.0, ge=0, le=1)
    """Fraction of groups rendered as one document per text instead of one few-shot document."""
    keep: str | None = None
    """Filter over scores, such as `"grounded >= 0.3"`. null: keep every pair that the parser accepted."""
    epoch: int = Field(0, ge=0)
    """Number of the epoch. Each epoch draws other templates for the same pairs."""
    seed: int = 0
    """Random seed of all draws. A draw depends only on the seed and an id."""
    tokenizer: str | None = None
    """Tokenizer that counts tokens: the one of the model to be trained."""
    max_document_tokens: int | None = Field(None, ge=32)
    """Maximum tokens per document, BOS and EOS included. Needs `tokenizer`. null: no limit."""
    hub: HubSettings | None = None
    """Also write the documents as a data set ready to push to the Hugging Face Hub."""
    output: str
    """Directory to write. It must be empty or hold output of the same recipe, which is resumed."""

    @field_validator("layouts")
    @classmethod
    def _draws_something(cls, shares: LayoutShares) -> LayoutShares:
        if isinf(sum(shares.weights.values())):
            raise ValueError("the shares add up to more than a number can hold; give smaller ones")
        if not sum(shares.weights.values()):
            raise ValueError("every share is 0; give at least one layout a share")
        return shares

    @field_validator("max_document_tokens")
    @classmethod
    def _can_be_counted(cls, limit: int | None, info: ValidationInfo) -> int | None:
        if limit is not None and info.data.get("tokenizer") is None:
            raise ValueError("tokens need a tokenizer; set tokenizer to the pre-training model's")
        return limit

    @field_validator("keep")
    @classmethod
    def _can_be_read(cls, expression: str | None) -> str | None:
        if expression is not None:
            read_keep(expression)
        return expression


def shard_documents(
    settings: RenderSettings, shard: int, counts: Counter[str], dropped: Counter[str]
) -> Iterator[tuple[SynthGroup, Document, int]]:
    """The documents of one shard of groups in order, each with its group and its tokens (0 without a tokenizer)."""
    tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
    shards = Shards(settings.groups, verify=False)
    for record in shards.stream(shard):
        group = decode_group(record, shards)
        for document in render_group(group, settings, counts, dropped, tokenizer):
            yield group, document, count_tokens(document, tokenizer)


def render_group(
    group: SynthGroup,
    settings: RenderSettings,
    counts: Counter[str],
    dropped: Counter[str],
    tokenizer: Tokenizer | None = None,
) -> list[Document]:
    """The group's documents, none longer than `max_document_tokens`; what happened is counted."""
    contaminated = contaminated_places(group)
    if contaminated:
        dropped["contaminated_text"] += len(contaminated)
    shots = [
        Shot(place, text, kept_pairs(text.pairs, settings.keep, dropped))
        for place, text in enumerate(group.texts)
        if place not in contaminated
    ]
    counts["pairs"] += sum(len(shot.pairs) for shot in shots)
    if not any(shot.pairs for shot in shots):
        counts["no_pair_left"] += 1
        return raw_documents(group, shots, settings, dropped, tokenizer)
    counts["with_pairs"] += 1
    draws = Draws(settings.seed, group.id, settings.epoch)
    if not draws.chance("one shot", settings.one_shot):
        return row_documents(group, group.id, shots, settings, counts, dropped, tokenizer)
    counts["one_shot"] += 1
    documents = []
    for shot in (shot for shot in shots if shot.pairs):
        name = f"{group.id}.shot{shot.place}"
        documents += row_documents(group, name, [shot], settings, counts, dropped, tokenizer)
    return documents + raw_documents(group, [shot for shot in shots if not shot.pairs], settings, dropped, tokenizer)


def row_documents(
    group: SynthGroup,
    name: str,
    shots: Sequence[Shot],
    settings: RenderSettings,
    counts: Counter[str],
    dropped: Counter[str],
    tokenizer: Tokenizer | None,
) -> list[Document]:
    """`shots` as one augmented document, or as several where the row is too short for it."""

    def render(number: int, row: Sequence[Shot], counted: Counter[str]) -> Document:
        return augmented_document(group, f"{name}.part{number}" if number else name, row, settings, counted)

    def fits(number: int, row: Sequence[Shot]) -> bool:
        limit = settings.max_document_tokens
        return limit is None or not pairs_of(row) or count_tokens(render(number, row, Counter()), tokenizer) <= limit

    rows = fit_rows(shots, fits)
    if lost := pairs_of(shots) - sum(map(pairs_of, rows)):
        counts["pairs"] -= lost
        dropped["row_full"] += lost
    if len(rows) > 1:
        counts["split_for_row"] += 1
    documents = []
    for number, row in enumerate(rows):
        if pairs_of(row):
            documents.append(render(number, row, counts))
        else:
            documents += raw_documents(group, row, settings, dropped, tokenizer)
    return documents


def augmented_document(
    group: SynthGroup, name: str, shots: Sequence[Shot], settings: RenderSettings, counts: Counter[str]
) -> Document:
    """`shots` as one document, in a look drawn for `name`."""
    draws = Draws(settings.seed, name, settings.epoch)
    document_style = draw_style(draws, settings.layouts.weights, has_example=has_example(shots))
    counts[LAYOUT_COUNT + document_style.layout] += 1
    words, spans = lay_out(shots, document_style, draws)
    texts = [shot.text for shot in shots]
    return Document(
        id=name if settings.epoch == 0 else f"{name}.{settings.epoch}",
        source="+".join(dict.fromkeys(text.source for text in texts)),
        kind="augmented",
        segments=[Segment(text=words)],
        parents=[Parent(text.raw_id, text.start, text.end) for text in texts],
        meta={
            "layout": document_style.layout,
            "spans": spans,
            "places": [shot.place for shot in shots],
            **provenance(group),
        },
    )


def raw_documents(
    group: SynthGroup,
    shots: Sequence[Shot],
    settings: RenderSettings,
    dropped: Counter[str],
    tokenizer: Tokenizer | None,
) -> list[Document]:
    """The texts as they were, cut at sentence ends where the row is too short; a blank one makes no document."""
    documents = []
    for place, text in ((shot.place, shot.text) for shot in shots):
        if not text.text.strip():
            dropped["blank_text"] += 1
            continue
        for number, ((start, end), words) in enumerate(raw_parts(text.text, tokenizer, settings.max_document_tokens)):
            documents.append(
                Document(
                    id=f"{group.id}.raw{place}" + f".part{number}" * bool(number),
                    source=text.source,
                    kind="raw",
                    segments=[Segment(text=words)],
                    parents=[Parent(text.raw_id, text.start + start, text.start + end)],
                    meta=provenance(group),
                )
            )
    return documents


def provenance(group: SynthGroup) -> dict[str, str]:
    return {"synthesizer": group.synthesizer, "fingerprint": group.fingerprint}


def kept_pairs(pairs: Sequence[Pair], keep: str | None, dropped: Counter[str]) -> list[tuple[int, Pair]]:
    """Accepted pairs that pass the filter, with their index; each other one is counted by its reason."""
    kept = []
    for index, pair in enumerate(map(whole_pair, pairs)):
        if pair.rejection:
            dropped[pair.rejection] += 1
        elif not keeps(keep, pair):
            dropped["keep"] += 1
        else:
            kept.append((index, pair))
    return kept


def whole_pair(pair: Pair) -> Pair:
    """The pair read again from its wire strings: other programs may leave its parts out, or write none that fit."""
    if not pair.accepted:
        return pair
    if not pair.answer.strip():
        return reject(pair, "empty_answer")
    return msgspec.structs.replace(read_format(pair.question, pair.answer), scores=pair.scores)
