"""Questions about the world's facts: the tuning data sets, the held-out tasks, and the judge that knows the truth.

A question is one of two forms a kind of fact, so the judge reads every well-formed one back to (entity, attribute) and
compares the answer with the world's own; what a synthesizer asks in other words is `unknown_question`, never `right`.
"""

import random
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

from ipt_jax.core.errors import UserError
from ipt_jax.core.seeding import draw
from synth.format.wire import ANSWER_CUE, COT_CUE, OPTION_MARK, OPTIONS_CUE
from synth.miniworld.articles import Article, Sentence, write_article
from synth.miniworld.world import (
    CHOICES,
    KINDS,
    SLOTS,
    Entity,
    Fact,
    Split,
    World,
    closed_values,
    fact_type,
    held_out_places,
    province_entities,
    words,
)

Verdict = Literal["right", "wrong", "unknown_question"]
TUNING_CHOICES = 3
RATIONALE_PAIRS = 3  # a text: reasoning is long, and nearly every example is to fit 256 tokens


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
    """Tuning article `index` with its pairs, and the data set it belongs to."""
    tuning_set = TUNING_SETS[index % len(TUNING_SETS)]
    article = write_article(world, "tuning", index, tuning_set.genre)
    rng = draw(world.seed, "pairs", index)
    asked = article.sentences[: RATIONALE_PAIRS if tuning_set.rationale else None]
    pairs = [_pair(world, article, sentence, tuning_set, rng) for sentence in asked]
    return tuning_set, {"id": article.id, "context": article.text, "qa": pairs}


def _pair(
    world: World, article: Article, sentence: Sentence, tuning_set: TuningSet, rng: random.Random
) -> dict[str, Any]:
    fact = sentence.fact
    row: dict[str, Any] = {"question": ask(world, fact, rng), "answer": world.value(fact)}
    if tuning_set.choice:
        row["options"] = _options(world, fact, TUNING_CHOICES, _told(world, article, fact), rng)
    if tuning_set.rationale:
        row["rationale"] = sentence.text
    return row


def _told(world: World, article: Article, asked: Fact) -> list[str]:
    """Options that an article offers for a question: its values of the answer's type, then, for entities, other names.

    What stands in the text can be copied from it; invented names could only be guessed, and would teach to guess.
    """
    facts = [sentence.fact for sentence in article.sentences]
    told = [(_type(fact), world.value(fact)) for fact in facts]
    told += [(fact.entity.kind, world.name(fact.entity)) for fact in facts if fact.entity != asked.entity]
    told = [(kind, value) for kind, value in told if value != world.name(asked.entity)]
    same = [value for kind, value in told if kind == _type(asked)]
    return same + [value for kind, value in told if kind in KINDS and _type(asked) in KINDS and kind != _type(asked)]


def ask(world: World, fact: Fact, rng: random.Random) -> str:
    forms = words()[fact.entity.kind][fact.attribute]["ask"]
    return rng.choice(forms).format(e=world.name(fact.entity))


def _options(world: World, fact: Fact, count: int, first: list[str], rng: random.Random) -> list[str]:
    """The true value and others of its type: those in `first`, then drawn ones; shuffled."""
    truth = world.value(fact)
    others = [value for value in dict.fromkeys(first) if value != truth]
    while len(others) < count - 1:
        other = random_value(world, fact, rng)
        if other != truth and other not in others:
            others.append(other)
    options = [truth, *others[: count - 1]]
    rng.shuffle(options)
    return options


def random_value(world: World, fact: Fact, rng: random.Random) -> str:
    """A value of the fact's type: from its list, or an entity of a province that has the same use."""
    kind = _type(fact)
    if kind not in KINDS:
        return rng.choice(closed_values(kind))
    if fact.entity.province < 0:
        province = world.province("tuning", rng.randrange(world.tuning_articles))
    else:
        province = rng.choice(held_out_places(world.provinces))
    return world.name(Entity(kind, province, rng.randrange(SLOTS)))


def _type(fact: Fact) -> str:
    return fact_type(fact.entity.kind, fact.attribute)


class HeldOut(NamedTuple):
    id: str
    prompt: str
    choices: list[str]
    gold: int


def held_out_questions(world: World, count: int) -> Iterator[HeldOut]:
    """At most `count` closed-book questions on facts that articles of held-out provinces tell."""
    asked = 0
    for place in held_out_places(world.provinces):
        facts: dict[Fact, None] = {}
        for index in range(place, world.articles, world.provinces):
            facts.update(dict.fromkeys(s.fact for s in write_article(world, "article", index).sentences))
        for fact in facts:
            if asked == count:
                return
            rng = draw(world.seed, "held out", asked)
            choices = _options(world, fact, CHOICES, [], rng)
            prompt = f"Question: {ask(world, fact, rng)}\nAnswer:"
            yield HeldOut(f"heldout-{asked:06d}", prompt, choices, choices.index(world.value(fact)))
            asked += 1


def judge(world: World, article_id: str, question: str, answer: str) -> Verdict:
    """Whether `answer` (plain or in wire form, reasoning included) is the world's answer to `question`.

    The question must be one of the known forms about an entity of the article's province, else 'unknown_question'.
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


def article_province(world: World, article_id: str) -> int:
    name, _, number = article_id.partition("-")
    split: Split = "tuning" if name == "tuning" else "article"
    count = world.tuning_articles if split == "tuning" else world.articles
    if name != split or not number.isdecimal() or int(number) >= count:
        raise UserError(f"miniworld: {article_id!r} is no article of this world; expected {split}-000000 and so on")
    return world.province(split, int(number))


def parse_question(world: World, province: int, question: str) -> Fact | None:
    """The fact that a question asks for, when its entity lives in `province`."""
    named = {(entity.kind, world.name(entity)): entity for entity in province_entities(province)}
    for kind, attribute, form in _forms():
        if (match := form.fullmatch(question)) and (entity := named.get((kind, match[1]))):
            return Fact(entity, attribute)
    return None


@cache
def _forms() -> list[tuple[str, str, re.Pattern[str]]]:
    forms = [(kind, name, form) for kind in KINDS for name, fact in words()[kind].items() for form in fact["ask"]]
    return [(kind, name, re.compile(re.escape(form).replace(r"\{e\}", "(.+)"))) for kind, name, form in forms]


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").removeprefix("the ").strip()
