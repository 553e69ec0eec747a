"""Render a group as Documents: filter its pairs, draw a style, fit the documents into rows.

Guarantees: the documents depend on (group, settings) only; inputs are not changed; no Document is empty; every text
is rendered, in order; every pair is shown once or counted by reason. `meta` stores the layout, the spans of texts,
questions, options, rationales and answers (`finish` in synth/render/layout.py), and the places of the texts in the
group. Tokens are counted on the document's text plus BOS and EOS, as `ipt tokenize` counts them.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isinf
from typing import Literal

import msgspec
from pydantic import Field, ValidationInfo, field_validator

from ipt_jax.core.settings import PathText, Settings
from ipt_jax.corpus.records import Document, GroupText, Pair, Parent, Segment, SynthGroup
from ipt_jax.corpus.shards import Shards
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth.format.parser import read_format, reject
from synth.format.truncate import split_text
from synth.groups import contaminated_places, decode_group
from synth.render.layout import Shot, Spans, lay_out, lay_out_detached
from synth.render.pair_filter import keeps, read_keep
from synth.render.templates import DocumentStyle, Draws, Layout, load_templates

LAYOUT_COUNT = "layout."
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual|code")
LANGUAGE_NAMES = dict(
    english="en", german="de", french="fr", spanish="es", italian="it", portuguese="pt", dutch="nl", russian="ru",
    chinese="zh", japanese="ja", korean="ko", arabic="ar", hindi="hi", turkish="tr", polish="pl",
)  # fmt: skip


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
    """A data set with a card, ready to push to the hub. The license must be stated."""

    output: PathText
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

    @field_validator("language")
    @classmethod
    def _codes(cls, languages: list[str]) -> list[str]:
        for one in languages:
            if not LANGUAGE.fullmatch(one):
                known = LANGUAGE_NAMES.get(one.lower())
                hint = f"write {known} for {one}" if known else "find the code at iso639-3.sil.org"
                raise ValueError(f"{one!r} is not a language code (ISO 639, such as en, de or zh); {hint}")
        return languages

    @field_validator("license_link")
    @classmethod
    def _require_name_of_other(cls, link: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("license") == "other" and not (link and info.data.get("license_name")):
            raise ValueError("license: other requires license_name and license_link; set both")
        return link


class RenderSettings(Settings):
    """The recipe of `synth render`."""

    groups: PathText
    """Output of `synth run`, `mine`, `verify` or `decontaminate`."""
    layouts: LayoutShares = LayoutShares(text_first=0.6, questions_first=0.1, dialogue=0.1, numbered=0.1, few_shot=0.1)
    """Relative frequency of each layout (docs/reference/render.md). The values need not sum to one."""
    templates: PathText | None = None
    """Directory of template files that replace the shipped ones (docs/reference/render.md). null: the shipped ones."""
    one_shot: float = Field(0.0, ge=0, le=1)
    """Fraction of groups rendered as one document per text instead of one few-shot document."""
    detached: float = Field(0.0, ge=0, le=1)
    """Fraction of pairs rendered as a document of their own, apart from their text."""
    keep: str | None = None
    """Filter over scores, such as `"grounded >= 0.3"`. null: keep every pair that the parser accepted."""
    epoch: int = Field(0, ge=0)
    """Number of the epoch. Each epoch draws other templates for the same pairs."""
    seed: int = 0
    """Random seed of all draws. A draw depends only on the seed and an id."""
    tokenizer: PathText | None = None
    """Tokenizer that counts tokens: the one of the model to be trained."""
    max_document_tokens: int | None = Field(None, ge=32)
    """Maximum tokens per document, BOS and EOS included. Needs `tokenizer`. null: no limit."""
    hub: HubSettings | None = None
    """Also write the documents as a data set ready to push to the Hugging Face Hub."""
    output: PathText
    """Directory to write. It must be empty or hold output of the same recipe, which is resumed."""

    @field_validator("layouts")
    @classmethod
    def _require_positive_sum(cls, shares: LayoutShares) -> LayoutShares:
        if isinf(sum(shares.weights.values())):
            raise ValueError("the sum of the shares is too large for a number; use smaller shares")
        if not sum(shares.weights.values()):
            raise ValueError("every share is 0; set at least one above 0")
        return shares

    @field_validator("max_document_tokens")
    @classmethod
    def _require_tokenizer(cls, limit: int | None, info: ValidationInfo) -> int | None:
        if limit is not None and info.data.get("tokenizer") is None:
            raise ValueError("requires a tokenizer; set tokenizer to that of the model to be trained")
        return limit

    @field_validator("keep")
    @classmethod
    def _check_expression(cls, expression: str | None) -> str | None:
        if expression is not None:
            read_keep(expression)
        return expression


def shard_documents(
    settings: RenderSettings, shard: int, counts: Counter[str], dropped: Counter[str]
) -> Iterator[tuple[SynthGroup, Document, int]]:
    """The documents of one shard of groups in order, each with its group and its tokens (0 without a tokenizer)."""
    renderer = Renderer(settings, counts, dropped, load_tokenizer(settings.tokenizer) if settings.tokenizer else None)
    shards = Shards(settings.groups, verify=False)
    for record in shards.stream(shard):
        group = decode_group(record, shards)
        for document in renderer.documents(group):
            yield group, document, renderer.tokens(document.text)


@dataclass(frozen=True)
class Renderer:
    """Renders groups. `counts` and `dropped` (by reason) count what happened."""

    settings: RenderSettings
    counts: Counter[str]
    dropped: Counter[str]
    tokenizer: Tokenizer | None = None

    def documents(self, group: SynthGroup) -> list[Document]:
        """The documents of a group, none longer than `max_document_tokens`."""
        contaminated = contaminated_places(group)
        if contaminated:
            self.dropped["contaminated_text"] += len(contaminated)
        places = [place for place in range(len(group.texts)) if place not in contaminated]
        shots = [Shot(place, group.texts[place], self._kept_pairs(group.texts[place])) for place in places]
        self.counts["pairs"] += count_pairs(shots)
        if not count_pairs(shots):
            self.counts["no_pair_left"] += 1
            return self._raw(group, shots)
        self.counts["with_pairs"] += 1
        draws = Draws(self.settings.seed, group.id, self.settings.epoch)
        shots, documents = self._detached(group, shots, draws)
        if not count_pairs(shots):
            return documents + self._raw(group, shots)
        if not draws.chance("one shot", self.settings.one_shot):
            return documents + self._augmented(group, group.id, shots)
        self.counts["one_shot"] += 1
        for shot in (shot for shot in shots if shot.pairs):
            documents += self._augmented(group, f"{group.id}.shot{shot.place}", [shot])
        return documents + self._raw(group, [shot for shot in shots if not shot.pairs])

    def tokens(self, text: str) -> int:
        """Tokens of a document with the BOS and EOS that `ipt tokenize` adds; 0 without a tokenizer."""
        if self.tokenizer is None:
            return 0
        controls = (self.tokenizer.bos_id is not None) + (self.tokenizer.eos_id is not None)
        return len(self.tokenizer.encode(text)) + controls

    def _fits(self, text: str) -> bool:
        limit = self.settings.max_document_tokens
        return limit is None or self.tokens(text) <= limit

    def _kept_pairs(self, text: GroupText) -> list[tuple[int, Pair]]:
        """Accepted pairs that pass the filter, with their index. The others are counted by reason."""
        kept = []
        for index, pair in enumerate(map(parsed_pair, text.pairs)):
            if pair.rejection:
                self.dropped[pair.rejection] += 1
            elif not keeps(self.settings.keep, pair):
                self.dropped["keep"] += 1
            else:
                kept.append((index, pair))
        return kept

    def _detached(self, group: SynthGroup, shots: list[Shot], draws: Draws) -> tuple[list[Shot], list[Document]]:
        """`shots` without the pairs that get a document of their own, and these documents."""
        rest, documents = [], []
        for shot in shots:
            attached = []
            for index, pair in shot.pairs:
                if not draws.chance(f"detached {shot.place} {index}", self.settings.detached):
                    attached.append((index, pair))
                    continue
                name = f"{group.id}.pair{shot.place}.{index}"
                document = pair_document(group, name, replace(shot, pairs=[(index, pair)]), self.settings)
                if self._fits(document.text):
                    self.counts["detached"] += 1
                    documents.append(document)
                else:
                    self.counts["pairs"] -= 1
                    self.dropped["row_full"] += 1
            rest.append(replace(shot, pairs=attached))
        return rest, documents

    def _augmented(self, group: SynthGroup, name: str, shots: Sequence[Shot]) -> list[Document]:
        """`shots` as one augmented document, or as several if one would be too long."""

        def render(number: int, row: Sequence[Shot]) -> Document:
            return augmented_document(group, f"{name}.part{number}" if number else name, row, self.settings)

        rows = split_rows(shots, lambda number, row: not count_pairs(row) or self._fits(render(number, row).text))
        if lost := count_pairs(shots) - sum(map(count_pairs, rows)):
            self.counts["pairs"] -= lost
            self.dropped["row_full"] += lost
        if len(rows) > 1:
            self.counts["split_for_row"] += 1
        documents = []
        for number, row in enumerate(rows):
            if count_pairs(row):
                documents.append(render(number, row))
                self.counts[LAYOUT_COUNT + documents[-1].meta["layout"]] += 1
            else:
                documents += self._raw(group, row)
        return documents

    def _raw(self, group: SynthGroup, shots: Sequence[Shot]) -> list[Document]:
        """The unchanged texts, split at sentence ends if too long. A blank text makes no document."""
        documents = []
        for shot in shots:
            text = shot.text
            if not text.text.strip():
                self.dropped["blank_text"] += 1
                continue
            for number, (start, end, words) in enumerate(self._raw_parts(text.text)):
                documents.append(
                    Document(
                        id=f"{group.id}.raw{shot.place}" + f".part{number}" * bool(number),
                        source=text.source,
                        kind="raw",
                        segments=[Segment(text=words)],
                        parents=[Parent(text.raw_id, text.start + start, text.start + end)],
                        meta=provenance(group),
                    )
                )
        return documents

    def _raw_parts(self, text: str) -> Iterator[tuple[int, int, str]]:
        """(start, end, words) of the parts of a text that fit a document each."""
        limit = self.settings.max_document_tokens
        if self.tokenizer is None or limit is None or self._fits(text):
            yield 0, len(text), text
            return
        for start, end in split_text(text, self.tokenizer, limit, lambda part, _: self.tokens(part.strip())):
            yield start, end, text[start:end].strip()


def augmented_document(group: SynthGroup, name: str, shots: Sequence[Shot], settings: RenderSettings) -> Document:
    """`shots` as one document, in a style drawn for `name`."""
    draws = Draws(settings.seed, name, settings.epoch)
    templates = load_templates(settings.templates)
    style = DocumentStyle(draws, settings.layouts.weights, templates, has_example=count_pairs(shots) > 1)
    return laid_out(group, name, shots, style.layout, lay_out(shots, style, draws), settings)


def pair_document(group: SynthGroup, name: str, shot: Shot, settings: RenderSettings) -> Document:
    """The only pair of `shot` without its text, which stays the parent."""
    draws = Draws(settings.seed, name, settings.epoch)
    return laid_out(
        group, name, [shot], "detached", lay_out_detached(shot, draws, load_templates(settings.templates)), settings
    )


def laid_out(
    group: SynthGroup, name: str, shots: Sequence[Shot], layout: str, laid: tuple[str, Spans], settings: RenderSettings
) -> Document:
    texts = [shot.text for shot in shots]
    places = [shot.place for shot in shots]
    words, spans = laid
    return Document(
        id=name if settings.epoch == 0 else f"{name}.{settings.epoch}",
        source="+".join(dict.fromkeys(text.source for text in texts)),
        kind="augmented",
        segments=[Segment(text=words)],
        parents=[Parent(text.raw_id, text.start, text.end) for text in texts],
        meta={"layout": layout, "spans": spans, "places": places, **provenance(group)},
    )


def provenance(group: SynthGroup) -> dict[str, str]:
    return {"synthesizer": group.synthesizer, "fingerprint": group.fingerprint}


def parsed_pair(pair: Pair) -> Pair:
    """The pair parsed from its wire strings, because other programs may store no parts, or wrong ones."""
    if not pair.accepted:
        return pair
    if not pair.answer.strip():
        return reject(pair, "empty_answer")
    return msgspec.structs.replace(read_format(pair.question, pair.answer), scores=pair.scores)


def split_rows(shots: Sequence[Shot], fits: Callable[[int, Sequence[Shot]], bool]) -> list[list[Shot]]:
    """The texts as runs of neighbours, with as many texts in a run as fit; `fits(n, run)` checks the n-th run.

    A text that is too long alone loses its last pairs, if necessary all. A run without pairs fits.
    """
    rows: list[list[Shot]] = []
    rest = list(shots)
    while rest:
        number, count = len(rows), 1
        fewer = (replace(rest[0], pairs=rest[0].pairs[:size]) for size in range(len(rest[0].pairs), -1, -1))
        rest[0] = next(shot for shot in fewer if fits(number, [shot]))
        while count < len(rest) and fits(number, rest[: count + 1]):
            count += 1
        rows.append(rest[:count])
        rest = rest[count:]
    return rows


def count_pairs(shots: Sequence[Shot]) -> int:
    return sum(len(shot.pairs) for shot in shots)
