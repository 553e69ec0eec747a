"""Reads pairs from the answers of chat models, in tags, JSON, or lines with Q: and A:.

Guaranteed: no string raises; every pair is one that `parse_completion` accepts, or is rejected with its reason. What is
removed around the pairs is counted: thinking, code fences, remarks, and closing tags that were added.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ipt_jax.corpus.records import Pair
from synth.format.parser import parse_completion, read_pair, rejected, without_duplicates
from synth.format.wire import COT_CUE, END_TAG, OPTION_MARK, OPTIONS_CUE, QUESTION_TAG, pair_text, wire_pair

REMOVED = ("thinking", "code_fences", "remarks", "missing_closings")  # counted as 'chat_NAME' in a group's meta
THINKING = re.compile(r"<(think|thinking|reasoning|thought)>.*?</\1>", re.DOTALL)
LONE_CLOSING = re.compile(r"\A.*</(?:think|thinking|reasoning|thought)>", re.DOTALL)  # the prompt opened it
UNCLOSED = re.compile(r"<(?:think|thinking|reasoning|thought)>.*\Z", re.DOTALL)
FENCE = re.compile(r"^[ \t]*(?:```|~~~)[\w+-]*[ \t]*$\n?", re.MULTILINE)
NUMBERING = re.compile(r"[\s\d.)(:*#_=\-–—>|]*")  # between pairs; not a remark
LINE_QUESTION = re.compile(
    r"^[ \t>*#_\-]*(?:\d+[.)]\s*)?[*_]*Q(?:uestion)?\s*\d*[*_]*\s*:[*_]*[ \t]*", re.MULTILINE | re.I
)
LINE_ANSWER = re.compile(r"^[ \t>*#_\-]*A(?:nswer)?\s*\d*[*_]*\s*:[*_]*[ \t]*", re.MULTILINE | re.I)
LETTERED = re.compile(r"\s*(?:[-*•]\s*)?\(?([A-Za-z])[.):]\s+(\S.*)")
LISTED = re.compile(r"\s*[-*•]\s+(\S.*)")
FIELDS = {
    "question": ("question", "q", "instruction", "query"),
    "answer": ("answer", "a", "response", "correct_answer", "output"),
    "options": ("options", "choices"),
    "rationale": ("rationale", "reasoning", "explanation"),
}


def read_reply(text: str, finished: bool) -> tuple[list[Pair], Counter[str]]:
    """The pairs of one answer, and what was removed, by name. `finished`: the model ended it by itself."""
    removed: Counter[str] = Counter()
    text, blocks = THINKING.subn("", text)
    text, lone = LONE_CLOSING.subn("", text)
    text, open_blocks = UNCLOSED.subn("", text)
    text, fences = FENCE.subn("", text)
    removed["thinking"], removed["code_fences"] = blocks + lone + open_blocks, (fences + 1) // 2
    if QUESTION_TAG in text:
        pairs = read_tags(text, finished, removed)
    elif (objects := list(json_objects(text))) or text.lstrip().startswith(("[", "{")):
        pairs = read_json(text, objects, finished, removed)
    elif LINE_QUESTION.search(text):
        pairs = read_lines(text, finished, removed)
    else:
        pairs = [rejected("leftover_text" if finished else "truncated", text.strip())] if text.strip() else []
    if not pairs and not finished:  # the limit came inside the thinking
        pairs = [rejected("truncated", "")]
    return without_duplicates(pairs), +removed


def read_tags(text: str, finished: bool, removed: Counter[str]) -> list[Pair]:
    before, *records = text.split(QUESTION_TAG)
    removed["remarks"] += is_remark(before)
    pairs = []
    for place, record in enumerate(records, start=1):
        body, closing, after = record.partition(END_TAG)
        if not closing and place == len(records) and not finished:
            pairs.append(rejected("truncated", f"{QUESTION_TAG}{record}".strip()))
            continue
        removed["missing_closings"] += not closing
        removed["remarks"] += is_remark(after)
        pairs.append(read_pair(f"{QUESTION_TAG}{body}"))
    return pairs


def is_remark(text: str) -> bool:
    return NUMBERING.fullmatch(text) is None


def json_objects(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(start, stop, object) of the innermost-complete objects with a question, also of a list that was cut off."""
    decoder, place = json.JSONDecoder(strict=False), 0
    while (start := text.find("{", place)) >= 0:
        try:
            found, stop = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            place = start + 1
            continue
        if field(found, "question") is None:
            place = start + 1  # a list of pairs may be inside
            continue
        yield start, stop, found
        place = stop


