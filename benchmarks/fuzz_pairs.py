"""benchmarks/fuzz_pairs.py [--count N] [--seed S] [--processes P]

Compare the parser with an independent grammar on random and mutated outputs, and render the accepted pairs. The grammar
was written from the description of the format and shares no code with the parser: it reads lines, not cues. No output
may raise an error. Each pair must be accepted by both or by neither. Accepted pairs must render to a document that is
not empty, and must be parsed unchanged from their wire form. Prints one JSON object. Exits with code 1 at the first
difference and prints the seed that reproduces it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import string
import sys
import time
from collections import Counter

from ipt_jax.corpus.records import GroupText, Pair, SynthGroup
from synth.format.parser import parse_completion
from synth.format.wire import pairs_text
from synth.render.documents import Renderer, RenderSettings

# ---- the grammar: one completion as a text between closing tags
#
# piece    = blank "<QUE>" question "<ANS>" answer         (neither contains a tag)
# question = stem [options] [cue]                          (stripped; the stem is not blank)
# options  = a line "Options:", then 2 to 26 lines "- text", all different, none blank; blank lines between them
# cue      = the last line, "Let's think step by step."    (no other line begins so)
# answer   = text, or with the cue: text, then one line that begins with "Therefore, the answer is "; without, no such
#            line. With options the final answer is one of them, with or without a closing period.
# A pair whose stem and options are those of a pair accepted before it (but for case, blanks, order) is none.

PLAIN = r"(?:(?!<QUE>|<ANS>|</?CON>)[\s\S])*"
PIECE = re.compile(rf"\s*<QUE>(?P<question>{PLAIN})<ANS>(?P<answer>{PLAIN})")
CUE, FINAL, OPTIONS = "Let's think step by step.", "Therefore, the answer is ", "Options:"


def accepts(text: str) -> list[bool]:
    """For each piece that a closing tag ends, whether it is a pair. False for text after the last one."""
    *pieces, tail = text.split("</END>")
    seen: set[tuple[str, frozenset[tuple[str, int]]]] = set()
    verdicts = []
    for piece in pieces:
        key = grammar_key(piece)
        verdicts.append(key is not None and key not in seen)
        if key is not None:
            seen.add(key)
    return verdicts + [False] * bool(tail.strip())


def grammar_key(piece: str) -> tuple[str, frozenset[tuple[str, int]]] | None:
    """What distinguishes a pair from others of its text. None if the piece is not a pair."""
    found = PIECE.fullmatch(piece)
    if found is None:
        return None
    lines, answer = found["question"].strip().split("\n"), found["answer"].strip()
    cues = [place for place, line in enumerate(lines) if line.startswith(CUE)]
    reasoned = bool(cues)
    if reasoned and (cues != [len(lines) - 1] or lines.pop() != CUE):
        return None
    final = final_of(answer, reasoned)
    first = next((place for place, line in enumerate(lines) if line.startswith(OPTIONS)), None)
    options = [] if first is None else options_of(lines[first:])
    stem = "\n".join(lines[:first])
    if not final or options is None or not stem.strip():
        return None
    if options and not any(same_answer(final, option) for option in options):
        return None
    return squeezed(stem), frozenset(Counter(squeezed(option) for option in options).items())


def final_of(answer: str, reasoned: bool) -> str | None:
    """The final answer; None where reasoning and question do not fit."""
    lines = answer.split("\n")
    finals = [place for place, line in enumerate(lines) if place and line.startswith(FINAL)]
    if len(finals) != reasoned:
        return None
    return "\n".join(lines[finals[0] :]).removeprefix(FINAL).strip() if finals else answer


def options_of(lines: list[str]) -> list[str] | None:
    head, *rest = lines
    if head.removeprefix(OPTIONS).strip():
        return None
    listed = [line for line in rest if line.strip()]
    options = [line[2:].strip() for line in listed]
    if any(not line.startswith("- ") for line in listed) or not all(options):
        return None
    return options if 2 <= len(options) <= 26 and len(set(options)) == len(options) else None


def same_answer(one: str, other: str) -> bool:
    return one.removesuffix(".") == other.removesuffix(".")


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text.casefold()).strip()


# ---- outputs

TAGS = ["<QUE>", "<ANS>", "</END>", "<CON>", "</CON>"]
SYNTAX = [
    "\n\n",
    "\n",
    " ",
    "\nOptions:",
    "\n- ",
    f"\n{CUE}",
    f"\n{FINAL}",
    "Options:",
    CUE,
    FINAL,
    "- ",
    ".",
    "a",
    "b",
]
ODD = [
    "</s>",
    "<s>",
    "<",
    ">",
    "</END",
    "END>",
    "\t",
    "\r\n",
    "\u2028",
    "\x00",
    "\u00a0",
    "é",
    "你好。",
    "🙂",
    "İ",
    "ß",
]
BITS = [*TAGS, *SYNTAX, *ODD, "{answer}", "{text}"]
WORDS = [
    "Ann",
    "mill",
    "the",
    "old",
    "stands",
    "river",
    "Who",
    "where",
    "two",
    "Paris",
    "x",
    "{question}",
    "naïve",
    "水",
]


def some_words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def valid_pair(rng: random.Random) -> str:
    question, answer = some_words(rng, 6) + "?", some_words(rng, 4)
    if rng.random() < 0.5:
        count = rng.choice([2, 3, 4, 26, 27])
        options = [f"{some_words(rng, 3)} {number}" for number in range(count)]
        answer = rng.choice(options) + rng.choice(["", "."])
        question += "\nOptions:" + "".join(f"\n- {option}" for option in options)
    if rng.random() < 0.4:
        question += f"\n{CUE}"
        answer = f"{some_words(rng, 8)}.\n{FINAL}{answer}"
    return f"<QUE> {question} <ANS> {answer} </END>"


def valid_text(rng: random.Random) -> str:
    pairs = [valid_pair(rng) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.2:
        pairs.append(rng.choice(pairs))
    return "\n\n".join(pairs)


def tag_soup(rng: random.Random) -> str:
    return "".join(rng.choices(BITS, k=rng.randint(0, 30)))


def soup_between_tags(rng: random.Random) -> str:
    """Pairs of syntax alone: tags where they belong, and any order of the rest between them."""
    question, answer = (["".join(rng.choices(SYNTAX, k=rng.randint(1, 9))) for _ in range(3)] for _ in range(2))
    return "".join(f"<QUE>{ask}<ANS>{reply}</END>" for ask, reply in zip(question, answer, strict=True))


def any_unicode(rng: random.Random) -> str:
    letters = (chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(20))
    return "".join(rng.choice([letter, rng.choice(BITS)]) for letter in letters)


def mutated(rng: random.Random) -> str:
    text = valid_text(rng)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(text) + 1)
        stop = min(len(text), start + rng.choice([0, 0, 1, 1, 2, 5, 9, 30]))
        put = rng.choice(["", rng.choice(BITS), rng.choice(BITS), rng.choice(string.printable), text[start:stop] * 2])
        text = text[:start] + put + text[stop:]
    return text


def swapped(rng: random.Random) -> str:
    """A valid text with parts of its syntax replaced, doubled or removed."""
    bits = re.split(r"(<QUE>|<ANS>|</END>|\n)", valid_text(rng))
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(bits))
        bits[place] = rng.choice([rng.choice(BITS), bits[place] * 2, "", rng.choice(bits)])
    return "".join(bits)


def truncated(rng: random.Random) -> str:
    text = valid_text(rng)
    return text[rng.choice([0, 0, rng.randrange(len(text))]) : rng.randrange(len(text) + 1)]


KINDS = [valid_text, tag_soup, soup_between_tags, any_unicode, mutated, mutated, swapped, swapped, truncated]


# ---- the comparison


def check(text: str, rng: random.Random) -> tuple[int, int]:
    """Accepted pairs and all; AssertionError where the two sides differ or something else is wrong."""
    pairs = parse_completion(text, finished=rng.random() < 0.5)
    assert [pair.accepted for pair in pairs] == accepts(text), "grammar and parser differ"
    accepted = [pair for pair in pairs if pair.accepted]
    assert parse_completion(pairs_text(accepted), True) == accepted, "accepted pairs are not read back"
    rendered(text, pairs, rng)
    return len(accepted), len(pairs)


def rendered(text: str, pairs: list[Pair], rng: random.Random) -> None:
    """Renders the pairs under a context that is hostile too."""
    context = rng.choice(["An old mill.", text, "{answer} {text}"])
    record = GroupText("t", 0, len(context), context, "s", pairs, 1, 0, 0, 0, "stop")
    group = SynthGroup(f"{rng.randrange(1 << 40):x}", [record], "m", "w", {}, "f")
    for document in Renderer(RECIPE, Counter(), Counter()).documents(group):
        assert document.text.strip(), "an empty document"


RECIPE = RenderSettings(groups="", output="")


def run(job: tuple[int, int, int]) -> Counter[str]:
    seed, start, stop = job
    found: Counter[str] = Counter()
    for number in range(start, stop):
        rng = random.Random(f"{seed} {number}")
        kind = KINDS[number % len(KINDS)]
        text = kind(rng)
        try:
            accepted, pairs = check(text, rng)
        except Exception as error:
            raise RuntimeError(f"seed {seed}, number {number}, {kind.__name__}: {error}\n{text!r}") from error
        found.update(outputs=1, pairs=pairs, accepted=accepted, with_accepted=accepted > 0)
        found[f"kind.{kind.__name__}"] += 1
        found[f"accepted.{kind.__name__}"] += accepted
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    started, step = time.monotonic(), 5000
    stop = arguments.start + arguments.count
    jobs = [(arguments.seed, first, min(first + step, stop)) for first in range(arguments.start, stop, step)]
    total: Counter[str] = Counter()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for done, found in enumerate(pool.imap_unordered(run, jobs), 1):
            total.update(found)
            if done % 20 == 0:
                print(f"{total['outputs']:,} outputs, {time.monotonic() - started:.0f} s", file=sys.stderr)
    print(json.dumps({**total, "disagreements": 0, "seconds": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main()
