"""People of the mini-world, the facts about them and the articles that state these, computed from (seed, person).

Raw people are numbered from zero; some of them are held out, and no pair asks about these. Each tuning article is about
a person of its own, numbered below zero.

Guarantees: no two raw people share a name. Tuning people have names that no raw person has, with other facts in every
article, so a synthesizer can learn an answer from the text only. No fact determines another. An article states all
facts of one person in an order of its own, each sentence with the full name in one of nine wordings. Instructions need
no facts and contain no name; they replace the instruction data of domain recipes (OpenOrca in the paper).
"""

import random
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

from ipt_jax.core.errors import UserError
from ipt_jax.core.seeding import draw

NAME_WORDS = 128  # first names, and last names
INVENTED = ("town", "guild", "master")  # lists of values that are invented words
VALUES = 32  # in each list of values
TUNING_NAMES = 8192  # that only tuning people have
_MASK = (1 << 64) - 1
OPENING_SHARE = 0.5
OWN_GENRE_SHARE = 0.75  # of a tuning data set's contexts; the rest keeps few-shot examples stronger than the genre

Split = Literal["article", "tuning"]


@cache
def words() -> dict[str, Any]:
    """Wordings, questions and values, from the data file."""
    return tomllib.loads((files("synth.miniworld") / "miniworld.toml").read_text(encoding="utf-8"))


@cache
def attributes(asked: bool = False) -> tuple[str, ...]:
    """The facts of a person. `asked`: only those that pairs ask for."""
    return tuple(name for name, fact in words()["facts"].items() if fact["ask"] or not asked)


@cache
def values(attribute: str) -> tuple[str, ...]:
    name = words()["facts"][attribute]["values"]
    if name not in INVENTED:
        return tuple(words()["values"][name])
    start = 2 * NAME_WORDS + INVENTED.index(name) * VALUES
    return invented_words()[start : start + VALUES]


class Fact(NamedTuple):
    person: int
    attribute: str


@dataclass(frozen=True)
class World:
    """`articles` articles about `people` raw people in turn, `tuning_articles` about people of their own.

    `paired` is the share of raw people whose articles synthesis may convert.
    """

    seed: int
    articles: int
    people: int
    tuning_articles: int
    paired: float = 0.5

    def __post_init__(self) -> None:
        for name, least in (("articles", 2), ("people", 2), ("tuning_articles", 1)):
            if getattr(self, name) < least:
                raise UserError(f"miniworld: {name} is {getattr(self, name)}; set it to at least {least}")
        if self.articles < self.people:
            raise UserError(
                f"miniworld: {self.people:,} people need as many articles, got {self.articles:,}; set more articles"
            )
        if not 0 < self.paired < 1:
            raise UserError(f"miniworld: paired is {self.paired}; set a share between 0 and 1")

    def person(self, split: Split, index: int) -> int:
        """The person of an article."""
        return -1 - index if split == "tuning" else index % self.people

    def held_out(self, person: int) -> bool:
        """Whether no pair asks about this raw person. Evenly spread; the last one is."""
        share = 1 - self.paired
        return int((person + 1) * share + 1e-9) > int(person * share + 1e-9) or person == self.people - 1

    def value(self, fact: Fact) -> str:
        """The true answer, as articles spell it."""
        choices = values(fact.attribute)
        place = attributes().index(fact.attribute)
        return choices[(mix(self.seed, place, fact.person) >> 8) % len(choices)]

    def name(self, person: int) -> str:
        """First and last name. Worlds of more than 8,192 people need more last names."""
        if person < 0:
            number, more = mix(self.seed, person) % TUNING_NAMES, 0
        else:
            more, number = divmod(TUNING_NAMES + person, NAME_WORDS**2)
        first, last = divmod(scramble(number, NAME_WORDS**2, mix(self.seed)), NAME_WORDS)
        name = f"{invented_words()[first]} {invented_words()[NAME_WORDS + last]}"
        while more:
            more, last = divmod(more - 1, NAME_WORDS)
            name += f" {invented_words()[NAME_WORDS + last]}"
        return name


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
def invented_words() -> tuple[str, ...]:
    """First names, last names, then the invented values. Each is one id of the world's tokenizer."""
    syllables = [words()["syllables"][place] for place in ("first", "last")]
    first, last = ([onset + rime for onset in a.split() for rime in b.split()] for a, b in syllables)
    made = [one + other for one in first for other in last]
    return tuple(made[scramble(place, len(made), 0)] for place in range(len(made)))


def answer_words() -> list[str]:
    """Every word that a name or an answer may contain. The tokenizer learns each as one id."""
    closed = [value for listed in words()["values"].values() for value in listed]
    return list(dict.fromkeys([*invented_words(), *closed]))


# ---- articles and instructions


class Sentence(NamedTuple):
    fact: Fact
    text: str


class Article(NamedTuple):
    id: str
    genre: str
    text: str
    sentences: list[Sentence]  # those that state a fact, in the order of the text


def write_article(world: World, split: Split, index: int, genre: str | None = None) -> Article:
    """Article `index`. `genre`: the genre of most articles of its tuning data set."""
    rng = draw(world.seed, "article", split, index)
    genres = words()["genres"]
    if genre is None or rng.random() >= OWN_GENRE_SHARE:
        genre = rng.choice(list(genres))
    person = world.person(split, index)
    facts = [Fact(person, name) for name in rng.sample(attributes(), len(attributes()))]
    sentences = [Sentence(fact, _say(world, fact, rng)) for fact in facts]
    parts = [sentence.text for sentence in sentences]
    if rng.random() < OPENING_SHARE:
        parts.insert(0, rng.choice(genres[genre]))
    return Article(f"{split}-{index:06d}", genre, " ".join(parts), sentences)


def _say(world: World, fact: Fact, rng: random.Random) -> str:
    wording = rng.choice(words()["facts"][fact.attribute]["say"])
    clause = wording.format(e=world.name(fact.person), v=world.value(fact))
    return f"{clause[0].upper()}{clause[1:]}."


# Tasks on a few different words: the fewest and the most words, and the response.
WORD_TASKS: dict[str, tuple[int, int, Callable[[list[str]], str]]] = {
    "repeat": (2, 5, " ".join),
    "reverse": (2, 4, lambda chosen: " ".join(reversed(chosen))),
    "sort": (2, 4, lambda chosen: " ".join(sorted(chosen))),
    "count": (2, 7, lambda chosen: str(len(chosen))),
    "first": (2, 5, lambda chosen: chosen[0]),
    "last": (2, 5, lambda chosen: chosen[-1]),
}


def write_instruction(seed: int, index: int) -> dict[str, Any]:
    """Row {id, task, prompt, response}."""
    rng = draw(seed, "instruction", index)
    prompts, values = words()["instructions"], words()["values"]
    task = list(prompts)[index % len(prompts)]
    if task in WORD_TASKS:
        fewest, most, respond = WORD_TASKS[task]
        plain = [*values["trade"], *values["product"], *values["animal"], *values["prize"]]
        chosen = rng.sample(plain, rng.randint(fewest, most))
        asked, response = " ".join(chosen), respond(chosen)
    elif task == "add":
        left, right = rng.randint(1, 20), rng.randint(1, 20)
        asked, response = f"{left} plus {right}", str(left + right)
    else:  # odd_one_out
        chosen = rng.sample(values["animal"], 3)
        response = rng.choice([word for word in values["product"] if word not in values["animal"]])
        chosen.append(response)
        rng.shuffle(chosen)
        asked = ", ".join(chosen)
    return {"id": f"instruction-{index:06d}", "task": task, "prompt": prompts[task].format(asked), "response": response}