def read_json(
    text: str, objects: list[tuple[int, int, dict[str, Any]]], finished: bool, removed: Counter[str]
) -> list[Pair]:
    pairs = [structured(field(found, "question"), field(found, "answer"), found) for _, _, found in objects]
    tail = text[objects[-1][1] :] if objects else text
    if "{" in tail or not objects:
        pairs.append(rejected("unclosed" if finished else "truncated", tail.strip()))
    elif any(letter.isalnum() for letter in tail):
        removed["remarks"] += 1
    if objects and any(letter.isalnum() for letter in text[: objects[0][0]].partition("{")[0]):
        removed["remarks"] += 1
    return pairs


def field(found: Any, name: str) -> Any:
    """The value of an object's field under one of its usual names."""
    if not isinstance(found, dict):
        return None
    lowered = {str(key).lower(): value for key, value in found.items()}
    return next((lowered[usual] for usual in FIELDS[name] if usual in lowered), None)


def structured(question: Any, answer: Any, found: dict[str, Any]) -> Pair:
    """The pair of an object. Options may be a list or a mapping of letters; the answer their text, letter or index."""
    options, rationale = field(found, "options") or [], field(found, "rationale")
    if isinstance(options, dict):
        letters = [str(key).strip().lower() for key in options]
        options = [str(value).strip() for value in options.values()]
    else:
        options = [str(one).strip() for one in options] if isinstance(options, list) else []
        letters, options = unlettered(options)
    return checked(str(question), chosen(answer, options, letters), options, rationale)


def unlettered(options: list[str]) -> tuple[list[str], list[str]]:
    """(['A) Rome', 'B) Oslo']) -> (['a', 'b'], ['Rome', 'Oslo'])"""
    parts = [LETTERED.fullmatch(option) for option in options]
    if all(parts):
        return [part[1].lower() for part in parts if part], [part[2].strip() for part in parts if part]
    return [chr(ord("a") + place) for place in range(len(options))], options


def chosen(answer: Any, options: list[str], letters: list[str]) -> str:
    """The answer's text: of a letter or an index among the options, the option's."""
    if answer is None or isinstance(answer, dict | list):
        return ""
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    text = str(answer).strip()
    if text in options or not options:
        return text
    if isinstance(answer, int) and 0 <= answer < len(options):
        return options[answer]
    lettered = LETTERED.fullmatch(text)
    letter = lettered[1].lower() if lettered else text.strip("().: ").lower()
    if lettered and lettered[2].strip() in options:
        return lettered[2].strip()
    return options[letters.index(letter)] if letter in letters and not lettered else text


def checked(question: str, answer: str, options: list[str], rationale: Any) -> Pair:
    """The pair as the parser reads it from the wire, so that no accepted one holds a tag."""
    reason = str(rationale).strip() if rationale and isinstance(rationale, str) else None
    pair = wire_pair(question.strip(), answer.strip(), options, reason)
    found = parse_completion(pair_text(pair), finished=True)
    return found[0] if len(found) == 1 else rejected("nested_tag", question, answer)


def read_lines(text: str, finished: bool, removed: Counter[str]) -> list[Pair]:
    """Pairs of lines that begin with 'Q:' and 'A:', with numbers and bold marks around them if any."""
    starts = [found.span() for found in LINE_QUESTION.finditer(text)]
    removed["remarks"] += is_remark(text[: starts[0][0]])
    pairs = []
    for place, (_, start) in enumerate(starts):
        is_last = place + 1 == len(starts)
        record = text[start:] if is_last else text[start : starts[place + 1][0]]
        if is_last and not finished:
            pairs.append(rejected("truncated", record.strip()))
            continue
        parts = LINE_ANSWER.split(record)
        if len(parts) != 2:
            pairs.append(rejected("two_answers" if len(parts) > 2 else "no_answer", record.strip()))
            continue
        question, answer = (part.strip().rstrip("-*_=").strip() for part in parts)
        stem, options, letters = split_options(question)
        if options:
            pair = checked(stem, chosen(answer, options, letters), options, None)
        else:
            pair = read_pair(f"{QUESTION_TAG} {question} <ANS> {answer}")
        pairs.append(pair)
    return pairs


def split_options(question: str) -> tuple[str, list[str], list[str]]:
    """The stem, and the options of the lines at its end with their letters; no options if they have the wire's form."""
    if COT_CUE in question:
        return question, [], []
    lines = question.splitlines()
    first = len(lines)
    while first > 1 and (LETTERED.fullmatch(lines[first - 1]) or LISTED.fullmatch(lines[first - 1])):
        first -= 1
    listed = [line.strip().removeprefix(OPTION_MARK.strip()).strip() for line in lines[first:]]
    if len(listed) < 2:
        return question, [], []
    stem = "\n".join(lines[:first]).strip()
    letters, options = unlettered(listed)
    return stem.removesuffix(OPTIONS_CUE.strip()).strip(), options, letters
