"""Entities of the mini-world and their facts, computed from (seed, entity).

A province has four entities of each kind. Relations do not leave a province, so a held-out province shares no fact
with the others. Raw provinces are numbered from zero, and every fifth is held out from synthesis. Each tuning article
has its own province, numbered below zero.

Guarantees: no two raw entities of a kind share a name. Tuning articles use names that no raw entity has, for other
facts in every article, so a synthesizer can learn an answer from the text only.
Does not guarantee: consistent years (a guild may be older than its founder).
"""

import tomllib
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

from ipt_jax.core.errors import UserError

KINDS = ("person", "place", "guild", "work", "event")
SLOTS = 4  # entities of one kind in a province
PROVINCE = SLOTS * len(KINDS)
HELD_OUT = 5  # every fifth raw province
TUNING_NAMES = 3072  # names of each kind that only tuning articles use
YEARS = range(1200, 1328)
_MASK = (1 << 64) - 1

Split = Literal["article", "tuning"]


@cache
def words() -> dict[str, Any]:
    """Wordings, questions, values and frames, from the data file."""
    return tomllib.loads((files("synth.miniworld") / "miniworld.toml").read_text(encoding="utf-8"))


@cache
def attributes(kind: str) -> tuple[str, ...]:
    return tuple(words()[kind])


@cache
def closed_values(name: str) -> tuple[str, ...]:
    values = words()["values"]
    if name == "emblem":
        return tuple(f"{colour} {animal}" for colour in values["colour"] for animal in values["animal"])
    return tuple(str(year) for year in YEARS) if name == "year" else tuple(values[name])


class Entity(NamedTuple):
    kind: str
    province: int
    slot: int


class Fact(NamedTuple):
    entity: Entity
    attribute: str

    @property
    def type(self) -> str:
        """Type of the value: a kind of entity, "year", "emblem", or the name of a list under `values`."""
        return words()[self.entity.kind][self.attribute]["type"]


@dataclass(frozen=True)
class World:
    """`articles` articles over `entities` raw entities, and `tuning_articles` over provinces of their own."""

    seed: int
    articles: int
    entities: int
    tuning_articles: int

    def __post_init__(self) -> None:
        for name in ("articles", "entities", "tuning_articles"):
            if getattr(self, name) < 1:
                raise UserError(f"miniworld: {name} is {getattr(self, name)}; set it to at least 1")
        if self.articles < self.provinces:
            raise UserError(
                f"miniworld: {self.entities:,} entities need at least {self.provinces:,} articles, "
                f"got {self.articles:,}; set more articles"
            )

    @property
    def provinces(self) -> int:
        """Number of raw provinces, at least two. `entities` is rounded up to complete provinces."""
        return max(2, -(-self.entities // PROVINCE))

    def province(self, split: Split, index: int) -> int:
        """The province of an article: raw articles cycle through theirs, each tuning article has its own."""
        return -1 - index if split == "tuning" else index % self.provinces

    def held_out(self, index: int) -> bool:
        """Whether raw article `index` belongs to a province that is held out from synthesis."""
        return is_held_out(index % self.provinces, self.provinces)

    def value(self, fact: Fact) -> str:
        """The true answer, as articles spell it."""
        target = self.target(fact)
        if target is not None:
            return self.name(target)
        values = closed_values(fact.type)
        return values[self._number(fact) % len(values)]

    def target(self, fact: Fact) -> Entity | None:
        """The other entity of the province that a relation leads to. None if the fact is not a relation."""
        if fact.type not in KINDS:
            return None
        others = SLOTS - (fact.type == fact.entity.kind)
        first = fact.entity.slot + 1 if fact.type == fact.entity.kind else 0
        return Entity(fact.type, fact.entity.province, (first + self._number(fact) % others) % SLOTS)

    def name(self, entity: Entity) -> str:
        return _name(self.seed, entity)

    def _number(self, fact: Fact) -> int:
        kind, province, slot = fact.entity
        place = KINDS.index(kind) * 8 + attributes(kind).index(fact.attribute)
        return mix(self.seed, place, province * SLOTS + slot) >> 8


def is_held_out(place: int, provinces: int) -> bool:
    return place % HELD_OUT == HELD_OUT - 1 or (provinces < HELD_OUT and place == provinces - 1)


@cache
def held_out_places(provinces: int) -> list[int]:
    """Places of the held-out provinces among `provinces` raw ones."""
    return [place for place in range(provinces) if is_held_out(place, provinces)]


def mix(*numbers: int) -> int:
    """A 64-bit hash of integers (the finalizer of SplitMix64, chained)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def scramble(number: int, size: int, key: int) -> int:
    """A bijection of the numbers below `size` that depends on `key`."""
    bits = (size - 1).bit_length()
    mask = (1 << bits) - 1
    while True:
        for step in range(3):
            number = (number * (mix(key, step) | 1) + mix(key, step, 1)) & mask
            number ^= number >> max(1, bits // 2)
        if number < size:  # otherwise follow the cycle of the power of two until it is below
            return number


@cache
def name_words() -> tuple[str, ...]:
    """The words of names. Each is one id of the world's tokenizer."""
    syllables = [words()["syllables"][place] for place in ("first", "last")]
    first, last = ([onset + rime for onset in a.split() for rime in b.split()] for a, b in syllables)
    return tuple(one + other for one in first for other in last)


def answer_words() -> list[str]:
    """Every word that an answer may contain. The tokenizer learns each as one id."""
    nouns = [noun for kind in KINDS for noun in words()["nouns"][kind]]
    closed = [word for values in words()["values"].values() for value in values for word in value.split()]
    return list(dict.fromkeys([*name_words(), *nouns, *closed, *map(str, YEARS)]))


@lru_cache(4096)
def _name(seed: int, entity: Entity) -> str:
    kind, place = entity.kind, KINDS.index(entity.kind)
    single, nouns = name_words(), words()["nouns"][kind]
    size = len(single) * len(nouns)
    if entity.province < 0:
        apart = entity.slot * (TUNING_NAMES // SLOTS)  # names of one province differ
        more, number = 0, (mix(seed, place, entity.province) + apart) % TUNING_NAMES
    else:
        more, number = divmod(TUNING_NAMES + entity.province * SLOTS + entity.slot, size)
    noun, word = divmod(scramble(number, size, mix(seed, place)), len(single))
    name = single[word]
    while more:
        more, word = divmod(more - 1, len(single))
        name += " " + single[word]
    return f"{nouns[noun]} {name}" if kind == "person" else f"{name} {nouns[noun]}"


def province_entities(province: int) -> list[Entity]:
    return [Entity(kind, province, slot) for kind in KINDS for slot in range(SLOTS)]
