"""Settings: YAML files checked by frozen pydantic models, `key.sub=value` overrides, and the list of fields.

Guarantees: an error is one line that says what was given, what was expected and what to change; for an unknown key it
names the nearest known one. `--help` and docs/reference/recipes.md list the fields from these classes.
"""

import difflib
import json
import os
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import pydantic
import yaml

from ipt_jax.core.errors import UserError


class Settings(pydantic.BaseModel):
    """Base of every settings block: frozen. Rejects unknown keys, non-finite numbers and booleans for numbers.

    The string below a field is its description in `--help` and in docs/reference/recipes.md.
    """

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """pydantic accepts true for 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        taken = {annotation, *typing.get_args(annotation)}
        if isinstance(value, bool) and taken & {int, float} and bool not in taken:
            raise ValueError("expected a number")
        return value


def expand_path(path: str) -> str:
    """A path with `~` and variables of the environment replaced, and without `file://`."""
    expanded = os.path.expandvars(path)
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise ValueError(f"the variable {unset[0]} is not set; set it, or write the path out")
    if expanded.startswith("file://"):
        expanded = "/" + expanded.removeprefix("file://").removeprefix("localhost").lstrip("/")
    return os.path.expanduser(expanded)


PathText = Annotated[str, pydantic.AfterValidator(expand_path)]
S = TypeVar("S", bound=Settings)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `2e-4` and `100e9` as numbers (YAML 1.1 requires a dot), and rejects duplicate keys (YAML
    keeps the last) and the NUL character, which paths cannot hold."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.YAMLError(f"duplicate key {key.value!r} on line {key.start_mark.line + 1}; remove one")
                seen.add(key.value)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if "\0" in node.value:
            raise yaml.YAMLError(f"a NUL character (\\0) on line {node.start_mark.line + 1}; remove it")
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def load_settings(cls: type[S], path: str | Path, overrides: list[str] | None = None) -> S:
    """The settings in the YAML file at `path`, with `key.sub=value` overrides. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        fault = "is a directory" if path.is_dir() else "not a regular file" if path.exists() else "no such file"
        raise UserError(f"config {path}: {fault}; set the path of a YAML recipe")
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"config {path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"config {path}: expected a mapping of settings, found {type(data).__name__}")
    for override in overrides or []:
        _override(data, override)
    return check_settings(cls, data, where=f"config {path}")


def check_settings(cls: type[S], data: dict[str, Any], where: str) -> S:
    """`data` as settings of type `cls`. Raises UserError, which begins with `where`, for the first mistake."""
    try:
        return cls.model_validate(data)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_describe(cls, error, data)}") from error


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: expected key.sub=value, for example train.seed=1")
    if "[" in key:
        dotted = re.sub(r"\[(\w*)\]", r".\1", key)
        raise UserError(f"override {override!r}: list items are numbered; write {dotted}={text}")
    *parents, last = key.split(".")
    block: Any = data
    for name in parents:
        block = _child(block, name, override)
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        reason = "" if isinstance(error, yaml.MarkedYAMLError) else f": {error}"
        raise UserError(f"override {override!r}: the value is not valid YAML{reason}") from error
    if isinstance(block, list):
        block[_index(block, last, override)] = value
    else:
        block[last] = value


def _child(block: Any, name: str, override: str) -> Any:
    if isinstance(block, list):
        return block[_index(block, name, override)]
    if block.get(name) is None:
        block[name] = {}
    if not isinstance(block[name], dict | list):
        raise UserError(f"override {override!r}: {name} is {block[name]!r}, not a block with fields")
    return block[name]


def _index(block: list[Any], name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(block):
        raise UserError(f"override {override!r}: {name!r} is not an index of a list of {len(block)}")
    return int(name)


def _describe(cls: type[Settings], error: pydantic.ValidationError, data: dict[str, Any]) -> str:
    """One line for the first mistake. Unknown keys come first: they often cause the others."""
    found = [{**mistake, "loc": _given(mistake["loc"], data)} for mistake in error.errors()]
    mistakes: list[Any] = sorted(found, key=lambda mistake: mistake["type"] != "extra_forbidden")
    first = mistakes[0]
    name = _name(first)
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_names(cls, first["loc"])
        key, parents = str(first["loc"][-1]), name.rpartition(".")[0]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        elsewhere = [one.name for one in list_fields(cls) if one.name.split(".")[-1] == key]
        suggested = elsewhere or [f"{parents}.{one}".lstrip(".") for one in near]
        meant = " or ".join(map(repr, suggested))
        hint = f"did you mean {meant}?" if suggested else f"known here: {', '.join(sorted(known))}"
        return f"unknown key {name!r}; {hint}{more}"
    if first["type"] == "missing":
        missing = [_name(mistake) for mistake in mistakes if mistake["type"] == "missing"]
        more = f" (and {len(mistakes) - len(missing)} more)" if len(mistakes) > len(missing) else ""
        return f"{', '.join(missing)} {'are missing; add them' if missing[1:] else 'is missing; add it'}{more}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{name}: {message[0].lower() + message[1:]}, given {first['input']!r}{more}"


def _given(location: tuple[int | str, ...], value: Any) -> tuple[int | str, ...]:
    """A location without the index of a block that was given where a list of blocks is possible."""
    kept: list[int | str] = []
    for part in location:
        if isinstance(part, int) and not isinstance(value, list):
            continue
        kept.append(part)
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            value = value[part]  # type: ignore[index]
    return tuple(kept)


def _name(mistake: Any) -> str:
    return ".".join(str(part) for part in mistake["loc"] if not _is_tag(part)) or "settings"


def _is_tag(part: int | str) -> bool:
    """Whether a part of a location is pydantic's name of a branch of a union, which is not in the file."""
    return isinstance(part, str) and ("[" in part or part[:1].isupper())


def _known_names(cls: type[Settings], location: tuple[int | str, ...]) -> list[str]:
    block: type[pydantic.BaseModel] | None = cls
    for part in location[:-1]:
        fields = block.model_fields.items() if block and isinstance(part, str) else ()
        for name, field in fields:
            if part in (name, field.alias):
                block = next((inner for inner, _ in _blocks(field.annotation)), None)
                break
    names = block.model_fields.items() if block else []
    return [field.alias or name for name, field in names]


# ---- the fields of a recipe


class FieldLine(NamedTuple):
    """One field. `name` is dotted, with N for the index of a list item; `default` is YAML, or "required"."""

    name: str
    type: str
    default: str
    description: str


def list_fields(
    block: type[pydantic.BaseModel], *, without: tuple[type[pydantic.BaseModel], ...] = (), prefix: str = ""
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


def _blocks(annotation: Any, listed: bool = False) -> Iterator[tuple[type[pydantic.BaseModel], bool]]:
    """The settings classes in an annotation, each with whether it is the item of a list."""
    if _is_block(annotation):
        yield annotation, listed
    for part in typing.get_args(annotation):
        yield from _blocks(part, listed or typing.get_origin(annotation) is list)


def _is_block(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)


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
    if isinstance(value, pydantic.BaseModel):
        given = ((name, inner) for name, inner in value if inner != type(value).model_fields[name].default)
        return "{" + ", ".join(f"{name}: {_as_yaml(inner)}" for name, inner in given) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return value if isinstance(value, str) else json.dumps(value)
