"""The entities of the mini-world and their facts, computed from (seed, entity) alone.

A province holds four entities of each kind. Relations stay inside a province, so that whole provinces can be held out
or kept for tuning and no fact leaks from one to another. Every fourth province stands in the raw corpus, the others in
the tuning data; every fifth raw one is held out from synthesis. Names are bijective in the entity's number: no two
entities of a kind share one. Not guaranteed: that years fit one another (a guild may be older than its founder).
"""

import tomllib
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

from ipt_jax.corpus.settings import UserError

KINDS = ("person", "place", "guild", "work", "event")
SLOTS = 4  # entities of one kind in a province
PROVINCE = SLOTS * len(KINDS)
NAME_BITS = 16  # of a first and a last syllable
HELD_OUT = 5  # every fifth raw province
RAW_STEP = 4  # one province of four is raw, so that the many small tuning ones get short names
YEARS = range(1100, 1500)
CHOICES = 4
_MASK = (1 << 64) - 1

Split = Literal["article", "tuning"]


@cache
def words() -> dict[str, Any]:
    """The data file of wordings, questions, values and frames."""
    return tomllib.loads((files("synth") / "templates" / "miniworld.toml").read_text(encoding="utf-8"))


@cache
def attributes(kind: str) -> tuple[str, ...]:
    return tuple(words()[kind])


def fact_type(kind: str, attribute: str) -> str:
    """What the value is: a kind of entity, "year", or the name of a closed list."""
    return words()[kind][attribute]["type"]


@cache
def closed_values(name: str) -> tuple[str, ...]:
    values = words()["values"]
    if name == "emblem":
        return tuple(f"{colour} {animal}" for colour in values["colour"] for animal in values["animal"])
    return tuple(str(year) for year in YEARS) if name == "year" else tuple(values[name])


@cache
def syllables(part: str) -> tuple[str, ...]:
    """The syllables of one part of a name: every onset with every rime."""
    onsets, rimes = words()["syllables"][part]
    return tuple(onset + rime for onset in onsets.split() for rime in rimes.split())


class Entity(NamedTuple):
    kind: str
    province: int
    slot: int


class Fact(NamedTuple):
    entity: Entity
    attribute: str


@dataclass(frozen=True)
class World:
    """`articles` articles over `entities` raw entities, and `tuning_articles` over entities of their own."""

    seed: int
    articles: int
    entities: int
    tuning_articles: int

    def __post_init__(self) -> None:
        for name in ("articles", "entities", "tuning_articles"):
            if getattr(self, name) < 1:
                raise UserError(f"miniworld: {name} is {getattr(self, name)}; ask for at least 1")
        if self.articles < self.provinces:
            raise UserError(
                f"miniworld: {self.entities:,} entities need at least {self.provinces:,} articles to be told of, "
                f"asked for {self.articles:,}; ask for more articles or fewer entities"
            )

    @property
    def provinces(self) -> int:
        """Raw provinces: asked-for entities are rounded up to whole ones, and one of at least two is held out."""
        return max(2, -(-self.entities // PROVINCE))

    def province(self, split: Split, index: int) -> int:
        """The province of an article. Raw articles go round the provinces; every tuning article has its own."""
        if split == "article":
            return raw_province(index % self.provinces)
        return index // (RAW_STEP - 1) * RAW_STEP + 1 + index % (RAW_STEP - 1)

    def held_out(self, index: int) -> bool:
        """Whether raw article `index` belongs to a province that synthesis is not to see."""
        return is_held_out(index % self.provinces, self.provinces)

    def value(self, fact: Fact) -> str:
        """The true answer, as articles spell it."""
        target = self.target(fact)
        if target is not None:
            return self.name(target)
        values = closed_values(fact_type(fact.entity.kind, fact.attribute))
        return values[self._number(fact) % len(values)]

    def target(self, fact: Fact) -> Entity | None:
        """The entity that a relation leads to, of the same province and never the entity itself; None for others."""
        kind = fact_type(fact.entity.kind, fact.attribute)
        if kind not in KINDS:
            return None
        others = SLOTS - (kind == fact.entity.kind)
        first = fact.entity.slot + 1 if kind == fact.entity.kind else 0
        return Entity(kind, fact.entity.province, (first + self._number(fact) % others) % SLOTS)

    def name(self, entity: Entity) -> str:
        return _name(self.seed, entity)

    def _number(self, fact: Fact) -> int:
        kind, province, slot = fact.entity
        place = KINDS.index(kind) * 8 + attributes(kind).index(fact.attribute)
        return mix(self.seed, place, province * SLOTS + slot) >> 8


def raw_province(place: int) -> int:
    """The number of the raw province at `place` among the raw ones; tuning provinces lie between."""
    return place * RAW_STEP


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


def scramble(number: int, key: int) -> int:
    """A bijection of NAME_BITS-bit numbers that depends on `key`."""
    mask = (1 << NAME_BITS) - 1
    for step in range(3):
        number = (number * (mix(key, step) | 1) + (mix(key, step, 1))) & mask
        number ^= number >> 10
    return number


@lru_cache(4096)
def _name(seed: int, entity: Entity) -> str:
    kind = entity.kind
    more, number = divmod(entity.province * SLOTS + entity.slot, 1 << NAME_BITS)
    number = scramble(number, mix(seed, KINDS.index(kind)))
    middle = ""
    while more:
        more, syllable = divmod(more - 1, len(syllables("middle")))
        middle += syllables("middle")[syllable]
    word = f"{syllables('first')[number & 255]}{middle}{syllables('last')[number >> 8]}"
    if kind == "place":
        return word
    noun = words()["nouns"][kind][mix(number) % len(words()["nouns"][kind])]
    return f"{noun} {word}" if kind == "person" else f"{word} {noun}"


def spelling_book() -> list[str]:
    """The syllables of short names as they stand there, the first behind its space."""
    return [*(f" {syllable}" for syllable in syllables("first")), *syllables("last")]


def province_entities(province: int) -> list[Entity]:
    return [Entity(kind, province, slot) for kind in KINDS for slot in range(SLOTS)]
