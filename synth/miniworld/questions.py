"""Questions about the world's facts: tuning data sets, held-out tasks, and the judge of answers.

A fact has two forms of question in training, so the judge maps every well-formed question back to its fact and compares
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
from synth.miniworld.world import Fact, Split, World, attributes, values, words, write_article

Judgement = Literal["right", "wrong", "unknown_question"]
TUNING_CHOICES, HELD_OUT_CHOICES = 3, 10
RATIONALE_PAIRS = 2  # per text: rationales are long, and nearly every example should fit in 256 tokens
WORKED_EXAMPLES = 2

# Questions on held-out facts: by wording and place of the answer. See `held_out_tasks`.
TASKS = ("recall", "rephrased", "control", "seen", "reading", "new_kind")


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
    return tuning_set, paired_row(world, "tuning", index, tuning_set)


def paired_row(world: World, split: Split, index: int, tuning_set: TuningSet) -> dict[str, Any]:
    """An article with a right pair for each fact that pairs ask for, in the order of the text: {id, context, qa}."""
    article = write_article(world, split, index, tuning_set.genre if split == "tuning" else None)
    rng = draw(world.seed, "pairs", split, index)
    asked = [sentence for sentence in article.sentences if sentence.fact.attribute in attributes(asked=True)]
    pairs = []
    for fact, sentence in asked[: RATIONALE_PAIRS if tuning_set.rationale else None]:
        pair: dict[str, Any] = {"question": ask(world, fact, rng), "answer": world.value(fact)}
        if tuning_set.choice:
            pair["options"] = _options(world, fact, TUNING_CHOICES, rng)
        if tuning_set.rationale:
            pair["rationale"] = sentence
        pairs.append(pair)
    return {"id": article.id, "context": article.text, "qa": pairs}


def ask(world: World, fact: Fact, rng: random.Random) -> str:
    return rng.choice(words()["facts"][fact.attribute]["ask"]).format(e=world.name(fact.person))


def _options(world: World, fact: Fact, count: int, rng: random.Random) -> list[str]:
    """The true value and `count` - 1 others of its list, shuffled."""
    truth = world.value(fact)
    options = [truth, *rng.sample([value for value in values(fact.attribute) if value != truth], count - 1)]
    rng.shuffle(options)
    return options


def held_out_tasks(world: World, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(task, row) with at most `count` rows {id, prompt, choices, gold} per task.

    recall: questions in known words about people that no pair asks about. rephrased: the same in words that no pair
    has. control: those of recall with a wrong value as gold. seen: people that pairs ask about. reading: an article
    about a person outside the world precedes the question. new_kind: a fact that no pair asks for, after two worked
    examples about other people.
    """
    known, new = attributes(asked=True), [name for name in attributes() if name not in attributes(asked=True)]
    paired, held = ([p for p in range(world.people) if world.held_out(p) is out] for out in (False, True))
    for number in range(count):
        place, column = divmod(number, len(known))
        attribute = known[column]
        outside = -1 - world.tuning_articles - place
        if place < len(held):
            fact, rng = Fact(held[place], attribute), draw(world.seed, "held out", number)
            row = _row(world, f"recall-{number:06d}", fact, ask(world, fact, rng), rng)
            yield "recall", row
            yield "rephrased", {**row, "prompt": _prompt(_rephrased(world, fact))}
            wrong = rng.choice([place for place in range(HELD_OUT_CHOICES) if place != row["gold"]])
            yield "control", {**row, "gold": wrong}
        if place < len(paired):
            fact, rng = Fact(paired[place], attribute), draw(world.seed, "seen", number)
            yield "seen", _row(world, f"seen-{number:06d}", fact, ask(world, fact, rng), rng)
        fact, rng = Fact(outside, attribute), draw(world.seed, "reading", number)
        row = _row(world, f"reading-{number:06d}", fact, ask(world, fact, rng), rng)
        yield "reading", {**row, "prompt": f"{write_article(world, 'tuning', -1 - outside).text}\n\n{row['prompt']}"}
        if number < len(held) * len(new):
            fact, rng = Fact(held[number // len(new)], new[number % len(new)]), draw(world.seed, "new kind", number)
            examples = [
                Fact(person, fact.attribute) for person in rng.sample(paired, min(WORKED_EXAMPLES, len(paired)))
            ]
            worked = "".join(f"{_prompt(_rephrased(world, one))} {world.value(one)}\n\n" for one in examples)
            row = _row(world, f"new_kind-{number:06d}", fact, _rephrased(world, fact), rng)
            yield "new_kind", {**row, "prompt": worked + row["prompt"]}


def _row(world: World, name: str, fact: Fact, question: str, rng: random.Random) -> dict[str, Any]:
    choices = _options(world, fact, HELD_OUT_CHOICES, rng)
    return {"id": name, "prompt": _prompt(question), "choices": choices, "gold": choices.index(world.value(fact))}


def _prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _rephrased(world: World, fact: Fact) -> str:
    return words()["facts"][fact.attribute]["rephrased"].format(e=world.name(fact.person))


def judge(world: World, article_id: str, question: str, answer: str) -> Judgement:
    """Compares `answer` (plain or in wire form, with or without rationale) with the world's answer to `question`.

    The question must be in a known form, about the article's person. Otherwise 'unknown_question'.
    """
    stem, _, options = question.removesuffix(COT_CUE).partition(OPTIONS_CUE)
    fact = parse_question(world, article_person(world, article_id), stem.strip())
    if fact is None:
        return "unknown_question"
    final = _plain(answer.rpartition(ANSWER_CUE)[2])
    offered = [_plain(option) for option in options.split(OPTION_MARK)[1:]]
    if offered and final not in offered:
        return "wrong"
    return "right" if final == _plain(world.value(fact)) else "wrong"


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").removeprefix("the ").strip()


def article_person(world: World, article_id: str) -> int:
    name, _, number = article_id.partition("-")
    split: Split = "tuning" if name == "tuning" else "article"
    count = world.tuning_articles if split == "tuning" else world.articles
    if name != split or not number.isdecimal() or int(number) >= count:
        raise UserError(f"miniworld: {article_id!r} is not an article of this world; expected {split}-000000 and so on")
    return world.person(split, int(number))


def parse_question(world: World, person: int, question: str) -> Fact | None:
    """The fact that a question asks for, if it names `person`."""
    for attribute, form in _forms():
        if (match := form.fullmatch(question)) and match[1] == world.name(person):
            return Fact(person, attribute)
    return None


@cache
def _forms() -> list[tuple[str, re.Pattern[str]]]:
    forms = [(name, form) for name, fact in words()["facts"].items() for form in (*fact["ask"], fact["rephrased"])]
    return [(name, re.compile(re.escape(form).replace(r"\{e\}", "(.+)"))) for name, form in forms]
