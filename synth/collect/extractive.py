"""Adapters of data sets with free answers: quotes of the context, short answers, tables as contexts."""

import re
from collections import Counter
from typing import Any

from synth.collect.fields import (
    Adapter,
    ContextPairs,
    Fields,
    Misfit,
    QuestionAnswer,
    Row,
    answers_of,
    as_objects,
    as_text,
    as_texts,
    bare_rationale,
    context_of,
    each,
    get,
    has_field,
    question_of,
)

NQ = "original_nq_answers"
SPAN = re.compile(r"(\d+):(\d+)")


def read_paragraphs(row: Row) -> list[ContextPairs]:
    """SQuAD's columns, or the nested form of its file and of NLQuAD: paragraphs[]{context, qas[]}."""
    if get(row, "paragraphs") is None and get(row, "qas") is None:
        return QUOTED.read(row)
    paragraphs = as_objects(row["paragraphs"], "paragraphs") if "paragraphs" in row else [row]
    found = []
    for paragraph in paragraphs:
        context = context_of(paragraph, "context")
        pairs = each(as_objects(get(paragraph, "qas"), "qas"), QUOTED.pair)
        found.append(ContextPairs(context, pairs, quoted=True))
    return found


QUOTED = Fields(
    ("context",), answer="answers.text", starts="answers.answer_start", impossible="is_impossible", quoted=True
)


def read_hotpotqa(row: Row) -> list[ContextPairs]:
    """The paragraphs of a question, each under its title."""
    context = get(row, "context")
    if isinstance(context, list) and all(isinstance(one, list) and len(one) == 2 for one in context):
        context = [{"title": title, "sentences": sentences} for title, sentences in context]
    paragraphs = []
    for one in as_objects(context, "context"):
        sentences = [sentence for sentence in as_texts(one.get("sentences"), "context") if sentence]
        paragraphs.append("\n".join([*as_texts(one.get("title"), "context"), " ".join(sentences)]).strip())
    return [ContextPairs("\n\n".join(paragraphs), each([row], Fields(()).pair))]


def read_triviaqa(row: Row) -> list[ContextPairs]:
    """The first document that contains the answer or one of its aliases. An alias that is found is the answer."""
    documents = as_texts(get(row, "entity_pages.wiki_context"), "context")
    documents += as_texts(get(row, "search_results.search_context"), "context")
    if not any(documents):
        raise Misfit("missing_context", "entity_pages.wiki_context, search_results.search_context")

    def pair(row: Row) -> QuestionAnswer:
        names = answers_of(row, "answer.value") + as_texts(get(row, "answer.aliases"), "answer")
        for document in documents:
            for name in filter(None, names):
                if found := re.search(rf"(?<!\w){re.escape(name)}(?!\w)", document, re.IGNORECASE):
                    contexts.append(document)
                    return QuestionAnswer(question_of(row, "question"), name, start=found.start())
        raise Misfit("answer_not_in_context")

    contexts: list[str] = []
    pairs = each([row], pair)
    return [ContextPairs(contexts[0] if contexts else documents[0], pairs, quoted=True)]


def read_newsqa(row: Row) -> list[ContextPairs]:
    """Answers are ranges of words or characters of the story; of several readers, the range that most of them chose."""
    story = get(row, "story_text")
    if not isinstance(story, str):
        raise Misfit("missing_context", "story_text")

    def pair(row: Row) -> QuestionAnswer:
        question = question_of(row, "question")
        field = "answer_token_ranges" if get(row, "answer_token_ranges") else "answer_char_ranges"
        if not isinstance(ranges := get(row, field), str):
            raise Misfit("missing_answer", "answer_token_ranges, answer_char_ranges")
        votes = Counter(one.strip() for one in ranges.split("|") if SPAN.search(one))
        if not votes:
            raise Misfit("unanswerable")
        spans = [(int(start), int(stop)) for start, stop in SPAN.findall(votes.most_common(1)[0][0])]
        words = [word.span() for word in re.finditer(r"\S+", story)] if field == "answer_token_ranges" else None
        limit = len(story) if words is None else len(words)
        if any(not start < stop <= limit for start, stop in spans):
            raise Misfit("range_outside_context")
        if words is not None:
            spans = [(words[start][0], words[stop - 1][1]) for start, stop in spans]
        lead = len(story) - len(story.lstrip())
        texts = [story[start:stop].strip() for start, stop in spans]
        return QuestionAnswer(question, ", ".join(filter(None, texts)), start=max(0, spans[0][0] - lead))

    return [ContextPairs(story.strip(), each([row], pair), quoted=True)]


def read_qed(row: Row) -> list[ContextPairs]:
    """The selected sentence is the chain of thought. Of several annotators, the first one's spans are the answer."""

    def pair(row: Row) -> QuestionAnswer:
        annotators = get(row, "original_nq_answers.string|original_nq_answers")
        first = annotators[0] if isinstance(annotators, list) and annotators else annotators
        texts = answers_of({"original_nq_answers": first} if has_field(row, NQ) else {}, NQ)
        sentence = as_texts(get(row, "annotation.selected_sentence.string"), "rationale")
        return QuestionAnswer(question_of(row, "question"), ", ".join(texts), (), bare_rationale("\n".join(sentence)))

    return [ContextPairs(context_of(row, "paragraph_text"), each([row], pair))]


def read_babi(row: Row) -> list[ContextPairs]:
    """A question of a story refers to the lines before it: later lines may change its answer."""
    if "story" not in row:
        return Fields(("passage|context",)).read(row)
    lines: list[str] = []
    found = []
    for turn in as_objects(row["story"], "story"):
        text = as_text(turn.get("text"))
        if turn.get("type") in (0, "0", "context"):
            lines += [text] if text else []
        else:
            found.append(ContextPairs("\n".join(lines), each([turn], Fields((), "text", "answer").pair)))
    return found


def table_text(rows: Any) -> str:
    """Rows of cells as lines `| a | b |`."""
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise Misfit("unreadable_table")
    lines = [[" ".join((as_text(cell) or "").split()) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines if any(line))


def read_wikitablequestions(row: Row) -> list[ContextPairs]:
    header, rows = get(row, "table.header"), get(row, "table.rows")
    if not isinstance(header, list) or not isinstance(rows, list):
        raise Misfit("missing_context", "table.header and table.rows")
    pair = Fields((), answer="answers", joined=True).pair
    return [ContextPairs(table_text([header, *rows]), each([row], pair))]


EXTRACTIVE: dict[str, Adapter] = {
    "squad": Adapter(read_paragraphs),
    "nlquad": Adapter(read_paragraphs),
    "covid_qa": Adapter(read_paragraphs),
    "ropes": Fields(("background", "situation"), answer="answers.text").adapter(),
    "narrativeqa": Fields(("document.summary.text",), "question.text", "answers.text").adapter(),
    "tweetqa": Fields(("Tweet",), "Question", "Answer").adapter(),
    "fairytaleqa": Fields(("story_section|content|context",), "question|target", "answer1|answer").adapter(),
    "hotpotqa": Adapter(read_hotpotqa),
    "triviaqa": Adapter(read_triviaqa),
    "newsqa": Adapter(read_newsqa),
    "qed": Adapter(read_qed),
    "babi": Adapter(read_babi),
    "wikitablequestions": Adapter(read_wikitablequestions),
}
