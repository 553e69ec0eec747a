"""docs/recipes.md lists every field of every recipe with its default, each with a line on what it does."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator

import pytest
from extras import ROOT
from pydantic import BaseModel

from ipt_jax.config import Recipe
from ipt_jax.corpus.sources import SourceSettings
from ipt_jax.data.tokenize import TokenizeSettings
from synth.collect import CollectSettings
from synth.config import RunSettings, SynthesizerSettings
from synth.decontaminate.run import DecontaminateSettings
from synth.mine.run import MineSettings
from synth.render import RenderSettings
from synth.verify.settings import VerifySettings

PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
SHARED: dict[str, type[BaseModel]] = {"A source": SourceSettings, "The block `synthesizer`": SynthesizerSettings}
SECTIONS: dict[str, type[BaseModel]] = {
    **SHARED,
    "`ipt tokenize`": TokenizeSettings,
    "`ipt plan`, `show`, `train`, `compile`": Recipe,
    "`synth collect`": CollectSettings,
    "`synth run`": RunSettings,
    "`synth mine`": MineSettings,
    "`synth verify`": VerifySettings,
    "`synth render`": RenderSettings,
    "`synth decontaminate`": DecontaminateSettings,
}


def fields(block: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, default) of every field; N stands for a number in a list. Shared blocks have their own sections."""
    inherited = SourceSettings.model_fields if block is not SourceSettings and issubclass(block, SourceSettings) else {}
    for name, field in block.model_fields.items():
        if name in inherited:
            continue
        name = prefix + (field.alias or name)
        yield name, "required" if field.is_required() else as_yaml(field.get_default(call_default_factory=True))
        for inner, listed in blocks(field.annotation):
            if inner not in SHARED.values():
                yield from fields(inner, f"{name}.N." if listed else f"{name}.")


def blocks(annotation: object, listed: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, listed
    for part in typing.get_args(annotation):
        yield from blocks(part, listed or typing.get_origin(annotation) is list)


def as_yaml(value: object) -> str:
    if isinstance(value, BaseModel):
        return "{" + ", ".join(f"{k}: {as_yaml(v)}" for k, v in value if v != type(value).model_fields[k].default) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(as_yaml, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def rows(section: str) -> list[tuple[str, ...]]:
    body = PAGE.split(f"\n## {section}\n", 1)[1].split("\n## ")[0]
    return re.findall(r"^\| `([\w.]+)` \| `?([^|`]+)`? \| ([^|]*\S) \|$", body, re.MULTILINE)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_stands_on_the_page_with_its_default(section: str) -> None:
    assert [(name, default) for name, default, _ in rows(section)] == list(fields(SECTIONS[section]))


def test_no_section_is_about_anything_else() -> None:
    named = set(re.findall(r"^## (.+)$", PAGE, re.MULTILINE))
    assert named == {*SECTIONS, "Overrides", "Rows of `ipt eval`"}
