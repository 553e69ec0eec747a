"""Rows of a plan, decoded: what stands where, of which kind, and which tokens the loss counts.

A row's passages are its pieces of documents. A passage's text is cut into stretches: control tokens apart, and text
that is a target apart from text that is only read. A token is a target when the position before it predicts it; what
was predicted before a passage began (its document goes on from another row) is told by the token after.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ipt_jax.corpus.records import KIND_CODES
from ipt_jax.corpus.settings import UserError
from ipt_jax.corpus.tokenizer import Tokenizer
from ipt_jax.data.plan import Plan

KIND_NAMES = {code: str(kind) for kind, code in KIND_CODES.items()}


@dataclass(frozen=True)
class Stretch:
    """Tokens side by side that are alike. `control`: one control token, named by `text`."""

    text: str
    tokens: int
    target: bool
    control: bool = False


@dataclass(frozen=True)
class Passage:
    """A piece of one document. `targets` are the positions that predict one."""

    kind: str
    tokens: int
    targets: int
    stretches: list[Stretch]


@dataclass(frozen=True)
class ShownRow:
    row: int
    step: int
    slot: int
    seq_len: int
    passages: list[Passage]

    @property
    def tokens(self) -> int:
        return sum(passage.tokens for passage in self.passages)

    @property
    def targets(self) -> int:
        return sum(passage.targets for passage in self.passages)


def read_rows(plan: Plan, tokenizer: Tokenizer, *, step: int, rows: int) -> list[ShownRow]:
    """The first `rows` rows of the plan from `step` on. Raises UserError for a step beyond its end."""
    first = step * plan.rows_per_step
    if first >= plan.rows:
        raise UserError(f"--step {step}: the plan has {plan.steps:,} steps, 0 to {plan.steps - 1:,}; give one of them")
    numbers = range(first, min(first + rows, plan.rows))
    batch = plan.batch(numbers)
    return [
        ShownRow(
            number,
            *divmod(number, plan.rows_per_step),
            plan.settings.seq_len,
            _passages({name: array[place] for name, array in batch.items()}, tokenizer),
        )
        for place, number in enumerate(numbers)
    ]


def _passages(row: dict[str, np.ndarray], tokenizer: Tokenizer) -> list[Passage]:
    passages = []
    segments = row["segment_ids"]
    for number in range(1, int(segments.max(initial=0)) + 1):
        here = np.flatnonzero(segments == number)
        span = slice(here[0], here[-1] + 1)
        tokens, predicts = row["tokens"][span], row["loss_mask"][span]
        target = np.concatenate([predicts[:1], predicts[:-1]])
        if tokens[0] == tokenizer.bos_id:
            target[0] = False
        kind = KIND_NAMES[int(row["kinds"][here[0]])]
        passages.append(Passage(kind, len(here), int(predicts.sum()), _stretches(tokens, target, tokenizer)))
    return passages


def _stretches(tokens: np.ndarray, target: np.ndarray, tokenizer: Tokenizer) -> list[Stretch]:
    control = np.isin(tokens, [one for one in (tokenizer.bos_id, tokenizer.eos_id) if one is not None])
    changes = np.flatnonzero((np.diff(target) != 0) | control[1:] | control[:-1]) + 1
    found = []
    for start, stop in _spans([0, *changes.tolist(), len(tokens)]):
        if control[start]:
            name = tokenizer.control_name(int(tokens[start]))
            found.append(Stretch(name, 1, bool(target[start]), control=True))
        else:
            text = tokenizer.spell(tokens[start:stop].tolist(), first=start == 0 or bool(control[start - 1]))
            found.append(Stretch(text, stop - start, bool(target[start])))
    return found


def _spans(bounds: Sequence[int]) -> list[tuple[int, int]]:
    return [(low, high) for low, high in zip(bounds, bounds[1:], strict=False) if low < high]
