"""The generic adapter, for rows under the usual names, and the adapter of the authors' released collection.

A generic row holds a context with a list of pairs, or one question. Answers are texts, numbers, truth values, lists of
alternatives, SQuAD's {text: []}, or a letter or index of the options. In the released collection, options and chains
of thought are lines of `Q` and `A`.
"""

from collections import Counter
from typing import Any

from synth.collect.fields import (
    Adapter,
    ContextPairs,
    Misfit,
    QuestionAnswer,
    Row,
    answers_of,
    as_texts,
    context_of,
    each,
    get,
    has_field,
    make_choice,
    options_of,
    question_of,
    right_option,
)
from synth.format.wire import ANSWER_CUE, COT_CUE, OPTIONS_CUE

CONTEXT = "context|passage|article|story|document|paragraph|text"
PAIRS = ("qa", "qas", "qa_pairs", "pairs")
QUESTION = "question|query"
ANSWER = "answer|answers|label|answerKey|answer_key"
OPTIONS = "options|choices"
RATIONALE = "rationale"
KNOWN = set(f"{QUESTION}|{ANSWER}|{OPTIONS}|{RATIONALE}".split("|"))
OPTION_MARKS = ("- ", "* ", "• ")
COLLECTION_QUESTION, COLLECTION_ANSWER = "Q|question", "A|answer"


def read_generic(row: Row, ignored: Counter[str]) -> list[ContextPairs]:
    """The context of a row with its pairs. Unknown fields of listed pairs are counted in `ignored`."""
    listed = next((row[name] for name in PAIRS if row.get(name) is not None), None)
    if listed is None and get(row, QUESTION) is None:
        raise Misfit("missing_question", f"{', '.join(PAIRS)} (a list of pairs), or {QUESTION}")
    context = context_of(row, CONTEXT)
    if listed is None:
        return [ContextPairs(context, each([row], generic_pair))]
    if not isinstance(listed, list):
        raise Misfit("unreadable_pairs", f"{', '.join(PAIRS)}: a list of pairs")
    for entry in listed:
        if isinstance(entry, dict):
            ignored.update(f"ignored_field_{name}" for name in entry.keys() - KNOWN)
    identifier = row.get("id")
    return [ContextPairs(context, each(listed, generic_pair), "" if identifier is None else str(identifier))]


def generic_pair(entry: Any) -> QuestionAnswer:
    if not isinstance(entry, dict):
        raise Misfit("unreadable_pair", "a pair is an object {question, answer}")
    question = question_of(entry, QUESTION)
    rationale = as_texts(entry.get(RATIONALE), "rationale", RATIONALE)
    chain = "\n".join(rationale).strip() or None
    answer = get(entry, ANSWER)
    if isinstance(answer, dict):
        answer = get(answer, "text|value|input_text")
    if answer is None:
        raise Misfit("no_answer") if has_field(entry, ANSWER) else Misfit("missing_answer", ANSWER)
    options, labels = options_of(get(entry, OPTIONS))
    if options:
        return make_choice(question, answer, options, labels, rationale=chain)
    return QuestionAnswer(question, answers_of({"answer": answer}, "answer")[0], (), chain)


# ---- the released collection


def read_collection(row: Row) -> list[ContextPairs]:
    listed = get(row, "QA_list")
    if not isinstance(listed, list):
        raise Misfit("unreadable_pairs" if has_field(row, "QA_list") else "missing_pairs", "QA_list: a list of {Q, A}")
    return [ContextPairs(context_of(row, "context", optional=True), each(listed, collection_pair))]


def collection_pair(entry: Any) -> QuestionAnswer:
    """Question, options, chain of thought and answer from the lines of Q and A."""
    if not isinstance(entry, dict):
        raise Misfit("unreadable_pair", "a pair is an object {Q, A}")
    question, answer = question_of(entry, COLLECTION_QUESTION), answers_of(entry, COLLECTION_ANSWER)[0]
    cue = COT_CUE.strip()
    cued = question.endswith(cue)
    chain, has_answer, final = answer.rpartition(ANSWER_CUE if ANSWER_CUE in answer else ANSWER_CUE.replace("\n", " "))
    rationale: str | None = None
    if cued and not has_answer:
        raise Misfit("cot_malformed")
    if has_answer and (cued or ANSWER_CUE in answer):
        rationale, answer = chain.strip(), final.strip()
        question = question.removesuffix(cue).strip()
    stem, has_options, listing = f"\n{question}".partition(OPTIONS_CUE)
    if not has_options:
        return QuestionAnswer(question, answer, (), rationale)
    if OPTIONS_CUE in listing:
        raise Misfit("options_malformed")
    options = listed_options([line.strip() for line in listing.splitlines() if line.strip()])
    several = answer if right_option(answer, options) else split_answer(answer, options) or answer
    return make_choice(stem.strip(), several, options, rationale=rationale)


def listed_options(lines: list[str]) -> list[str]:
    """The options of lines '- option'. Between such lines, a line without the mark continues the option above it."""
    options: list[str] = []
    marked = any(line.startswith(OPTION_MARKS) for line in lines)
    for line in lines:
        if options and marked and not line.startswith(OPTION_MARKS):
            options[-1] += f" {line}"
        else:
            options.append(line[2:] if line.startswith(OPTION_MARKS) else line)
    return options_of(options)[0]


def split_answer(answer: str, options: list[str]) -> list[str] | None:
    """['a', 'b'] of the answer 'a, b' to a question with several right options. None if a part is not an option."""
    found: list[str] = []
    rest = answer
    while rest:
        fitting = [one for one in options if one and (rest == one or rest.startswith(f"{one}, "))]
        if not fitting:
            return None
        found.append(max(fitting, key=len))
        rest = rest[len(found[-1]) :].removeprefix(", ")
    return found


COLLECTION = Adapter(read_collection)
