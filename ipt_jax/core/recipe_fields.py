"""The fields of a recipe as `--help` and docs/reference/recipes.md list them, read from the settings classes.

Guarantees that names, types, defaults and descriptions are those of the code: there is no second list to update.
"""

import json
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel


class FieldLine(NamedTuple):
    """One field. `name` is dotted, with N for the index of a list item; `default` is YAML, or "required"."""

    name: str
    type: str
    default: str
    description: str


def list_fields(
    block: type[BaseModel], *, without: tuple[type[BaseModel], ...] = (), prefix: str = ""
) -> Iterator[FieldLine]:
    """The fields of `block` and of the blocks inside it, except those declared by the classes in `without`."""
    inherited = {
        name for base in without if issubclass(block, base) and block is not base for name in base.model_fields
    }
    for key, field in block.model_fields.items():
        if key in inherited:
            continue
        name = prefix + (field.alias or key)
        default = "required" if field.is_required() else _as_yaml(field.get_default(call_default_factory=True))
        yield FieldLine(name, _type_name(field.annotation), default, field.description or "")
        for inner, listed in _blocks(field.annotation):
            if inner not in without:
                yield from list_fields(inner, without=without, prefix=f"{name}.N." if listed else f"{name}.")


def _blocks(annotation: Any, listed: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    """The settings classes in an annotation, each with whether it is the item of a list."""
    if _is_block(annotation):
        yield annotation, listed
    for part in typing.get_args(annotation):
        yield from _blocks(part, listed or typing.get_origin(annotation) is list)


def _is_block(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _type_name(annotation: Any) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type_name, parts))
    if origin in (list, tuple):
        item = _type_name(parts[0])
        return "list of blocks" if _is_block(parts[0]) else f"list of ({item})" if "|" in item else f"list of {item}"
    if annotation is type(None):
        return "null"
    return "block" if _is_block(annotation) else annotation.__name__


def _as_yaml(value: Any) -> str:
    if isinstance(value, BaseModel):
        given = ((name, inner) for name, inner in value if inner != type(value).model_fields[name].default)
        return "{" + ", ".join(f"{name}: {_as_yaml(inner)}" for name, inner in given) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return value if isinstance(value, str) else json.dumps(value)
