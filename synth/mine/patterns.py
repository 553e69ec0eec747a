"""The rules of `synth mine`, which find pairs in a text without a model, after AdaptLLM (arXiv 2309.09530).

A rule finds places in a text, and a template (mine.yaml) turns each into a question. Rules read English cues and
sentence ends. They match few sentences. Every answer is part of the text, except the names of relations between
sentences.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

from ipt_jax.core.hashing import digest
from ipt_jax.core.settings import parse_yaml
from ipt_jax.corpus.records import Pair
from synth.format.wire import wire_pair
from synth.render.layout import fill_words
from synth.text.words import sentences

RULES = 1  # raised when a rule changes; part of the identity
TEMPLATES = Path(__file__).parent / "mine.yaml"
Pattern = Literal["cloze", "title", "definition", "connective", "summary", "words", "paraphrase", "completion"]
SHORTEST, LONGEST = 6, 50  # words of a good sentence
BLANK = "____"
OPTIONS = 4
FOLLOWS, OPPOSES, ADDS = "It follows from the first.", "It goes against the first.", "It adds to the first."
RELATIONS = {
    FOLLOWS: ("Therefore", "Thus", "Hence", "Consequently", "As a result", "For this reason", "Accordingly"),
    OPPOSES: ("However", "But", "Nevertheless", "Nonetheless", "On the other hand", "In contrast", "On the contrary"),
    ADDS: ("Moreover", "Furthermore", "In addition", "Also", "Likewise", "Similarly", "Besides"),
}
RELATION_OF = {cue: relation for relation, cues in RELATIONS.items() for cue in cues}
OPENING = re.compile(rf"({'|'.join(sorted(RELATION_OF, key=len, reverse=True))}),? (?=\w)")
REPHRASING = re.compile(
    r"(?:In other words|That is to say|That is|Put differently|Simply put|To put it simply),? (?=\w)"
)
BECAUSE = re.compile(r"(?P<effect>[^;:]{15,}?),? because (?!of\b)(?P<cause>[^;:]{10,})[.!]")
DEFINITION = re.compile(
    r"(?:(?:The|An?) )?(?P<term>[A-Za-z][\w-]*(?: [\w-]+){0,3}?) "
    r"(?:(?:is|are|was|were) (?=an? |the |any |one of |some )"
    r"|(?:is|are) (?:defined as|called|known as) |refers? to |means )"
    r"(?P<what>[^;:]{12,250})[.]"
)
POINTING = frozenset(
    "he she it they we you i this that these those there here who what which one his her their its such both".split()
)
KEY_WORD = re.compile(r"(?<![.!?] )(?<!\w)(?:[A-Z][a-z]{2,}|[a-z]{6,}|\d[\d,.]*\d|\d)(?!\w)")
LONG_WORD = re.compile(r"[A-Za-z]{5,}")
STOP = frozenset(
    "about above after again against although always among another around because become before being below between "
    "could during every found having however including might never often other others perhaps rather really several "
    "should since something still their there therefore these thing things think those though through under until "
    "using various where which while whose within without would".split()
)


class ParsedText(NamedTuple):
    """A text as the rules read it. `good`: the numbers of the sentences that rules use."""

    text: str
    title: str | None
    sentences: list[str]
    good: list[int]

    def shuffled(self, rng: Random) -> Iterator[tuple[int, str]]:
        """(number, sentence) of the good sentences in random order."""
        yield from ((number, self.sentences[number]) for number in rng.sample(self.good, len(self.good)))

    def before(self, number: int) -> str | None:
        """The sentence before, if it is good."""
        return self.sentences[number - 1] if number and is_good(self.sentences[number - 1]) else None


class Find(NamedTuple):
    """What a rule found: the variant of its template, the placeholders, and the answer."""

    variant: str
    fields: dict[str, str]
    answer: str
    options: Sequence[str] = ()


def read(text: str) -> ParsedText:
    first, line_break, rest = text.strip().partition("\n")
    short = 1 <= len(first.split()) <= 15 and not first.rstrip().endswith((".", "!", ":", ",", ";"))
    title = first.strip() if line_break and short and len(rest.split()) >= 30 else None
    parts = [one for one in sentences(text) if one != title]
    return ParsedText(text, title, parts, [number for number, one in enumerate(parts) if is_good(one)])


def is_good(sentence: str) -> bool:
    """Whether a sentence has a capital, an end mark and a usual length."""
    return SHORTEST <= sentence.count(" ") + 1 <= LONGEST and sentence[0].isupper() and sentence[-1] in '.!?"”’'


def cloze(parsed: ParsedText, rng: Random) -> Iterator[Find]:
    for _, sentence in parsed.shuffled(rng):
        found = [match for match in KEY_WORD.finditer(sentence) if match.start() and match.group() not in STOP]
        found = [match for match in found if sentence.count(match.group()) == 1]
        if not found:
            continue
        word = rng.choice(found)
        gap = {"sentence": sentence[: word.start()] + BLANK + sentence[word.end() :]}
        others = sorted(same_kind(word.group(), parsed.text) - set(re.findall(r"\w+", sentence)))
        if len(others) >= OPTIONS - 1 and rng.random() < 0.5:
            options = rng.sample([word.group(), *rng.sample(others, OPTIONS - 1)], OPTIONS)
            yield Find("choice", gap, word.group(), options)
        else:
            yield Find("free", gap, word.group())


def same_kind(word: str, text: str) -> set[str]:
    """Other numbers for a number, other names for a name, else other long words."""
    kind = str.isdigit if word.isdigit() else str.istitle if word.istitle() else str.islower
    return {other for other in KEY_WORD.findall(text) if kind(other) and other != word and other not in STOP}


def title(parsed: ParsedText, rng: Random) -> Iterator[Find]:
    if parsed.title is not None:
        yield Find("free", {}, parsed.title)


def definition(parsed: ParsedText, rng: Random) -> Iterator[Find]:
    for _, sentence in parsed.shuffled(rng):
        match = DEFINITION.fullmatch(sentence)
        if match and not POINTING & set(match["term"].casefold().split()):
            yield Find("free", {"term": match["term"]}, sentence_of(match["what"]))


def connective(parsed: ParsedText, rng: Random) -> Iterator[Find]:
    for number, sentence in parsed.shuffled(rng):
        if because := BECAUSE.fullmatch(sentence):
            effect, cause = because["effect"], because["cause"]
            if rng.random() < 0.5:
                yield Find("cause", {"effect": effect}, f"Because {cause}.")
            else:
                yield Find("effect", {"cause": upper(cause)}, sentence_of(effect))
        elif (cue := OPENING.match(sentence)) and (first := parsed.before(number)):
            pair = {"first": first, "second": upper(sentence[cue.end() :])}
            yield Find("relation", pair, RELATION_OF[cue[1]], rng.sample(sorted(RELATIONS), len(RELATIONS)))


def summary(parsed: ParsedText, rng: Random) -> Iterator[Find]:
    if len(parsed.good) < 4:
        return
    if parsed.title is not None or parsed.good[0] == 0:
        yield Find("free", {}, parsed.title or parsed.sentences[0])
    counts = Counter(word for word in KEY_WORD.findall(parsed.text) if word not in STOP and not word[0].isdigit())
    terms = [word for word, count in counts.most_common(3) if count > 1]
    if len(terms) == 3:
        yield Find("topic", {}, ", ".join(terms))


def words(parsed: ParsedText, rng: Random) -> Iterator[Find]:
    for _, sentence in parsed.shuffled(rng):
        known = list(dict.fromkeys(word for word in LONG_WORD.findall(sentence) if word.lower() not in STOP))
        if len(known) >= 3:
            yield Find("free", {"words": ", ".join(rng.sample(known, 3))}, sentence)


def paraphrase(parsed: ParsedText, rng: Random) -> Iterator[Find]:
    for number, sentence in parsed.shuffled(rng):
        if (cue := REPHRASING.match(sentence)) and (first := parsed.before(number)):
            yield Find("free", {"first": first}, upper(sentence[cue.end() :]))


def completion(parsed: ParsedText, rng: Random) -> Iterator[Find]:
    good = set(parsed.good)
    followed = [number for number in parsed.good if number + 1 in good]
    for number in rng.sample(followed, len(followed)):
        yield Find("free", {"first": parsed.sentences[number]}, parsed.sentences[number + 1])


Rule = Callable[[ParsedText, Random], Iterator[Find]]
FINDERS: dict[Pattern, Rule] = {
    "cloze": cloze,
    "title": title,
    "definition": definition,
    "connective": connective,
    "summary": summary,
    "words": words,
    "paraphrase": paraphrase,
    "completion": completion,
}


def sentence_of(words: str) -> str:
    return upper(words).rstrip(",") + "."


def upper(words: str) -> str:
    return words[:1].upper() + words[1:]


@lru_cache(maxsize=1)
def load_templates() -> dict[str, list[str]]:
    return parse_yaml(TEMPLATES.read_text(encoding="utf-8"))


def rules_digest() -> str:
    """Identifies rules and templates. Stored in place of the digest of a synthesizer's weights."""
    return digest({"rules": RULES, "templates": load_templates()})


def ask(pattern: Pattern, find: Find, rng: Random) -> Pair:
    """The pair in the wire format. The parser may reject it: a text may contain tags of the format."""
    question = fill_words(rng.choice(load_templates()[f"{pattern}.{find.variant}"]), find.fields)
    return wire_pair(question, find.answer, list(find.options))
