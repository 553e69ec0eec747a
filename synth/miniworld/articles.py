"""Texts of the mini-world: articles that state its facts, and general instructions that need no facts.

An article has a frame of its genre. It states two facts of one entity, then facts of the entities that these lead to,
each sentence in one of at least eight wordings. Instructions are small tasks on words and numbers. They replace the
instruction data of domain recipes (OpenOrca in the paper); no name of any province occurs in them. All choices are
drawn from (seed, index).
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from ipt_jax.core.seeding import draw
from synth.miniworld.world import PROVINCE, Entity, Fact, Split, World, attributes, province_entities, words

MAX_FACTS = 3
FILLER_SHARE = 0.2
LEAD_SHARE = 0.15
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
    sentences = [Sentence(fact, _say(world, fact, rng)) for fact in choose_facts(world, split, index, rng)]
    parts = [rng.choice(genres[genre]["open"]), *(sentence.text for sentence in sentences)]
    if rng.random() < FILLER_SHARE:
        parts.insert(rng.randint(2, len(parts)), rng.choice(words()["prose"]["filler"]))
    parts.append(rng.choice(genres[genre]["close"]))
    return Article(f"{split}-{index:06d}", genre, " ".join(parts), sentences)


def choose_facts(world: World, split: Split, index: int, rng: random.Random) -> list[Fact]:
    """Two facts of the article's entity, then facts of entities that they lead to, at most MAX_FACTS."""
    entities = province_entities(world.province(split, index))
    visits = rng.randrange(4 * PROVINCE)  # a tuning article starts anywhere in the round that raw articles follow
    visit, place = divmod(index, world.provinces) if split == "article" else (visits, 0)
    focus = entities[(visit + place) * 7 % PROVINCE]  # 20 visits meet all; neighbours differ in kind
    facts = _facts_from(focus, start=2 * (visit // PROVINCE), count=2)
    led_to = [target for fact in facts if (target := world.target(fact)) is not None]
    others = list(dict.fromkeys(led_to)) or [rng.choice([one for one in entities if one != focus])]
    for other in others:
        facts += _facts_from(other, start=rng.randrange(4), count=rng.choice((1, 2)))
    return facts[:MAX_FACTS]


def _facts_from(entity: Entity, start: int, count: int) -> list[Fact]:
    """`count` facts of `entity` from the `start`-th on, in a circle, so that repeated visits cover all of them."""
    names = attributes(entity.kind)
    return [Fact(entity, names[(start + step) % len(names)]) for step in range(count)]


def _say(world: World, fact: Fact, rng: random.Random) -> str:
    wording = rng.choice(words()[fact.entity.kind][fact.attribute]["say"])
    clause = wording.format(e=world.name(fact.entity), v=world.value(fact))
    if rng.random() < LEAD_SHARE:
        clause = rng.choice(words()["prose"]["lead"]) + clause
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
