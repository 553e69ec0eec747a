"""Benchmark items of a recipe: rows of files in any format of inputs, or the documents of lm-eval tasks.

Downloads nothing: the data of a task must be on this machine (HF_HUB_OFFLINE=0 allows downloads).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import Field, model_validator

from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import PathText, Settings
from ipt_jax.corpus.sources import find_files, read_rows, row_word
from synth.decontaminate.ngram_index import BenchmarkItem


class BenchmarkSettings(Settings):
    """Set `path` (files in any format of inputs, or a data set) or `task` (an lm-eval task, group or task file).

    A field may be nested (`choices.text`). If its first name is a list of blocks (`qa.question`), each block is an
    item. Each text of a list in a field counts as a field of the item.
    """

    path: PathText | None = None
    """File, directory, glob, URL or `hf:NAME` (docs/reference/inputs.md). Set either `path` or `task`."""
    task: str | None = None
    """lm-eval task, group or task file. Needs the extra evals."""
    fields: list[str] = Field(min_length=1)
    """Fields with the text to search for; `choices.text` names a nested field."""
    name: str | None = None
    """Name in reports. null: the task, or the name of the file."""
    split: str | None = None
    """Split of a data set, such as test. It also selects files by name."""
    subset: str | None = None
    """Subset (configuration) of a Hugging Face data set."""

    @model_validator(mode="after")
    def _path_or_task(self) -> Self:
        if (self.path is None) == (self.task is None):
            raise ValueError("a benchmark is a path or a task; set one of the two")
        return self

    @property
    def label(self) -> str:
        return self.name or self.task or Path(self.path or "").name.split(".")[0]


def read_items(number: int, settings: BenchmarkSettings) -> list[BenchmarkItem]:
    """The items of benchmark `number` of the recipe. Raises UserError if a row lacks a field, or no row has text."""
    items = []
    rows = task_rows(settings.task) if settings.task is not None else file_rows(settings)
    for where, row_id, row in rows:
        for item_id, block in blocks(row_id, row, settings.fields):
            texts = [text for field in settings.fields for text in field_texts(block, field, where)]
            items.append(BenchmarkItem(number, item_id, tuple(text for text in texts if text.strip())))
    if not any(item.fields for item in items):
        raise UserError(f"benchmark {settings.label}: no text in {', '.join(settings.fields)}; name other fields")
    return items


class BenchmarkFiles(NamedTuple):
    path: str
    split: str | None
    subset: str | None


def file_rows(settings: BenchmarkSettings) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(place for messages, id, row) of every row of the files of a benchmark."""
    for file in find_files(BenchmarkFiles(settings.path or "", settings.split, settings.subset)):
        if file.form in ("shards", "tfds"):
            raise UserError(f"benchmark {file.path}: has no rows of questions; set files of rows or a data set")
        for number, row in read_rows(file):
            named = row.get("id")
            row_id = f"{file.name}:{number}" if named is None else plain(named)
            yield f"benchmark {file.path}: {row_word(file)} {number}", row_id, row


def task_rows(name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(place for messages, id, document) of every document of a task, group, tag or task file."""
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(variable, "1")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"benchmark task {name}: lm_eval is not installed; run launch/setup.sh evals") from error
    try:
        # A task's own file does not need the index of all tasks, which takes seconds.
        tasks = TaskManager(include_defaults=not Path(name).is_file()).load(name)["tasks"]
    except Exception as error:  # lm_eval and datasets raise many: unknown task, missing data, invalid YAML
        raise UserError(
            f"benchmark task {name}: cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
            "check its name, and that its data are on this machine"
        ) from error
    for task_name, task in tasks.items():
        splits = {"test": task.test_docs if task.has_test_docs() else None}
        splits["validation"] = task.validation_docs if task.has_validation_docs() else None
        for split, documents in splits.items():
            for number, document in enumerate(documents() or () if documents else ()):
                row_id = f"{task_name}/{split}/{number}"
                yield f"benchmark task {row_id}", row_id, dict(document)


def blocks(row_id: str, row: dict[str, Any], fields: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The row, or one row per block if the first name of a nested field is a list."""
    heads = [field.partition(".")[0] for field in fields if "." in field]
    lists = [head for head in heads if isinstance(row.get(head), list)]
    if not lists:
        yield row_id, row
        return
    for number, block in enumerate(row[lists[0]]):
        yield f"{row_id}/{number}", {**row, lists[0]: block}


def field_texts(row: dict[str, Any], field: str, where: str) -> Iterator[str]:
    """The texts in a field: its value, or all values of a list or block; none for null."""
    value: Any = row
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            found = ", ".join(sorted(map(str, row))) or "none"
            raise UserError(f"{where}: no field {field!r}, found {found}; name the fields with its text")
        value = value[name]
    yield from leaves(value)


def leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from leaves(one)
    elif value is not None:
        yield plain(value)


def plain(value: Any) -> str:
    """A value as text. Lone surrogates, which JSON allows and UTF-8 does not, are replaced."""
    return str(value).encode("utf-8", "replace").decode()
