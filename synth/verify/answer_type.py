"""Whether an answer has the form that its English question asks for. Refuses only what is plainly of another kind."""

from synth.verify.words import is_content, plain_word, words

AMOUNTS = frozenset("many much old long far often tall big large high heavy deep".split())
NUMBERS = frozenset(
    """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand thousands
    million millions billion dozen half once twice many few several no none all both single another pair every
    most""".split()
)
TIMES = frozenset(
    """when while after before during until till as time day days night nights morning evening noon midnight dawn
    year years month months week weeks hour hours minute minutes second seconds soon later then once ago century
    spring summer autumn winter today yesterday tomorrow sunrise sunset now at in on always never since by""".split()
)
PLACES = frozenset(
    """in on at to from under over near by behind above below beside between inside outside into through along across
    upon out toward towards up down home there here everywhere within the a an his her its their our my""".split()
)
PERSONAL = frozenset("he she it they i we you".split())
NO_PERSON = PERSONAL | frozenset("because by to so in if would was were had did could will is when".split())
SHORT_REASON = 2  # words


def fits_question(question: str, answer: str) -> bool:
    asked, told = [plain_word(word) for word in words(question)], [plain_word(word) for word in words(answer)]
    if not asked or not told:
        return True
    numbered = any(word[0].isdigit() for word in told)
    match asked[0], asked[1:2]:
        case "how", [amount] if amount in AMOUNTS:
            return numbered or not NUMBERS.isdisjoint(told) or (amount in ("long", "often") and is_time(told))
        case "when", _:
            return numbered or is_time(told)
        case (("who" | "whom" | "whose"), _):
            return told[0] not in NO_PERSON
        case "where", _:
            return not PLACES.isdisjoint(told) or any(word[0].isupper() and is_content(word) for word in words(answer))
        case "why", _:
            return len(told) > SHORT_REASON
    return True


def is_time(told: list[str]) -> bool:
    return not TIMES.isdisjoint(told)
