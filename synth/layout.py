"""Lays texts and pairs out as running text: templates from data files, one look for all texts of a group.

Guaranteed: every choice is its own draw from (seed, group, epoch, purpose), so that any two choices combine freely;
options are shuffled for each pair and the answer follows; values are put into templates in one pass, so that a text
that holds '{answer}' stays as it is. The wording of the templates was written for this project.
"""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from ipt_jax.corpus.records import Format, Pair
from ipt_jax.corpus.settings import directory_digest, draw, parse_yaml, uniform
from synth.parse import gold_option
from synth.prompt import final_answer, question_stem

Layout = Literal["text_first", "questions_first", "dialogue", "numbered"]
FORMATS: tuple[Format, ...] = ("free", "free_cot", "choice", "choice_cot")
FOLDER = Path(__file__).parent / "templates"
FILES = tuple(FOLDER / f"{name}.yaml" for name in (*FORMATS, "turns", "options", "layouts"))
PLACEHOLDER = re.compile(r"\{(\w+)\}")
Choice = TypeVar("Choice")


class Turn(msgspec.Struct, frozen=True):
    """A pattern in two parts."""

    ask: str
    reply: str


class OptionStyle(msgspec.Struct, frozen=True):
    labels: Literal["none", "upper", "lower", "numbers"]
    mark: str
    between: str
    answer: str


