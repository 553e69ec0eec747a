"""Groups and recipes for the tests of rendering, and pairs as odd as other programs may write them."""

from __future__ import annotations

import random
from collections import Counter

from ipt_jax.core.settings import check_settings
from ipt_jax.corpus.records import Document, GroupText, Pair, SynthGroup
from synth.format.parser import parse_completion
from synth.format.wire import wire_pair
from synth.render.documents import Renderer, RenderSettings
from synth.render.templates import LAYOUTS

EVEN = dict.fromkeys(LAYOUTS, 1.0)
PAIRS = [
    wire_pair("Who built the hall?", "Ann"),
    wire_pair("Where is it?", "Rome", ["Oslo", "Rome", "Bern"]),
    wire_pair("How many rooms?", "4", rationale="Two and two."),
    wire_pair("Which is old?", "the hall", ["the hall", "the barn"], "The barn is new."),
]
# What a renderer may stumble over: the wire format's own strings, placeholders, marks of dialogues, odd characters.
SHARDS = (
    "<QUE>|<ANS>|</END>|<CON>|</CON>|<s>|</s>|\nOptions:|\n- |- |\nLet's think step by step.|"
    "\nTherefore, the answer is |{answer}|{question}|{text}|{0}|{|}|%s|\\1|User: |A. |B|(a)|.|?|\n|\n\n| |\t|\r|\0|"
    "\u202e|\u200b|é|漢字|𝔘|Ann|Rome|12|a long answer of many words|Which|Who|yes|none of these"
).split("|")


def group(name: str, pairs: list[list[Pair]], texts: list[str] | None = None) -> SynthGroup:
    texts = texts or [f"Text {i} of {name}." for i in range(len(pairs))]
    members = [
        GroupText(f"{name}-{i}", 3, 3 + len(text), text, f"src{i}", some, i, 90, 0, 30, "stop")
        for i, (text, some) in enumerate(zip(texts, pairs, strict=True))
    ]
    return SynthGroup(name, members, "tiny", "w" * 64, {"temperature": 0.0}, "f" * 64)


def recipe(**fields: object) -> RenderSettings:
    return check_settings(RenderSettings, {"groups": "groups", "output": "output", **fields}, where="test")


def render(one: SynthGroup, **fields: object) -> list[Document]:
    return Renderer(recipe(**fields), Counter(), Counter()).documents(one)


def odd_group(stream: random.Random, name: str) -> SynthGroup:
    """One to three texts with pairs as a parser reads them, as other programs write them, or as nobody would."""
    texts = [odd_words(stream, 6) for _ in range(stream.randint(1, 3))]
    return group(name, [odd_pairs(stream) for _ in texts], texts)


def odd_pairs(stream: random.Random) -> list[Pair]:
    kind = stream.random()
    if kind < 0.3:
        wire = "".join(f"<QUE> {odd_words(stream, 4)} <ANS> {odd_words(stream, 3)} </END>" for _ in range(4))
        return parse_completion(wire, finished=True)
    if kind < 0.7:
        return [whole_pair(stream, number) for number in range(stream.randint(0, 5))]
    return [
        Pair(
            odd_words(stream, 4),
            odd_words(stream, 3),
            stream.choice(["free", "free_cot", "choice", "choice_cot"]),
            [odd_words(stream, 2) for _ in range(stream.choice([0, 0, 1, 3, 40]))],
            stream.choice([None, "", odd_words(stream, 3)]),
        )
        for _ in range(stream.randint(0, 3))
    ]


def whole_pair(stream: random.Random, number: int) -> Pair:
    options = [f"option {i}" for i in range(stream.choice([0, 2, 5, 26, 27]))]
    answer = stream.choice(options) if options else odd_words(stream, 2)
    return wire_pair(f"{number} {odd_words(stream, 3)}?", answer, options, stream.choice([None, "One, two."]))


def odd_words(stream: random.Random, most: int) -> str:
    return "".join(stream.choices(SHARDS, k=stream.randint(0, most)))
