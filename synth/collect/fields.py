"""Reads contexts, questions, answers and options from rows of any schema.

An adapter is data where paths of fields are enough (`Fields`), else a function of a row. A path is names joined by
dots; a list on the way is mapped. Alternatives are separated by `|`, and the first with a value is used.
Guarantees: any value of any type gives a pair or a `Misfit` with its reason, never another error.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

Row = dict[str, Any]
Key = Literal["text", "letter", "index"]  # how a row names the right option
UNANSWERABLE = {"cannotanswer", "unanswerable"}
LABEL = re.compile(r"\(?([A-Za-z])\s*[).:]\s*(\S.*)")  # of an option: 'A) text', '(b) text', 'C. text'
LETTER = re.compile(r"\(?([A-Za-z])[).:]?")
NONE_OF_THESE = re.compile(
    r"(none|neither|not any|no one)( of)?( the| these| those)?( above| following| other| given| provided| listed)?"
    r"( options?| answers?| choices?| ones?)?( above| given| listed| provided)?( (is|are) (correct|right|true))?[ .]*",
    re.IGNORECASE,
)
ANSWER_CHAIN = re.compile(r"\s*\n\s*Therefore, the answer is [^\n]*\s*$")
LETTER_CHAIN = re.compile(
    r"[\s,;]*\b((so|hence|thus|therefore)[, ]*)?(the )?((correct|right) )?(answer|ans|option|choice)( option| choice)?"
    r"(\s|is|:|=|-)+(option )?\(?[A-E]\b\)?[\s.!]*$",
    re.IGNORECASE,
)


class Misfit(Exception):
    """A row or pair that cannot be used. `reason` is counted. `expected` names the accepted fields."""

    def __init__(self, reason: str, expected: str = ""):
        super().__init__(reason)
        self.reason, self.expected = reason, expected.replace("|", ", ")


class QuestionAnswer(NamedTuple):
    """A pair before it has its wire form. `answer` is the text of the option where there are options."""

    question: str
    answer: str
    options: Sequence[str] = ()
    rationale: str | None = None
    start: int | None = None  # character of the context where the answer begins


class ContextPairs(NamedTuple):
    """What an adapter reads from a row.

    `id` None: equal contexts of a data set are merged. Empty: the row is a context of its own, named by file and line.
    `quoted`: answers are quotes of the context, so a long context may be cut into passages.
    """

    context: str
    pairs: list[QuestionAnswer | Misfit]
    id: str | None = None
    quoted: bool = False


class Adapter(NamedTuple):
    """`read` gets one row, or with `group` the list of all rows with an equal key."""

    read: Callable[[Any], list[ContextPairs]]
    group: Callable[[Row], Any] | None = None


# ---- values


def get(row: Any, path: str) -> Any:
    """The value at a path, or None."""
    for alternative in path.split("|"):
        if (found := _walk(row, alternative.split("."))) is not None:
            return found
    return None


def _walk(value: Any, names: list[str]) -> Any:
    for place, name in enumerate(names):
        if isinstance(value, list):
            found = [_walk(one, names[place:]) for one in value]
            return found if any(one is not None for one in found) else None
        value = value.get(name) if isinstance(value, dict) else None
    return value


def has_field(row: Row, path: str) -> bool:
    """Whether a row has the first field of a path, even if its value is null."""
    return any(one.split(".")[0] in row for one in path.split("|"))


def as_text(value: Any) -> str | None:
    """A text, number or truth value as text. None for anything else."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        whole = value.is_integer() and abs(value) < 2**53
        return None if math.isnan(value) else str(int(value)) if whole else repr(value)
    return str(value) if isinstance(value, int) else None


def as_texts(value: Any, what: str, expected: str = "") -> list[str]:
    """The texts in a value or in nested lists, without nulls. Raises Misfit for an object."""
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [text for one in value for text in as_texts(one, what, expected)]
    if (text := as_text(value)) is None:
        raise Misfit(f"unreadable_{what}", expected)
    return [text]


