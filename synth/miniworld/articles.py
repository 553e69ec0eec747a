"""Articles: which facts an article tells, and in which words.

An article is framed by its genre, tells two facts of one entity, then facts of the entities that these lead
to, each sentence in one of at least eight wordings. All choices come from (seed, article).
"""

import random
from typing import NamedTuple

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
    sentences: list[Sentence]  # those that tell a fact, in the order of the text


def article_id(split: Split, index: int) -> str:
    return f"{split}-{index:06d}"


def write_article(world: World, split: Split, index: int, genre: str | None = None) -> Article:
    """Article `index`; `genre` is what a tuning data set asks for, most of the time."""
    rng = draw(world.seed, "article", split, index)
    genres = list(words()["genres"])
    if genre is None or rng.random() >= OWN_GENRE_SHARE:
        genre = rng.choice(genres)
    sentences = [Sentence(fact, _say(world, fact, rng)) for fact in choose_facts(world, split, index, rng)]
    frame = words()["genres"][genre]
    parts = [rng.choice(frame["open"]), *(sentence.text for sentence in sentences)]
    if rng.random() < FILLER_SHARE:
        parts.insert(rng.randint(2, len(parts)), rng.choice(words()["prose"]["filler"]))
    parts.append(rng.choice(frame["close"]))
    return Article(article_id(split, index), genre, " ".join(parts), sentences)


def choose_facts(world: World, split: Split, index: int, rng: random.Random) -> list[Fact]:
    """Two facts of the article's entity, then facts of entities that they lead to; MAX_FACTS at most."""
    entities = province_entities(world.province(split, index))
    visits = rng.randrange(4 * PROVINCE)  # tuning articles begin anywhere in what raw ones tell one after another
    visit, place = divmod(index, world.provinces) if split == "article" else (visits, 0)
    focus = entities[(visit + place) * 7 % PROVINCE]  # 20 visits meet all; neighbours differ in kind
    facts = _facts_from(focus, start=2 * (visit // PROVINCE), count=2)
    led_to = [target for fact in facts if (target := world.target(fact)) is not None]
    others = list(dict.fromkeys(led_to)) or [rng.choice([one for one in entities if one != focus])]
    for other in others:
        facts += _facts_from(other, start=rng.randrange(4), count=rng.choice((1, 2)))
    return facts[:MAX_FACTS]


def _facts_from(entity: Entity, start: int, count: int) -> list[Fact]:
    """`count` facts of `entity` from the `start`-th on, round and round: repeated visits tell all of them."""
    names = attributes(entity.kind)
    return [Fact(entity, names[(start + step) % len(names)]) for step in range(count)]


def _say(world: World, fact: Fact, rng: random.Random) -> str:
    wording = rng.choice(words()[fact.entity.kind][fact.attribute]["say"])
    clause = wording.format(e=world.name(fact.entity), v=world.value(fact))
    if rng.random() < LEAD_SHARE:
        clause = rng.choice(words()["prose"]["lead"]) + clause
    return f"{clause[0].upper()}{clause[1:]}."
