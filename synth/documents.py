"""What one group becomes: its Documents, through the filter and the look that was drawn.

Guaranteed: a pure function of (group, settings), whatever stands beside it; inputs are not changed; no Document is
empty; every pair is shown once or counted under a reason. `meta` names the layout, where texts, questions, options,
reasoning and answers stand (`spans`, see synth/pieces.py) and which texts of the group they are (`places`).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec
from pydantic import Field, ValidationInfo, field_validator

from ipt_jax.corpus.records import Document, Pair, Parent, Segment, SynthGroup
from ipt_jax.corpus.settings import Settings
from synth.keep import keeps, read_keep
from synth.layout import Shot, has_example, lay_out
from synth.look import Draws, Layout, draw_look
from synth.parse import read_format, reject

LAYOUT_COUNT = "layout."


class LayoutShares(Settings):
    """How often each layout is drawn; the shares need not sum to one. Those left out are never drawn."""

    text_first: float = Field(0.0, ge=0)
    questions_first: float = Field(0.0, ge=0)
    dialogue: float = Field(0.0, ge=0)
    numbered: float = Field(0.0, ge=0)
    few_shot: float = Field(0.0, ge=0)

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
    name: str
    license: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    license_name: str | None = None
    license_link: str | None = Field(None, validate_default=True)
    language: list[str] = Field(min_length=1)
    format: Literal["parquet", "jsonl"] = "parquet"

    @field_validator("license_link")
    @classmethod
    def _names_the_other(cls, link: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("license") == "other" and not (link and info.data.get("license_name")):
            raise ValueError("license: other needs license_name and license_link; state both")
        return link


class RenderSettings(Settings):
    """The recipe of `synth render`. `one_shot` is the share of groups whose texts become a document each, instead of
    one few-shot document of all. `tokenizer` is for counting tokens only."""

    groups: str
    layouts: LayoutShares = LayoutShares(text_first=0.6, questions_first=0.1, dialogue=0.1, numbered=0.1, few_shot=0.1)
    one_shot: float = Field(0.0, ge=0, le=1)
    keep: str | None = None
    epoch: int = Field(0, ge=0)
    seed: int = 0
    tokenizer: str | None = None
    hub: HubSettings | None = None
    output: str

    @field_validator("layouts")
    @classmethod
    def _draws_something(cls, shares: LayoutShares) -> LayoutShares:
        if not sum(shares.weights.values()):
            raise ValueError("every share is 0; give at least one layout a share")
        return shares

    @field_validator("keep")
    @classmethod
    def _can_be_read(cls, expression: str | None) -> str | None:
        if expression is not None:
            read_keep(expression)
        return expression


def render_group(
    group: SynthGroup, settings: RenderSettings, counts: Counter[str], dropped: Counter[str]
) -> list[Document]:
    """The group's documents; what happened is counted."""
    kept = [kept_pairs(text.pairs, settings.keep, dropped) for text in group.texts]
    shots = [Shot(place, text, pairs) for place, (text, pairs) in enumerate(zip(group.texts, kept, strict=True))]
    counts["pairs"] += sum(len(shot.pairs) for shot in shots)
    if not any(shot.pairs for shot in shots):
        counts["no_pair_left"] += 1
        return raw_documents(group, shots, dropped)
    counts["with_pairs"] += 1
    draws = Draws(settings.seed, group.id, settings.epoch)
    if not draws.chance("one shot", settings.one_shot):
        return [augmented_document(group, group.id, shots, settings, counts)]
    counts["one_shot"] += 1
    alone = [shot for shot in shots if shot.pairs]
    augmented = [augmented_document(group, f"{group.id}.shot{shot.place}", [shot], settings, counts) for shot in alone]
    return augmented + raw_documents(group, [shot for shot in shots if not shot.pairs], dropped)


def augmented_document(
    group: SynthGroup, name: str, shots: Sequence[Shot], settings: RenderSettings, counts: Counter[str]
) -> Document:
    """`shots` as one document, in a look drawn for `name`."""
    draws = Draws(settings.seed, name, settings.epoch)
    look = draw_look(draws, settings.layouts.weights, has_example=has_example(shots))
    counts[LAYOUT_COUNT + look.layout] += 1
    words, spans = lay_out(shots, look, draws)
    texts = [shot.text for shot in shots]
    return Document(
        id=name if settings.epoch == 0 else f"{name}.{settings.epoch}",
        source="+".join(dict.fromkeys(text.source for text in texts)),
        kind="augmented",
        segments=[Segment(text=words)],
        parents=[Parent(text.raw_id, text.start, text.end) for text in texts],
        meta={"layout": look.layout, "spans": spans, "places": [shot.place for shot in shots], **provenance(group)},
    )


def raw_documents(group: SynthGroup, shots: Sequence[Shot], dropped: Counter[str]) -> list[Document]:
    """The texts as they were; a blank one makes no document."""
    documents = []
    for place, text in ((shot.place, shot.text) for shot in shots):
        if not text.text.strip():
            dropped["blank_text"] += 1
            continue
        documents.append(
            Document(
                id=f"{group.id}.raw{place}",
                source=text.source,
                kind="raw",
                segments=[Segment(text=text.text)],
                parents=[Parent(text.raw_id, text.start, text.end)],
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
        if pair.verdict == "rejected":
            dropped[pair.reason or "rejected"] += 1
        elif not keeps(keep, pair):
            dropped["keep"] += 1
        else:
            kept.append((index, pair))
    return kept


def whole_pair(pair: Pair) -> Pair:
    """The pair read again from its wire strings: other programs may leave its parts out, or write none that fit."""
    if pair.verdict == "rejected":
        return pair
    if not pair.answer.strip():
        return reject(pair, "empty_answer")
    return msgspec.structs.replace(read_format(pair.question, pair.answer), scores=pair.scores)
