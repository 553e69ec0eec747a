"""Texts of the mini-world: articles that state its facts, and general instructions that need no facts.

An article states all facts of one person in an order of its own, each sentence with the full name in one of nine
wordings, after an opening of its genre. Instructions are small tasks on words and numbers. They replace the instruction
data of domain recipes (OpenOrca in the paper); no name occurs in them. All choices are drawn from (seed, index).
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from ipt_jax.core.seeding import draw
from synth.miniworld.world import Fact, Split, World, attributes, words

OPENING_SHARE = 0.5
OWN_GENRE_SHARE = 0.75  # of a tuning data set's contexts; the rest keeps few-shot examples stronger than the genre


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
