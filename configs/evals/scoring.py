"""Data and scores of the ten domain tasks, for the task files of lm-evaluation-harness in this folder.

The rules are those of the authors' evaluation code (LMOps `adaptllm/`):

- An option follows its question after one space. The option with the highest mean log-probability per token wins, the
  first of equal ones. The harness does not report token counts; `ipt eval` adds them to every log-likelihood
  (attribute `tokens`), whatever the backend.
- micro-F1 and weighted F1 are scikit-learn's, over the indices of options. Headline is the mean over its nine classes.
- A generated answer is one line. ConvFinQA is correct if a number of that line is within 0.01 of the label. Numbers are
  parsed; the authors evaluate them as Python expressions, which fails for a leading zero such as 007.
- NER has two scores. `entity_f1` compares sets of (text, type). `ner_adaptllm` repeats the authors' score: an entity is
  one word before a type in parentheses, every entity starts at position 0, so two entities of one type always overlap.
"""

from __future__ import annotations

import functools
import math
import os
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from sklearn.metrics import f1_score

from ipt_jax.core.errors import UserError

FOLDERS = {"ConvFinQA": "ConviFinQA"}  # where the published data set spells its folder in another way
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}

# ---- data


def load(suite: str, name: str, columns: list[str], note: str = "", **_: Any) -> dict[str, datasets.Dataset]:
    """The rows of a task, from the folder $IPT_EVAL_DATA, else from the hub. Prints `note` on stderr.

    The folder holds NAME.jsonl (or .json, .parquet), NAME/test.*, or copies of the published repositories.
    """
    if note:
        print(f"{name}: {note}", file=sys.stderr)
    folder, where = os.environ.get("IPT_EVAL_DATA"), f"AdaptLLM/{suite}-tasks"
    if folder is not None:
        file = _local_file(Path(folder), suite, name)
        where = str(file)
        rows = datasets.load_dataset(FORMATS[file.suffix], data_files=str(file), split="train")
    else:
        try:
            rows = datasets.load_dataset(where, name, split="test")
        except Exception as error:
            raise UserError(
                f"{name}: {where} cannot be read from the hub ({error}); set IPT_EVAL_DATA to a folder with a copy"
            ) from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise UserError(f"{name}: {where} has no column {missing[0]!r}, only {rows.column_names}; correct the data")
    if "options" in columns:
        for row in rows.select_columns(["id", "options", "gold_index"]):
            if not 0 <= row["gold_index"] < len(row["options"]):
                raise UserError(f"{name}: {where}: question {row['id']} has gold_index {row['gold_index']}; correct it")
    return {"test": rows}


def _local_file(folder: Path, suite: str, name: str) -> Path:
    spellings = [name, FOLDERS.get(name, name)]
    for pattern in ("{name}.*", "{name}/test*", f"{suite}-tasks/{{name}}/test*"):
        for spelling in spellings:
            found = sorted(p for p in folder.glob(pattern.format(name=spelling)) if p.suffix in FORMATS)
            if found:
                return found[0]
    raise UserError(f"{name}: IPT_EVAL_DATA={folder} has neither {name}.jsonl nor {name}/test.jsonl; add the file")


# ---- options


def _choose(metric: str | None, doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`acc_token` of one question, and (class, gold, pick) for the F1 that is called `metric`."""
    if not all(hasattr(result, "tokens") for result in results):
        raise UserError("the domain tasks need token counts, which plain lm_eval does not report; run `ipt eval`")
    means = [result[0] / result.tokens for result in results]
    gold, pick = doc["gold_index"], means.index(max(means))
    scores: dict[str, Any] = {"acc_token": float(pick == gold)}
    return scores if metric is None else scores | {metric: (doc.get("class_id", 0), gold, pick)}


accuracy = functools.partial(_choose, None)
micro = functools.partial(_choose, "micro_f1")
weighted = functools.partial(_choose, "weighted_f1")
headline = functools.partial(_choose, "headline_f1")

Picks = Sequence[tuple[int, int, int]]  # class, gold, pick


def _f1(picks: Picks, average: str) -> float:
    return float(f1_score([gold for _, gold, _ in picks], [pick for *_, pick in picks], average=average))


def micro_f1(picks: Picks) -> float:
    return _f1(picks, "micro")


def weighted_f1(picks: Picks) -> float:
    return _f1(picks, "weighted")


def headline_f1(picks: Picks) -> float:
    """The mean of the weighted F1 of each class. The published set has nine; a `--limit` may leave fewer."""
    classes = sorted({found for found, *_ in picks})
    return statistics.fmean(weighted_f1([pick for pick in picks if pick[0] == one]) for one in classes)


# ---- numbers

NUMBER = re.compile(
    r"""
    [-+]?\.?\d+ (?:,\d{3})*   # digits, with commas between thousands
    \.?\d* (?:[eE][-+]?\d+)?  # fraction and exponent
    %*
    """,
    re.VERBOSE,
)


def numbers(text: str) -> list[float]:
    """The numbers of the first line: 'up 1,250.5 or 12%' -> [1250.5, 0.12]."""
    found = []
    for match in NUMBER.findall(text.strip(" ").partition("\n")[0]):
        digits = match.rstrip("%")
        try:
            value = float(digits.replace(",", "")) / 100 ** (len(match) - len(digits))
        except ValueError:  # such as '.5.'
            continue
        if math.isfinite(value):
            found.append(value)
    return found


def number(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`number_match`: whether any number of the answer is within 0.01 of the first number of the label."""
    expected = numbers(_label(doc))
    close = expected and any(math.isclose(one, expected[0], abs_tol=0.01) for one in numbers(results[0]))
    return {"number_match": float(bool(close))}


def _label(doc: Mapping[str, Any]) -> str:
    label = doc["label"]
    return str(label[0] if isinstance(label, list) else label)


# ---- entities


def entities(text: str) -> set[tuple[str, str]]:
    """The (text, type) pairs of one line: 'Ann Lee (PER), Bank (ORG)' -> {('Ann Lee', 'per'), ('Bank', 'org')}."""
    found = re.findall(r"([^()]+)\(([^()]+)\)", text.strip(" ").partition("\n")[0])
    return {(" ".join(name.strip(" ,;.").split()), kind.strip().casefold()) for name, kind in found}


def entity_f1(label: str, answer: str) -> float:
    """F1 of sets of entities. 1 if there are none on either side."""
    expected, found = entities(label), entities(answer)
    total = len(expected) + len(found)
    return 2 * len(expected & found) / total if total else 1.0


def ner_adaptllm(label: str, answer: str) -> float:
    """The authors' score. Half a point each for the text and the type; 0 if there are no entities on a side."""

    def read(text: str) -> list[tuple[str, str]]:
        return list(dict.fromkeys((word[:-1], kind) for word, kind in re.findall(r"(\S+\s+)\((\S+)\)", text)))

    expected, found, points = read(label), read(answer), 0
    for name, kind in expected:
        matches = ((name == other) + (kind == other_kind) for other, other_kind in found)
        points += next((match for match in matches if match), 0)
    return points / (len(expected) + len(found)) if points else 0.0


def ner(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    label, answer = _label(doc), results[0]
    return {"entity_f1": entity_f1(label, answer), "ner_adaptllm": ner_adaptllm(label, answer)}
