"""The benchmarks of a recipe as items: rows of JSON Lines, or documents of lm-eval tasks, by the fields to look for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pydantic
from pydantic import Field

from ipt_jax.corpus.settings import Settings, UserError
from ipt_jax.corpus.sources import find_files, read_jsonl
from synth.decontaminate.needles import Item

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


def read_items(number: int, settings: BenchmarkSettings) -> list[Item]:
    """The items of benchmark `number` of the recipe. UserError where a row lacks a field, or there is none."""
    items = []
    for where, row_id, row in benchmark_rows(settings):
        for item_id, block in blocks(row_id, row, settings.fields):
            texts = [text for field in settings.fields for text in field_texts(block, field, where)]
            items.append(Item(number, item_id, tuple(text for text in texts if text.strip())))
    if not any(item.fields for item in items):
        raise UserError(f"benchmark {settings.label}: no text in {', '.join(settings.fields)}; name other fields")
    return items


def benchmark_rows(settings: BenchmarkSettings) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(where it stands, id, row)."""
    if settings.task is not None:
        from synth.decontaminate.tasks import task_rows

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
