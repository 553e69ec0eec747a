"""Adapters of data sets with options, among them those with a chain of thought and without contexts."""

import re

from synth.collect.fields import (
    Adapter,
    ContextPairs,
    Fields,
    Misfit,
    QuestionAnswer,
    Row,
    answers_of,
    as_text,
    as_texts,
    bare_rationale,
    context_of,
    each,
    get,
    make_choice,
    options_of,
    question_of,
)

PUBMED_OPTIONS = ["yes", "no", "maybe"]
SPARTQA_OPTIONS = {"Yes": "Yes", "No": "No", "DK": "Don't know"}


def read_mctest(row: Row) -> list[ContextPairs]:
    r"""A literal `\newline` of the story is a line end. Questions may begin with 'one:' or 'multiple:'."""
    context = re.sub(r"[ \t]*\\newline[ \t]*", "\n", context_of(row, "story")).strip()
    fields = Fields((), options="answer_options", key="letter")

    def pair(row: Row) -> QuestionAnswer:
        made = fields.pair(row)
        return made._replace(question=re.sub(r"^(one|multiple):\s*", "", made.question))

    return [ContextPairs(context, each([row], pair))]


def read_multirc(rows: list[Row]) -> list[ContextPairs]:
    """The rows of one question, one per candidate. One true candidate: a choice. Several: all are the answer."""

    def pair(rows: list[Row]) -> QuestionAnswer:
        true = [text for row in rows if get(row, "label") in (1, "1", True) for text in answers_of(row, "answer")]
        candidates = [text for row in rows for text in as_texts(get(row, "answer"), "answer")]
        if not true:
            hidden = all(get(row, "label") in (-1, None) for row in rows)
            raise Misfit("no_answer" if hidden else "no_right_answer", "label")
        options = candidates if len(set(candidates)) > 1 else []
        return make_choice(question_of(rows[0], "question"), true, options)

    return [ContextPairs(context_of(rows[0], "paragraph"), each([rows], pair))]


def multirc_key(row: Row) -> tuple[object, ...]:
    place = as_text(get(row, "idx.paragraph")), as_text(get(row, "idx.question"))
    if None in place:
        raise Misfit("missing_idx", "idx.paragraph and idx.question")
    return *place, question_of(row, "question")


def read_spartqa(row: Row) -> list[ContextPairs]:
    """Candidate answers with an index, or yes, no and DK."""

    def pair(row: Row) -> QuestionAnswer:
        answer = get(row, "answer")
        answers = [SPARTQA_OPTIONS.get(one, one) if isinstance(one, str) else one for one in as_list(answer)]
        if "answer" not in row:
            raise Misfit("missing_answer", "answer")
        options, labels = options_of(get(row, "candidate_answers"))
        shown = [SPARTQA_OPTIONS.get(one, one) for one in options] or list(SPARTQA_OPTIONS.values())
        return make_choice(question_of(row, "question"), answers, shown, labels, key="index")

    return [ContextPairs(context_of(row, "story"), each([row], pair))]


def as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def read_pubmedqa(row: Row, options: bool = True) -> list[ContextPairs]:
    """The long answer is the chain of thought of yes, no or maybe. Without a decision it is the answer."""

    def pair(row: Row) -> QuestionAnswer:
        question, decision = question_of(row, "question"), as_text(get(row, "final_decision"))
        chain = bare_rationale("\n".join(as_texts(get(row, "long_answer"), "rationale")))
        if not decision:
            return QuestionAnswer(question, answers_of(row, "long_answer")[0])
        return make_choice(question, decision, PUBMED_OPTIONS if options else [], rationale=chain)

    if isinstance(context := get(row, "context.contexts|context"), str):
        return [ContextPairs(context.strip(), each([row], pair))]
    return [ContextPairs(context_of(row, "context.contexts"), each([row], pair))]


MULTIPLE_CHOICE: dict[str, Adapter] = {
    "race": Fields(("article",), options="options", key="letter").adapter(),
    "race_c": Fields(("article",), options="option|options", answer="label|answer", key="index").adapter(),
    "reclor": Fields(("context",), options="answers", answer="label", key="index").adapter(),
    "logiqa": Fields(("context",), options="options", answer="label", key="letter").adapter(),
    "dream": Fields(("dialogue",), options="choice").adapter(),
    "cosmosqa": Fields(
        ("context",), options=("answer0", "answer1", "answer2", "answer3"), answer="label", key="index"
    ).adapter(),
    "qasc": Fields(
        ("fact1|combinedfact", "fact2|combinedfact"), options="choices", answer="answerKey", key="letter"
    ).adapter(),
    "quartz": Fields(("para",), options="choices", answer="answerKey", key="letter").adapter(),
    "quail": Fields(("context",), options="answers", answer="correct_answer_id", key="index").adapter(),
    "mctest": Adapter(read_mctest),
    "multirc": Adapter(read_multirc, multirc_key),
    "spartqa": Adapter(read_spartqa),
    "aqua_rat": Fields((), options="options", answer="correct", key="letter", rationale="rationale").adapter(),
    "ecqa": Fields(
        (), "q_text", "q_ans", options=("q_op1", "q_op2", "q_op3", "q_op4", "q_op5"), rationale="taskB"
    ).adapter(),
    "pubmedqa": Adapter(read_pubmedqa),
    "pubmedqa_no_opt": Adapter(lambda row: read_pubmedqa(row, options=False)),
}