def as_objects(value: Any, what: str) -> list[dict[str, Any]]:
    """A list of objects; a table as Arrow stores it, {a: [1, 2], b: [3, 4]}, is [{a: 1, b: 3}, {a: 2, b: 4}]."""
    if isinstance(value, dict) and value and all(isinstance(one, list) for one in value.values()):
        count = max(map(len, value.values()))
        value = [{name: one[at] for name, one in value.items() if at < len(one)} for at in range(count)]
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise Misfit(f"unreadable_{what}" if value is not None else f"missing_{what}", what)
    return value


def context_of(row: Row, *paths: str, optional: bool = False) -> str:
    """The texts at all paths, one per line. Raises Misfit if a path has none, unless the set has no contexts."""
    lines: list[str] = []
    values = [get(row, path) for path in paths]
    for place, value in enumerate(values):
        if value is None and not optional:
            raise Misfit("missing_context", " and ".join(paths))
        if value not in values[:place]:  # two paths may have the same alternative
            lines += as_texts(value, "context", paths[place])
    return "\n".join(line for line in lines if line)


def question_of(row: Row, path: str) -> str:
    value = get(row, path)
    if value is None:
        raise Misfit("missing_question", path)
    if (text := as_text(value)) is None:
        raise Misfit("unreadable_question", path)
    return text


def answers_of(row: Row, path: str) -> list[str]:
    """All answers at a path. Raises Misfit if the field is missing, null, empty, or says that there is none."""
    value = get(row, path)
    if value is None:
        raise Misfit("no_answer") if has_field(row, path) else Misfit("missing_answer", path)
    if not (answers := as_texts(value, "answer", path)):
        raise Misfit("no_answer")
    if answers := [answer for answer in answers if answer.casefold() not in UNANSWERABLE]:
        return list(filter(None, answers)) or answers
    raise Misfit("unanswerable")


# ---- options


def options_of(value: Any) -> tuple[list[str], list[str]]:
    """(texts, labels) of options: a list, {text: [], label: []} or {A: text}. Nulls are empty texts."""
    labels: list[str] = []
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        value = {"text": get(value, "text|option|value"), "label": get(value, "label|key")}
    if isinstance(value, dict) and "text" in value:
        labels, value = as_texts(value.get("label"), "options"), value["text"]
    elif isinstance(value, dict):
        labels, value = [str(name) for name in value], list(value.values())
    if value is not None and not isinstance(value, list | tuple):
        raise Misfit("unreadable_options", "options")
    texts = ["" if one is None else as_text(one) for one in value or []]
    if any(text is None for text in texts):
        raise Misfit("unreadable_options", "options")
    return bare_options([" ".join(str(text).split()) for text in texts]), labels


def bare_options(options: list[str]) -> list[str]:
    """Options without their labels, where these are A, B, C, … in order."""
    found = [LABEL.fullmatch(option) for option in options]
    letters = "".join(one[1].upper() for one in found if one)
    labelled = len(options) > 1 and letters == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]
    return [one[2] for one in found if one] if labelled else options


def right_option(answer: Any, options: Sequence[str], labels: Sequence[str] = (), key: Key = "text") -> str | None:
    """The option that an answer names by its text, label, letter or index from 0. `key` is tried first."""
    tries = {"text": _by_text, "letter": _by_letter, "index": _by_index}
    for way in dict.fromkeys([key, "text", "letter", "index"]):
        place = tries[way](answer, list(options), list(labels))
        if place is not None and place < len(options) and options[place]:
            return options[place]
    return None


def _by_text(answer: Any, options: list[str], labels: list[str]) -> int | None:
    text = as_text(answer)
    if not text:
        return None
    labelled = LABEL.fullmatch(text)
    for plain in (lambda one: one, lambda one: " ".join(one.casefold().split()).removesuffix(".")):
        for form in [text, labelled[2]] if labelled else [text]:
            if plain(form) in (places := [plain(option) for option in options]):
                return places.index(plain(form))
    return None


def _by_letter(answer: Any, options: list[str], labels: list[str]) -> int | None:
    text, known = (as_text(answer) or "").casefold(), [label.casefold() for label in labels]
    if text in known:
        return known.index(text)
    letter = LETTER.fullmatch(text)
    return ord(letter[1].upper()) - ord("A") if letter and not labels else None


