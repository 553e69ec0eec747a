"""Question-answer pairs with their texts, and the faults that a pair can have. Faults are made from correct pairs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

from ipt_jax.corpus.records import Pair
from synth.format.wire import wire_pair
from synth.text.words import NEGATIONS, is_content, plain_word, words

AUXILIARIES = frozenset(
    "is are was were am be had has have did does do could can would will should must may might".split()
)
OPTIONS = 4
# Right pairs of other languages: on an English text they are of the wrong one.
FOREIGN = [
    ("Wer wohnt in dem alten Haus am Fluss?", "der König und seine drei Töchter"),
    ("Warum weinte das Mädchen?", "Sie hatte ihren Ring verloren."),
    ("Où allait la jeune fille ?", "Elle allait chercher de l'eau à la rivière."),
    ("Qui a trouvé l'anneau ?", "le plus jeune des trois frères"),
    ("¿Quién vivía en el castillo?", "un rey muy viejo y su hija"),
    ("¿Por qué volvió el príncipe?", "Había olvidado su espada."),
    ("Chi aprì la porta?", "una vecchia che portava un mantello nero"),
    ("Waarom ging de jongen naar het bos?", "Hij zocht zijn verloren paard."),
    ("Quem ajudou a princesa?", "um pescador que passava pela praia"),
    ("Кто жил в лесу?", "старый медведь и его сын"),
    ("谁住在那座山上？", "老国王和他的女儿"),
    ("王子はなぜ泣きましたか。", "指輪をなくしたからです。"),
    ("من وجد الخاتم؟", "أصغر الإخوة الثلاثة"),
    ("राजा कहाँ रहता था?", "नदी के पास एक पुराने महल में"),
    ("Kto otworzył drzwi?", "stara kobieta w czarnym płaszczu"),
    ("Vem bodde i slottet?", "en gammal kung och hans dotter"),
]


class Case(NamedTuple):
    """A pair with its text. Texts of one `story` belong together. `choices` are the options that it may get."""

    story: str
    context: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def pair(self) -> Pair:
        return wire_pair(self.question, self.answer, self.choices)


def read_cases(path: Path) -> list[Case]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Case(row.get("story", row["id"]), row["context"], one["question"], one["answer"])
        for row in rows
        for one in row["qa"]
    ]


class Corrupter:
    """Draws of one seed; the right and the wrong case of each fault, or None where a case does not allow it."""

    def __init__(self, cases: list[Case], seed: int) -> None:
        self.cases, self.rng = cases, Random(seed)
        self.beside: dict[str, list[Case]] = {}
        self.names: dict[str, set[str]] = {}
        for case in cases:
            self.beside.setdefault(case.context, []).append(case)
            self.names.setdefault(case.story, set()).update(names(case.context))
        self.stories = sorted(self.names)
        assert len(self.stories) > 1, "wrong answers are taken from other stories"

    def elsewhere(self, case: Case) -> Case:
        """A case of another story."""
        while (other := self.rng.choice(self.cases)).story == case.story:
            continue
        return other

    def swapped(self, case: Case) -> Case:
        return case._replace(answer=self.elsewhere(case).answer)

    def swapped_same_text(self, case: Case) -> Case | None:
        others = [other.answer for other in self.beside[case.context] if other.answer != case.answer]
        return case._replace(answer=self.rng.choice(others)) if others else None

    def question_swapped(self, case: Case) -> Case:
        return case._replace(question=self.elsewhere(case).question)

    def entity_swapped(self, case: Case) -> Case | None:
        """Replaces a name or number of the answer by one of another story."""
        while (story := self.rng.choice(self.stories)) == case.story:
            continue
        return self.rename(case, self.names[case.story], sorted(self.names[story] - self.names[case.story]))

    def entity_same_text(self, case: Case) -> Case | None:
        """Replaces a name or number of the answer by another one of the same text."""
        here = names(case.context)
        return self.rename(case, here, sorted(here))

    def rename(self, case: Case, known: set[str], others: list[str]) -> Case | None:
        mine = [word for word in words(case.answer) if word in known]
        word = self.rng.choice(mine) if mine else ""
        others = [other for other in others if other != word and other[0].isdigit() == word[:1].isdigit()]
        if not word or not others:
            return None
        answer = re.sub(rf"\b{re.escape(word)}\b", self.rng.choice(others), case.answer)
        return case._replace(answer=answer)

    def negation_added(self, case: Case) -> Case | None:
        told = case.answer.split()
        plain = [plain_word(word.strip(".,;")) for word in told]
        if any(word in NEGATIONS or word.endswith("n't") for word in plain):
            return None
        place = next((place for place, word in enumerate(plain) if word in AUXILIARIES), None)
        if place is not None:
            return case._replace(answer=" ".join([*told[: place + 1], "not", *told[place + 1 :]]))
        past = next((place for place, word in enumerate(plain[:4]) if word.endswith("ed")), None)
        if past is not None:
            return case._replace(answer=" ".join([*told[:past], "never", *told[past:]]))
        return case._replace(answer=f"not {case.answer}") if len(told) <= 2 else None

    def negation_removed(self, case: Case) -> Case | None:
        told = case.answer.split()
        for place, word in enumerate(told):
            if plain_word(word) in ("not", "never"):
                return case._replace(answer=" ".join(told[:place] + told[place + 1 :]))
            if plain_word(word).endswith("n't") and plain_word(word) not in ("can't", "won't"):
                told[place] = word[:-3]
                return case._replace(answer=" ".join(told))
        return None

    def foreign(self, case: Case) -> Case:
        question, answer = self.rng.choice(FOREIGN)
        return case._replace(question=question, answer=answer)

    def looped(self, case: Case) -> Case:
        """The answer runs in circles, as small models do."""
        return case._replace(answer=" ".join([case.answer] * self.rng.randint(2, 5)))

    def chosen(self, case: Case, *, same_text: bool) -> tuple[Case, Case] | None:
        """The case with options, the right one chosen; and one of the others chosen."""
        if same_text:
            others = sorted({other.answer for other in self.beside[case.context]} - {case.answer})
            others = self.rng.sample(others, min(OPTIONS - 1, len(others)))
        else:
            others = sorted({self.elsewhere(case).answer for _ in range(OPTIONS - 1)} - {case.answer})
        if not others:
            return None
        choices = self.rng.sample([case.answer, *others], len(others) + 1)
        right = case._replace(choices=tuple(choices))
        return right, right._replace(answer=self.rng.choice(others))


def names(text: str) -> set[str]:
    """Capitalised words that never occur in lower case, and numbers."""
    found = words(text)
    lower = {word for word in found if word[0].islower()}
    return {
        word
        for word in found
        if word[0].isdigit()
        or (word[0].isupper() and len(word) > 2 and is_content(word) and plain_word(word) not in lower)
    }


def corrupt(cases: list[Case], seed: int) -> dict[str, list[tuple[Case, Case]]]:
    """For each fault, the right cases that allow it, each with its wrong one."""
    maker = Corrupter(cases, seed)
    kinds: dict[str, Callable[[Case], Case | None]] = {
        "swapped": maker.swapped,
        "swapped, same text": maker.swapped_same_text,
        "question swapped": maker.question_swapped,
        "entity swapped": maker.entity_swapped,
        "entity, same text": maker.entity_same_text,
        "negation added": maker.negation_added,
        "negation removed": maker.negation_removed,
        "other language": maker.foreign,
        "looped": maker.looped,
    }
    found = {
        kind: [(case, wrong) for case in cases if (wrong := make(case)) and wrong != case]
        for kind, make in kinds.items()
    }
    for kind, same_text in (("wrong option", False), ("wrong option, same text", True)):
        found[kind] = [both for case in cases if (both := maker.chosen(case, same_text=same_text))]
    return found
