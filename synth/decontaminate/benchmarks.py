"""The benchmarks of a recipe as items: rows of JSON Lines, or documents of lm-eval tasks, by the fields to look for.

The test and validation documents of lm-eval tasks: the one module that imports lm_eval for decontamination.

Nothing is fetched: a task's data lie on this machine or in the hub's cache (HF_HUB_OFFLINE=0 allows fetching).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pydantic
from pydantic import Field

from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import Settings
from ipt_jax.corpus.sources import find_files, read_jsonl
from synth.decontaminate.ngram_index import BenchmarkItem


def task_rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(id, document) of every document of a task, of all tasks of a group or tag, or of a task's YAML file."""
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(variable, "1")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"benchmark task {name}: lm_eval is not installed; run launch/setup.sh evals") from error
    try:
        # The index of all tasks takes seconds, and a task's own file needs none of it.
        tasks = TaskManager(include_defaults=not Path(name).is_file()).load(name)["tasks"]
    except Exception as error:  # whatever lm_eval and datasets raise: no such task, no data, a broken YAML file
        raise UserError(
            f"benchmark task {name}: cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
            "check its name, and that its data lie on this machine"
        ) from error
    for task_name, task in tasks.items():
        splits = {"test": task.test_docs if task.has_test_docs() else None}
        splits["validation"] = task.validation_docs if task.has_validation_docs() else None
        for split, documents in splits.items():
            for number, document in enumerate(documents() or () if documents else ()):
                yield f"{task_name}/{split}/{number}", dict(document)


BINARY = (".parquet", ".arrow", ".array_record")


class BenchmarkSettings(Settings):
    """`path`: JSON Lines files; or `task`: an lm-eval task, group or task file. `fields` hold what to look for.

    A field may lie deeper (`choices.text`); where that leads through a list of blocks (`qa.question`), each block is an
    item. Where a field holds a list, each of its texts counts as one of the item's fields.
    """

    path: str | None = None
    """JSON Lines files. Give either `path` or `task`."""
    task: str | None = None
    """lm-eval task, group or task file. Needs the extra evals."""
    fields: list[str] = Field(min_length=1)
    """Fields that hold the text to look for; `choices.text` names a nested field."""
    name: str | None = None
    """Name in reports. null: the task, or the name of the file."""

    @pydantic.model_validator(mode="after")
    def _path_or_task(self) -> Self:
        if (self.path is None) == (self.task is None):
            raise ValueError("a benchmark is a path or a task; give one of the two")
        return self

    @property
    def label(self) -> str:
        return self.name or self.task or Path(self.path or "").name.split(".")[0]


def read_items(number: int, settings: BenchmarkSettings) -> list[BenchmarkItem]:
    """The items of benchmark `number` of the recipe. UserError where a row lacks a field, or there is none."""
    items = []
    for where, row_id, row in benchmark_rows(settings):
        for item_id, block in blocks(row_id, row, settings.fields):
            texts = [text for field in settings.fields for text in field_texts(block, field, where)]
            items.append(BenchmarkItem(number, item_id, tuple(text for text in texts if text.strip())))
    if not any(item.fields for item in items):
        raise UserError(f"benchmark {settings.label}: no text in {', '.join(settings.fields)}; name other fields")
    return items


def benchmark_rows(settings: BenchmarkSettings) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(where it stands, id, row)."""
    if settings.task is not None:
        from synth.decontaminate.benchmarks import task_rows

        for row_id, row in task_rows(settings.task):
            yield f"benchmark task {row_id}", row_id, row
        return
    for path in find_files(settings.path or ""):
        if path.is_dir() or path.suffix in BINARY:
            raise UserError(f"benchmark {path}: not JSON Lines; give one question a line in a .jsonl file")
        for line, row in read_jsonl(path):
            named = row.get("id")
            yield f"benchmark {path}: line {line}", f"{path.name}:{line}" if named is None else plain(named), row


def blocks(row_id: str, row: dict[str, Any], fields: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The row, or one for each block of the list that a field leads through."""
    heads = [field.partition(".")[0] for field in fields if "." in field]
    lists = [head for head in heads if isinstance(row.get(head), list)]
    if not lists:
        yield row_id, row
        return
    for number, block in enumerate(row[lists[0]]):
        yield f"{row_id}/{number}", {**row, lists[0]: block}


def field_texts(row: dict[str, Any], field: str, where: str) -> list[str]:
    """The texts of a field: itself, or all that a list or a block in its place holds; none for null."""
    value: Any = row
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            found = ", ".join(sorted(map(str, row))) or "none"
            raise UserError(f"{where}: no field {field!r}, found {found}; name the fields that hold its text")
        value = value[name]
    return list(leaves(value))


def leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from leaves(one)
    elif value is not None:
        yield plain(value)


def plain(value: Any) -> str:
    """A value as text; JSON may spell lone surrogates, which no UTF-8 can hold."""
    return str(value).encode("utf-8", "replace").decode()
