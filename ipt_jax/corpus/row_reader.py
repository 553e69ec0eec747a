"""Converts a row of a data set to a Document: its fields of text, id and source, and why a row is dropped.

A field is a column, or names joined by dots for a value inside it; a list on the way means all of its items, and
the texts of a list are joined by line feeds. A fault of the data (an empty text, a null, a lone surrogate, a length out
of bounds) gives `Dropped` with its reason. A fault of the recipe (a missing field, one that is not text) is a UserError
that names file and row. Text is literal: braces in a value are not a template, and text that spells a control token
stays text.
"""

import hashlib
import re
from typing import Any, NamedTuple, Self

import pydantic
from pydantic import Field

from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import PathText, Settings
from ipt_jax.corpus.records import Document, Kind, Segment

_FIELD = re.compile(r"\{([^{}]+)\}")
CONTENT = "content"
CONTENT_LETTERS = 24  # of the hash of a text: 96 bits
MISSING = object()


class SourceSettings(Settings):
    """One input: where its rows are and which fields hold the text and the id. A path alone is such a block."""

    path: PathText
    """File, directory, glob or URL (docs/reference/inputs.md), output of a stage, `hf:NAME` or `tfds/NAME/VERSION`."""
    text: str | list[str] = "text"
    """Field of the text; `data.text` names a nested one. A list of fields: their texts are joined by line feeds."""
    id: str | None = "id"
    """Field of the id. A row without it gets file and row number. content: a hash of the text. null: never a field."""
    source: str | None = None
    """Name of the origin, stored with each document. null: the last part of `path`."""
    kind: Kind = "raw"
    """Kind of the documents, as counted and coloured in plans."""
    template: str | None = None
    """Template that joins several fields into one text, such as `{prompt} {response}`. A null field is left out."""
    loss: list[str] | None = Field(default=None, min_length=1)
    """Fields of `template` that are training targets. null: all of the text."""
    split: str | None = None
    """Split of a data set, such as train. It also selects files by name."""
    subset: str | None = None
    """Subset (configuration) of a Hugging Face data set."""
    min_characters: int = Field(default=0, ge=0)
    """Minimum length in characters. Shorter texts are dropped and counted."""
    max_characters: int | None = Field(default=None, gt=0)
    """Maximum length in characters. Longer texts are dropped and counted. null: no limit."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

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
        if not self.fields:
            raise ValueError("text is an empty list; name a field")
        for name in self.loss or []:
            if name not in fields:
                raise ValueError(
                    f"loss names {name!r}, not a field of the template; set {', '.join(fields) or 'template'}"
                )
        return self

    @property
    def fields(self) -> list[str]:
        """The fields of the text."""
        named = [self.text] if isinstance(self.text, str) else self.text
        return list(dict.fromkeys(named if self.template is None else _FIELD.findall(self.template)))

    @property
    def id_field(self) -> str | None:
        return None if self.id == CONTENT else self.id

    @property
    def id_rule(self) -> str:
        """How its documents get their ids, as a manifest states it."""
        if self.id == CONTENT:
            return "hash of the text"
        return "file and row" if self.id is None else f"field {self.id}, or file and row where a row lacks it"


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


OneOrMore = pydantic.BeforeValidator(_listed)  # for a list of sources: a block or a path alone is a list of one


class Dropped(NamedTuple):
    reason: str


class RowReader:
    """Converts the rows of one file to Documents.

    `name`: of the file in ids. `where`: its path in messages. `unit`: what its numbers count, line or row. `origin`:
    the source of rows that name none, if the settings do not.
    """

    def __init__(self, settings: SourceSettings, name: str, where: str, unit: str, origin: str):
        self._settings, self._name, self._where, self._unit, self._origin = settings, name, where, unit, origin
        self._fields, self._id = settings.fields, settings.id_field
        self._parts = None if settings.template is None else _FIELD.split(settings.template)
        self._is_plain = self._parts is None and len(self._fields) == 1
        self._id_named = "id" in settings.model_fields_set and self._id is not None

    def document(self, row: dict[str, Any], number: int) -> Document | Dropped:
        """The document of row `number` of the file."""
        value = row.get(self._fields[0])
        plain = self._is_plain and isinstance(value, str)
        segments = [Segment(value)] if plain else self._segments(row, number)  # type: ignore[arg-type]
        if segments is None:
            return Dropped("null_text")
        text = segments[0].text if len(segments) == 1 else "".join(segment.text for segment in segments)
        identifier = self._identifier(row, number, text)
        source = self._settings.source or str(row.get("source") or self._origin)
        if reason := self._unusable(text, segments, identifier + source):
            return Dropped(reason)
        return Document(identifier, source, self._settings.kind, segments)

    def _segments(self, row: dict[str, Any], number: int) -> list[Segment] | None:
        """The text, in segments if a template says which fields are targets. None if it or a target is null."""
        texts = {field: self._text(field, row, number) for field in self._fields}
        known = [text for text in texts.values() if text is not None]
        if not known or any(texts[target] is None for target in self._settings.loss or ()):
            return None
        return [Segment("\n".join(known))] if self._parts is None else self._fill(texts, self._parts)

    def _identifier(self, row: dict[str, Any], number: int, text: str) -> str:
        if self._id is None:
            return self._place(number) if self._settings.id is None else content_id(text)
        found = row.get(self._id)
        if found is None and ("." in self._id or self._id_named):
            found = self._require(self._id, row, number, "id") if self._id_named else lookup(row, self._id)
        if not isinstance(found, str | int | float | None):
            raise UserError(
                f"{self._at(number)}: field {self._id!r} is a {type(found).__name__}, expected an id; "
                "set another field with id:"
            )
        return self._place(number) if found is None or found == "" else str(found)

    def _place(self, number: int) -> str:
        return f"{self._name}:{number}"

    def _text(self, field: str, row: dict[str, Any], number: int) -> str | None:
        """The text of a field, joined if it is a list of texts, or None for null."""
        value = row.get(field)
        if isinstance(value, str):
            return value
        value = self._require(field, row, number, "text")
        parts = list(_items(value))
        if odd := [one for one in parts if not isinstance(one, str)]:
            inner = f", such as {field}.{next(iter(odd[0]))}" if isinstance(odd[0], dict) and odd[0] else ""
            raise UserError(
                f"{self._at(number)}: field {field!r} is a {type(odd[0]).__name__}, expected text; "
                f"set another field{inner}"
            )
        return "\n".join(parts) if parts else None

    def _fill(self, texts: dict[str, str | None], parts: list[str]) -> list[Segment]:
        """The text of the template. A space before a target belongs to it, as tokenizers join it to the word."""
        targets = self._settings.loss
        filled: list[tuple[str, bool]] = []
        for part, is_field in _present(texts, parts):
            text = (texts[part] or "") if is_field else part
            loss = targets is None or (is_field and part in targets)
            if not text:
                continue
            if loss and filled and not filled[-1][1] and filled[-1][0].endswith(" "):
                filled[-1], text = (filled[-1][0][:-1], False), " " + text
            if filled and filled[-1][1] == loss:
                filled[-1] = (filled[-1][0] + text, loss)
            else:
                filled.append((text, loss))
        return [Segment(text, loss) for text, loss in filled if text]

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

    def _require(self, field: str, row: dict[str, Any], number: int, setting: str) -> Any:
        value = lookup(row, field)
        if value is MISSING:
            found = ", ".join(sorted(field_names(row))) or "none"
            raise UserError(f"{self._at(number)}: no field {field!r}, found {found}; set the {setting} field")
        return value

    def _at(self, number: int) -> str:
        return f"input {self._where}: {self._unit} {number}"


def content_id(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:CONTENT_LETTERS]


def lookup(row: dict[str, Any], field: str) -> Any:
    """The value of a field; of a list on the way, the values of its items. MISSING if the row has no such field."""
    if field in row:
        return row[field]
    value: Any = row
    names = field.split(".")
    for place, name in enumerate(names):
        if isinstance(value, list):
            found = [lookup(one, ".".join(names[place:])) for one in value if isinstance(one, dict)]
            return (
                [one for one in found if one is not MISSING]
                if found != [MISSING] * len(found) or not value
                else MISSING
            )
        if value is None:
            return None
        if not isinstance(value, dict) or name not in value:
            return MISSING
        value = value[name]
    return value


def field_names(row: dict[str, Any]) -> list[str]:
    """The fields of a row; of a block, the fields in it."""
    return [
        name
        for key, one in row.items()
        for name in ([f"{key}.{inner}" for inner in one] if isinstance(one, dict) and one else [str(key)])
    ]


def _items(value: Any) -> list[Any]:
    """The values of nested lists in order, without nulls."""
    if isinstance(value, list):
        return [inner for one in value for inner in _items(one)]
    return [] if value is None else [value]


def _present(texts: dict[str, str | None], parts: list[str]) -> list[tuple[str, bool]]:
    """(part, whether it is a field) of a template, without its null fields and the blanks beside them."""
    kept = list(enumerate(parts))
    for place in range(1, len(parts), 2):
        if texts[parts[place]] is None:
            blank = place + 1 if place + 2 < len(parts) else place - 1
            dropped = {place, blank} if parts[blank].isspace() else {place}
            kept = [one for one in kept if one[0] not in dropped]
    return [(part, place % 2 == 1) for place, part in kept]