class Frame(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one layout draws from; the lists that it has no use for are empty."""

    between: list[str]
    openings: list[str]
    bridges: list[str] = []
    speakers: list[tuple[str, str]] = []
    turns: list[str] = []
    marks: list[tuple[str, str]] = []
    headings: list[tuple[str, str]] = []


class Layouts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    bare: float
    separators: list[str]
    text_first: Frame
    questions_first: Frame
    dialogue: Frame
    numbered: Frame


@dataclass(frozen=True)
class Templates:
    patterns: dict[Format, list[str]]
    turns: dict[Format, list[Turn]]
    options: list[OptionStyle]
    layouts: Layouts
    digest: str


@dataclass(frozen=True)
class Look:
    """What was drawn for one group; all its texts share it."""

    layout: Layout
    patterns: dict[Format, str]
    turns: dict[Format, Turn]
    options: OptionStyle
    opening: str
    bridge: str
    between: str
    separator: str
    speakers: tuple[str, str]
    turn: str
    marks: tuple[str, str]
    headings: tuple[str, str]


@cache
def load_templates() -> Templates:
    content = {path.stem: parse_yaml(path.read_text(encoding="utf-8")) for path in FILES}
    return Templates(
        patterns={name: msgspec.convert(content[name], list[str]) for name in FORMATS},
        turns=msgspec.convert(content["turns"], dict[Format, list[Turn]]),
        options=msgspec.convert(content["options"], list[OptionStyle]),
        layouts=msgspec.convert(content["layouts"], Layouts),
        digest=directory_digest(list(FILES)),
    )


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its {placeholders} replaced in one pass: what is put in is never read as a template."""
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


class Draws:
    """The choices of one group in one epoch, each from a stream of its own."""

    def __init__(self, seed: int, group: str, epoch: int) -> None:
        self.keys = (seed, group, epoch)

    def pick(self, purpose: str, choices: Sequence[Choice]) -> Choice:
        return choices[int(uniform(*self.keys, purpose) * len(choices))]

    def weighted(self, purpose: str, weights: Mapping[Layout, float]) -> Layout:
        return draw(*self.keys, purpose).choices(list(weights), list(weights.values()))[0]

    def chance(self, purpose: str, share: float) -> bool:
        return uniform(*self.keys, purpose) < share

    def orders(self, place: int, pairs: Sequence[Pair]) -> list[list[int]]:
        """How the options of each pair of text `place` are shuffled; a filtered neighbour changes nothing."""
        return [self.order(f"options {place} {pair.question}", len(pair.options)) for pair in pairs]

    def order(self, purpose: str, count: int) -> list[int]:
        return draw(*self.keys, purpose).sample(range(count), count) if count else []


def draw_look(draws: Draws, weights: Mapping[Layout, float]) -> Look:
    templates = load_templates()
    layouts = templates.layouts
    layout = draws.weighted("layout", weights)
    frame: Frame = getattr(layouts, layout)
    no_opening, no_bridge = draws.chance("bare opening", layouts.bare), draws.chance("bare bridge", layouts.bare)
    return Look(
        layout=layout,
        patterns={name: draws.pick(f"pattern {name}", templates.patterns[name]) for name in FORMATS},
        turns={name: draws.pick(f"turn {name}", templates.turns[name]) for name in FORMATS},
        options=draws.pick("option style", templates.options),
        opening="{text}" if no_opening else draws.pick("opening", frame.openings),
        bridge="" if no_bridge else draws.pick("bridge", frame.bridges or [""]),
        between=draws.pick("between pairs", frame.between),
        separator=draws.pick("separator", layouts.separators),
        speakers=draws.pick("speakers", frame.speakers or [("", "")]),
        turn=draws.pick("turn line", frame.turns or [""]),
        marks=draws.pick("marks", frame.marks or [("", "")]),
        headings=draws.pick("headings", frame.headings or [("", "")]),
    )


def lay_out(text: str, pairs: Sequence[Pair], look: Look, orders: Sequence[Sequence[int]]) -> str:
    """One text with its pairs, `orders` being how each pair's options are shuffled; without pairs the text alone."""
    if not pairs:
        return text.strip()
    shown = [shown_parts(pair, look.options, order) for pair, order in zip(pairs, orders, strict=True)]
    asker, replier = look.speakers
    values = {"text": text.strip(), "asker": asker, "replier": replier}
    opening, bridge = fill(look.opening, values), fill(look.bridge, values)
    match look.layout:
        case "numbered":
            blocks = [opening, *numbered_blocks(pairs, shown, look)]
        case "dialogue":
            blocks = [opening, bridge, look.between.join(dialogue_turns(pairs, shown, look))]
        case _:
            patterns = (look.patterns[pair.format] for pair in pairs)
            inline = look.between.join(fill(pattern, parts) for pattern, parts in zip(patterns, shown, strict=True))
            blocks = [bridge, inline, opening] if look.layout == "questions_first" else [opening, bridge, inline]
    return "\n\n".join(block for block in blocks if block)


def dialogue_turns(pairs: Sequence[Pair], shown: Sequence[dict[str, str]], look: Look) -> list[str]:
    asker, replier = look.speakers
    turns = []
    for pair, parts in zip(pairs, shown, strict=True):
        turn = look.turns[pair.format]
        said = {"ask": fill(turn.ask, parts), "reply": fill(turn.reply, parts)}
        turns.append(fill(look.turn, {"asker": asker, "replier": replier, **said}))
    return turns


def numbered_blocks(pairs: Sequence[Pair], shown: Sequence[dict[str, str]], look: Look) -> list[str]:
    """All questions under one heading, then all answers under another."""
    asks, replies = [], []
    for number, (pair, parts) in enumerate(zip(pairs, shown, strict=True), 1):
        ask_mark, reply_mark = (fill(mark, {"number": str(number)}) for mark in look.marks)
        asks.append(ask_mark + fill(look.turns[pair.format].ask, parts))
        replies.append(reply_mark + fill(look.turns[pair.format].reply, parts))
    sides = zip(look.headings, (asks, replies), strict=True)
    return [f"{heading}\n{look.between.join(lines)}" for heading, lines in sides]


def shown_parts(pair: Pair, style: OptionStyle, order: Sequence[int]) -> dict[str, str]:
    """What the placeholders of a pair's pattern stand for, with its options in `order`."""
    parts = {"question": question_stem(pair), "answer": final_answer(pair), "rationale": (pair.rationale or "").strip()}
    if pair.options:
        gold = gold_option(pair)
        assert gold is not None, pair
        lines = [{"label": label(style, place), "option": pair.options[i]} for place, i in enumerate(order)]
        parts["options"] = style.between.join(fill(style.mark, line) for line in lines)
        parts["answer"] = fill(style.answer, lines[list(order).index(gold)])
    return parts


def label(style: OptionStyle, place: int) -> str:
    match style.labels:
        case "upper":
            return string.ascii_uppercase[place]
        case "lower":
            return string.ascii_lowercase[place]
        case "numbers":
            return str(place + 1)
    return ""