def _by_index(answer: Any, options: list[str], labels: list[str]) -> int | None:
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, str) and answer.strip().isdecimal():
        answer = int(answer)
    return answer if isinstance(answer, int) and not isinstance(answer, bool) and answer >= 0 else None


def make_choice(
    question: str,
    answers: Any,
    options: Sequence[str],
    labels: Sequence[str] = (),
    key: Key = "text",
    rationale: str | None = None,
) -> QuestionAnswer:
    """A multiple-choice pair. Several right options make a free answer, as the wire form has one.

    "None of the above" that is not an option is added as the last one. Raises Misfit if nothing is named.
    """
    answers = answers if isinstance(answers, list | tuple) else [answers]
    given = [one for one in answers if one is not None and one != "" and one != -1 and one != "-1"]
    if not given:
        raise Misfit("no_answer")
    shown = [option for option in dict.fromkeys(options) if option]
    right = list(dict.fromkeys(one for one in (right_option(one, options, labels, key) for one in given) if one))
    if len(right) > 1:
        return QuestionAnswer(question, ", ".join(right), rationale=rationale)
    if not right:
        if (text := as_text(given[0])) is None:
            raise Misfit("unreadable_answer")
        if shown and NONE_OF_THESE.fullmatch(text):
            shown.append(text)
        right = [text]
    return QuestionAnswer(question, right[0], shown, rationale)


def bare_rationale(text: str | None) -> str | None:
    """A chain of thought without its last line about the answer, which may name a letter that no option has."""
    bare = ANSWER_CHAIN.sub("", (text or "").rstrip())
    return LETTER_CHAIN.sub("", bare).strip() or None


# ---- adapters that are data


class Fields(NamedTuple):
    """Paths of a row that holds one question."""

    context: tuple[str, ...]
    question: str = "question"
    answer: str = "answer"
    options: str | tuple[str, ...] = ()  # one list, or a field per option
    key: Key = "text"
    rationale: str = ""
    joined: bool = False  # several answers are all part of the answer, else they are alternatives
    starts: str = ""  # characters where answers begin
    impossible: str = ""  # true where the question has no answer
    quoted: bool = False

    def adapter(self) -> Adapter:
        return Adapter(self.read)

    def read(self, row: Row) -> list[ContextPairs]:
        context = context_of(row, *self.context, optional=not self.context)
        if self.context and not context:
            raise Misfit("empty_context")
        return [ContextPairs(context, each([row], self.pair), quoted=self.quoted)]

    def pair(self, row: Row) -> QuestionAnswer:
        question = question_of(row, self.question)
        if self.impossible and get(row, self.impossible) is True:
            raise Misfit("unanswerable")
        chain = as_texts(get(row, self.rationale), "rationale") if self.rationale else []
        rationale = bare_rationale("\n".join(chain))
        if self.options:
            paths = self.options
            found = [get(row, path) for path in paths] if isinstance(paths, tuple) else get(row, paths)
            options, labels = options_of(found)
            if not any(options):
                raise Misfit("missing_options", paths if isinstance(paths, str) else ", ".join(paths))
            if not has_field(row, self.answer):
                raise Misfit("missing_answer", self.answer)
            return make_choice(question, get(row, self.answer), options, labels, self.key, rationale)
        answers = answers_of(row, self.answer)
        starts = get(row, self.starts) if self.starts else None
        start = starts[0] if isinstance(starts, list) and starts and isinstance(starts[0], int) else None
        return QuestionAnswer(question, ", ".join(answers) if self.joined else answers[0], (), rationale, start)


def each(values: Iterable[Any], read: Callable[[Any], QuestionAnswer]) -> list[QuestionAnswer | Misfit]:
    """The pair of each value, or why it has none."""
    found: list[QuestionAnswer | Misfit] = []
    for value in values:
        try:
            found.append(read(value))
        except Misfit as misfit:
            found.append(misfit)
    return found
