"""Converts a row of a data set to a Document: its columns of text, id and source, and why a row is dropped.

A fault of the data (an empty text, a null, a lone surrogate, a length out of bounds) gives `Dropped` with its reason. A
fault of the recipe (a missing column, a column that is not text) is a UserError that names file and row. Text is
literal: braces in a value are not a template, and text that spells a control token stays text.
"""

import re
from typing import Any, NamedTuple, Self

import pydantic
from pydantic import Field

from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import Settings
from ipt_jax.corpus.records import Document, Kind, Segment

_FIELD = re.compile(r"\{([^{}]+)\}")


class SourceSettings(Settings):
    """One input: where its rows are and which columns hold the text and the id."""

    path: str
    """File, directory, glob, output of a stage, `hf:NAME` or `tfds/NAME/VERSION`."""
    text: str = "text"
    """Column of the text."""
    id: str = "id"
    """Column of the id. If not set, a row without the column gets an id made of file and line."""
    source: str | None = None
    """Name of the origin, stored with each document. null: the last part of `path`."""
    kind: Kind = "raw"
    """Kind of the documents, as counted and coloured in plans."""
    template: str | None = None
    """Template that joins several columns into one text, such as `{prompt} {response}`."""
    loss: list[str] | None = Field(default=None, min_length=1)
    """Columns of `template` that are training targets. null: all of the text."""
    split: str | None = None
    """Split of a Hugging Face or TFDS data set."""
    subset: str | None = None
    """Subset (configuration) of a Hugging Face data set."""
    min_characters: int = Field(default=0, ge=0)
    """Minimum length in characters. Shorter texts are dropped and counted."""
    max_characters: int | None = Field(default=None, gt=0)
    """Maximum length in characters. Longer texts are dropped and counted. null: no limit."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(
                f"max_characters {self.max_characters} is below min_characters {self.min_characters}, so no text fits; "
                "lower one or raise the other"
            )
        fields = [] if self.template is None else _FIELD.findall(self.template)
        if self.template is not None and not fields:
            raise ValueError(f"template {self.template!r} names no field; add one as {{question}}")
        for name in self.loss or []:
            if name not in fields:
                raise ValueError(
                    f"loss names {name!r}, not a field of the template; set {', '.join(fields) or 'template'}"
                )
        return self

    @property
    def columns(self) -> list[str]:
        """The columns of the text."""
        return [self.text] if self.template is None else list(dict.fromkeys(_FIELD.findall(self.template)))


class Dropped(NamedTuple):
    reason: str


class RowReader:
    """Converts the rows of one file to Documents. `name`: of the file, for rows without an id."""

    def __init__(self, settings: SourceSettings, name: str, path: str):
        self._settings, self._name, self._path = settings, name, path
        self._columns = settings.columns
        self._parts = None if settings.template is None else _FIELD.split(settings.template)
        self._id_named = "id" in settings.model_fields_set
        self._default_source = settings.path.removeprefix("hf:").rstrip("/").split("/")[-1].split(".")[0]

    def document(self, row: dict[str, Any], number: int) -> Document | Dropped:
        """The document of row `number` of the file."""
        for column in self._columns:
            value = row.get(column)
            if value is None:
                self._require(column, row, number, "text")
                return Dropped("null_text")
            if not isinstance(value, str):
                raise UserError(
                    f"{self._at(number)}: field {column!r} is a {type(value).__name__}, expected text; "
                    "set another field"
                )
        segments = [Segment(row[self._settings.text])] if self._parts is None else self._fill(row, self._parts)
        text = segments[0].text if len(segments) == 1 else "".join(segment.text for segment in segments)
        found = row.get(self._settings.id)
        if found is None and self._id_named:
            self._require(self._settings.id, row, number, "id")
        if not isinstance(found, str | int | float | None):
            raise UserError(
                f"{self._at(number)}: field {self._settings.id!r} is a {type(found).__name__}, expected an id; "
                "set another field with id:"
            )
        identifier = f"{self._name}:{number}" if found is None else str(found)
        source = self._settings.source or str(row.get("source") or self._default_source)
        if reason := self._unusable(text, segments, identifier + source):
            return Dropped(reason)
        return Document(identifier, source, self._settings.kind, segments)

    def _fill(self, row: dict[str, Any], parts: list[str]) -> list[Segment]:
        """The text of the template. A space before a target belongs to it, as tokenizers join it to the word."""
        targets = self._settings.loss
        texts: list[tuple[str, bool]] = []
        for place, part in enumerate(parts):
            text = row[part] if place % 2 else part
            loss = targets is None or (place % 2 == 1 and part in targets)
            if not text:
                continue
            if loss and texts and not texts[-1][1] and texts[-1][0].endswith(" "):
                texts[-1], text = (texts[-1][0][:-1], False), " " + text
            if texts and texts[-1][1] == loss:
                texts[-1] = (texts[-1][0] + text, loss)
            else:
                texts.append((text, loss))
        return [Segment(text, loss) for text, loss in texts if text]

    def _unusable(self, text: str, segments: list[Segment], names: str) -> str | None:
        """Why a row is dropped, or None."""
        if not text.strip():
            return "empty_text"
        if self._settings.loss and not any(segment.loss and segment.text.strip() for segment in segments):
            return "empty_target"
        try:  # JSON may hold lone surrogates, which are not valid in UTF-8
            text.encode()
            names.encode()
        except UnicodeEncodeError:
            return "lone_surrogate"
        if len(text) < self._settings.min_characters:
            return "too_short"
        limit = self._settings.max_characters
        return "too_long" if limit is not None and len(text) > limit else None

    def _require(self, column: str, row: dict[str, Any], number: int, setting: str) -> None:
        if column not in row:
            found = ", ".join(sorted(map(str, row))) or "none"
            raise UserError(f"{self._at(number)}: no field {column!r}, found {found}; set the {setting} field")

    def _at(self, number: int) -> str:
        return f"input {self._path}: line {number}"
