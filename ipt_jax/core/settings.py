"""Settings: YAML files checked by frozen pydantic models, `key.sub=value` overrides, user errors, seeded draws.

Guarantees: an unknown key is refused with the nearest known one; every mistake becomes one line that says what was
given, what was expected and what to change. Random draws come from (seed, keys) alone, so that no draw depends on
another's having been made.
"""

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from ipt_jax.core.errors import UserError


class Settings(pydantic.BaseModel):
    """Base of every settings block: frozen; rejects unknown keys, non-finite numbers and booleans given for numbers.

    The string below a field is its description in `--help` and in docs/reference/recipes.md.
    """

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """pydantic would take true for 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        taken = {annotation, *typing.get_args(annotation)}
        if isinstance(value, bool) and taken & {int, float} and bool not in taken:
            raise ValueError("expected a number")
        return value


S = TypeVar("S", bound=Settings)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `2e-4` and `100e9` as numbers (YAML 1.1 asks for a dot and would yield strings), and refuses
    a key that stands twice (it would take the last) and the NUL character, which no path can hold."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"the key {key.value!r} stands twice, again in line {line}; keep one")
                seen.add(key.value)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if "\0" in node.value:
            raise yaml.YAMLError(f"a NUL character (\\0) in line {node.start_mark.line + 1}; take it out")
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
        what = "a directory" if path.is_dir() else "no regular file" if path.exists() else "no such file"
        raise UserError(f"config {path}: {what}; give the path of a YAML recipe")
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
    """`data` as settings of type `cls`; the first mistake as a UserError that begins with `where`."""
    try:
        return cls.model_validate(data)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_describe(cls, error)}") from error


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: expected key.sub=value, for example train.seed=1")
    if "[" in key:
        dotted = re.sub(r"\[(\w*)\]", r".\1", key)
        raise UserError(f"override {override!r}: an item of a list is named by its number; write {dotted}={text}")
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
        raise UserError(f"override {override!r}: {name!r} is no index into a list of {len(block)}")
    return int(name)


def _describe(cls: type[Settings], error: pydantic.ValidationError) -> str:
    """One line for the first mistake, unknown keys before others: they often cause the rest."""
    mistakes = sorted(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")
    first = mistakes[0]
    name = _name(first)
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_names(cls, first["loc"])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"unknown key {name!r}; {hint}{more}"
    if first["type"] == "missing":
        missing = [_name(mistake) for mistake in mistakes if mistake["type"] == "missing"]
        more = f" (and {len(mistakes) - len(missing)} more)" if len(mistakes) > len(missing) else ""
        return f"{', '.join(missing)} {'are missing; add them' if missing[1:] else 'is missing; add it'}{more}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{name}: {message[0].lower() + message[1:]}, given {first['input']!r}{more}"


def _name(mistake: Any) -> str:
    return ".".join(str(part) for part in mistake["loc"] if not _is_tag(part)) or "settings"


def _is_tag(part: int | str) -> bool:
    """pydantic names the tried branch of a union inside the location; a user never wrote that."""
    return isinstance(part, str) and ("[" in part or part[:1].isupper())


def _known_names(cls: type[Settings], location: tuple[int | str, ...]) -> list[str]:
    block: type[Settings] | None = cls
    for part in location[:-1]:
        if block is None or not isinstance(part, str):
            continue
        for name, field in block.model_fields.items():
            if part in (name, field.alias):
                block = _settings_inside(field.annotation)
                break
    names = block.model_fields.items() if block else []
    return [field.alias or name for name, field in names]


def _settings_inside(annotation: Any) -> type[Settings] | None:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        for inner in typing.get_args(annotation):
            if found := _settings_inside(inner):
                return found
    return None
