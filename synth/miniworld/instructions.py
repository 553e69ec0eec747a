"""General instructions: small tasks on words and numbers that need no world knowledge.

They stand for the instruction data that domain recipes mix in (OpenOrca in the paper). Each is an instruction and its
response; what is asked comes from (seed, index). No name of any province occurs in them.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from ipt_jax.core.seeding import draw
from synth.miniworld.world import words


class Instruction(NamedTuple):
    id: str
    task: str
    prompt: str
    response: str


def write_instruction(seed: int, index: int) -> Instruction:
    rng = draw(seed, "instruction", index)
    task = TASKS[index % len(TASKS)]
    prompt, response = task(rng)
    return Instruction(f"instruction-{index:06d}", task.__name__, prompt, response)


def _pick(rng: random.Random, count: int) -> list[str]:
    """Different plain words."""
    values = words()["values"]
    return rng.sample([*values["trade"], *values["product"], *values["animal"], *values["prize"]], count)


def repeat(rng: random.Random) -> tuple[str, str]:
    chosen = " ".join(_pick(rng, rng.randint(2, 5)))
    return f"Repeat these words: {chosen}", chosen


def reverse(rng: random.Random) -> tuple[str, str]:
    chosen = _pick(rng, rng.randint(2, 4))
    return f"Write these words in reverse order: {' '.join(chosen)}", " ".join(reversed(chosen))


def sort(rng: random.Random) -> tuple[str, str]:
    chosen = _pick(rng, rng.randint(2, 4))
    return f"Sort these words by the alphabet: {' '.join(chosen)}", " ".join(sorted(chosen))


def count(rng: random.Random) -> tuple[str, str]:
    chosen = _pick(rng, rng.randint(2, 7))
    return f"How many words are these? {' '.join(chosen)}", str(len(chosen))


def first(rng: random.Random) -> tuple[str, str]:
    chosen = _pick(rng, rng.randint(2, 5))
    return f"Which word comes first? {' '.join(chosen)}", chosen[0]


def last(rng: random.Random) -> tuple[str, str]:
    chosen = _pick(rng, rng.randint(2, 5))
    return f"Which word comes last? {' '.join(chosen)}", chosen[-1]


def add(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randint(1, 20), rng.randint(1, 20)
    return f"What is {left} plus {right}?", str(left + right)


def odd_one_out(rng: random.Random) -> tuple[str, str]:
    values = words()["values"]
    animals = rng.sample(values["animal"], 3)
    other = rng.choice([word for word in values["product"] if word not in values["animal"]])
    listed = [*animals, other]
    rng.shuffle(listed)
    return f"Which of these is no animal? {', '.join(listed)}", other


TASKS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    repeat,
    reverse,
    sort,
    count,
    first,
    last,
    add,
    odd_one_out,
)
