"""Questions about the world's facts: tuning data sets, held-out tasks, and the judge of answers.

A fact has two forms of question, so the judge maps every well-formed question back to (entity, attribute) and compares
the answer with the world's. A question in other words is `unknown_question`, never `right`.
"""

import random
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

from ipt_jax.core.errors import UserError
from ipt_jax.core.seeding import draw
from synth.format.wire import ANSWER_CUE, COT_CUE, OPTION_MARK, OPTIONS_CUE
from synth.miniworld.articles import Article, write_article
from synth.miniworld.world import (
    KINDS,
    SLOTS,
    Entity,
    Fact,
    Split,
    World,
    closed_values,
    held_out_places,
    province_entities,
    words,
)

Judgement = Literal["right", "wrong", "unknown_question"]
TUNING_CHOICES, HELD_OUT_CHOICES = 3, 4
RATIONALE_PAIRS = 3  # per text: rationales are long, and nearly every example should fit in 256 tokens


class TuningSet(NamedTuple):
    name: str
    genre: str
    choice: bool
    rationale: bool


# Each data set has its own task format and its own genre, as real collections have their domains.
TUNING_SETS = (
    TuningSet("chronicle_free", "chronicle", choice=False, rationale=False),
    TuningSet("gazette_choice", "gazette", choice=True, rationale=False),
    TuningSet("lecture_free_cot", "lecture", choice=False, rationale=True),
    TuningSet("letter_choice_cot", "letter", choice=True, rationale=True),
)


def tuning_row(world: World, index: int) -> tuple[TuningSet, dict[str, Any]]:
    """Tuning article `index` with its pairs, and its data set."""
    tuning_set = TUNING_SETS[index % len(TUNING_SETS)]
    article = write_article(world, "tuning", index, tuning_set.genre)
    rng = draw(world.seed, "pairs", index)
    pairs = []
    for fact, sentence in article.sentences[: RATIONALE_PAIRS if tuning_set.rationale else None]:
        pair: dict[str, Any] = {"question": ask(world, fact, rng), "answer": world.value(fact)}
        if tuning_set.choice:
            pair["options"] = _options(world, fact, TUNING_CHOICES, _article_options(world, article, fact), rng)
        if tuning_set.rationale:
            pair["rationale"] = sentence
        pairs.append(pair)
    return tuning_set, {"id": article.id, "context": article.text, "qa": pairs}


def _article_options(world: World, article: Article, asked: Fact) -> list[str]:
    """Options for a question from its article: values of the answer's type, then, for entities, other names.

    A model can copy from the text. It could only guess invented names, and would learn to guess.
    """
    facts = [sentence.fact for sentence in article.sentences]
    known = [(fact.type, world.value(fact)) for fact in facts]
    known += [(fact.entity.kind, world.name(fact.entity)) for fact in facts if fact.entity != asked.entity]
    known = [(kind, value) for kind, value in known if value != world.name(asked.entity)]
    same = [value for kind, value in known if kind == asked.type]
    return same + [value for kind, value in known if kind in KINDS and asked.type in KINDS and kind != asked.type]


def ask(world: World, fact: Fact, rng: random.Random) -> str:
    forms = words()[fact.entity.kind][fact.attribute]["ask"]
    return rng.choice(forms).format(e=world.name(fact.entity))


def _options(world: World, fact: Fact, count: int, first: list[str], rng: random.Random) -> list[str]:
    """The true value and others of its type: those in `first`, then drawn ones, shuffled."""
    truth = world.value(fact)
    others = [value for value in dict.fromkeys(first) if value != truth]
    while len(others) < count - 1:
        other = _random_value(world, fact, rng)
        if other != truth and other not in others:
            others.append(other)
    options = [truth, *others[: count - 1]]
    rng.shuffle(options)
    return options


def _random_value(world: World, fact: Fact, rng: random.Random) -> str:
    """A value of the fact's type: from its list, or an entity of a province with the same use."""
    if fact.type not in KINDS:
        return rng.choice(closed_values(fact.type))
    if fact.entity.province < 0:
        province = world.province("tuning", rng.randrange(world.tuning_articles))
    else:
        province = rng.choice(held_out_places(world.provinces))
    return world.name(Entity(fact.type, province, rng.randrange(SLOTS)))


def held_out_questions(world: World, count: int) -> Iterator[dict[str, Any]]:
    """At most `count` rows {id, prompt, choices, gold} on facts in articles of held-out provinces."""
    asked = 0
    for place in held_out_places(world.provinces):
        facts: dict[Fact, None] = {}
        for index in range(place, world.articles, world.provinces):
            facts.update(dict.fromkeys(s.fact for s in write_article(world, "article", index).sentences))
        for fact in facts:
            if asked == count:
                return
            rng = draw(world.seed, "held out", asked)
            choices = _options(world, fact, HELD_OUT_CHOICES, [], rng)
            prompt, gold = f"Question: {ask(world, fact, rng)}\nAnswer:", choices.index(world.value(fact))
            yield {"id": f"heldout-{asked:06d}", "prompt": prompt, "choices": choices, "gold": gold}
            asked += 1


def judge(world: World, article_id: str, question: str, answer: str) -> Judgement:
    """Compares `answer` (plain or in wire form, with or without rationale) with the world's answer to `question`.

    The question must be in a known form, about an entity of the article's province. Otherwise 'unknown_question'.
    """
    stem, _, options = question.removesuffix(COT_CUE).partition(OPTIONS_CUE)
    fact = parse_question(world, article_province(world, article_id), stem.strip())
    if fact is None:
        return "unknown_question"
    final = _plain(answer.rpartition(ANSWER_CUE)[2])
    offered = [_plain(option) for option in options.split(OPTION_MARK)[1:]]
    if offered and final not in offered:
        return "wrong"
    return "right" if final == _plain(world.value(fact)) else "wrong"


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").removeprefix("the ").strip()


def article_province(world: World, article_id: str) -> int:
    name, _, number = article_id.partition("-")
    split: Split = "tuning" if name == "tuning" else "article"
    count = world.tuning_articles if split == "tuning" else world.articles
    if name != split or not number.isdecimal() or int(number) >= count:
        raise UserError(f"miniworld: {article_id!r} is not an article of this world; expected {split}-000000 and so on")
    return world.province(split, int(number))


def parse_question(world: World, province: int, question: str) -> Fact | None:
    """The fact that a question asks for, if its entity is in `province`."""
    named = {(entity.kind, world.name(entity)): entity for entity in province_entities(province)}
    for kind, attribute, form in _forms():
        if (match := form.fullmatch(question)) and (entity := named.get((kind, match[1]))):
            return Fact(entity, attribute)
    return None


@cache
def _forms() -> list[tuple[str, str, re.Pattern[str]]]:
    forms = [(kind, name, form) for kind in KINDS for name, fact in words()[kind].items() for form in fact["ask"]]
    return [(kind, name, re.compile(re.escape(form).replace(r"\{e\}", "(.+)"))) for kind, name, form in forms]
