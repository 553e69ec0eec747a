"""docs/reference/recipes.md lists every field of every recipe, generated from the settings classes.

Run `python tests/docs/test_recipe_page.py` to rewrite its tables after a change of a field or of its description.
"""

from __future__ import annotations

import re

import pytest
from extras import ROOT
from pydantic import BaseModel

from ipt_jax.ablate.run import AblateSettings
from ipt_jax.config import Recipe
from ipt_jax.core.settings import FieldLine, list_fields
from ipt_jax.corpus.row_reader import SourceSettings
from ipt_jax.data.tokenize import TokenizeSettings
from synth.collect.run import CollectSettings
from synth.config import RunSettings, SynthesizerSettings
from synth.decontaminate.run import DecontaminateSettings
from synth.evaluate.run import EvalSettings
from synth.mine.run import MineSettings
from synth.render.documents import RenderSettings
from synth.verify.run import VerifySettings

PATH = ROOT / "docs" / "reference" / "recipes.md"
PAGE = PATH.read_text(encoding="utf-8")
SHARED: dict[str, type[BaseModel]] = {"A source": SourceSettings, "The block `synthesizer`": SynthesizerSettings}
SECTIONS: dict[str, type[BaseModel]] = {
    **SHARED,
    "`ipt tokenize`": TokenizeSettings,
    "`ipt plan`, `show`, `train`, `compile`": Recipe,
    "`ipt ablate`": AblateSettings,
    "`synth collect`": CollectSettings,
    "`synth run`": RunSettings,
    "`synth mine`": MineSettings,
    "`synth verify`": VerifySettings,
    "`synth eval`": EvalSettings,
    "`synth render`": RenderSettings,
    "`synth decontaminate`": DecontaminateSettings,
}


TABLE = re.compile(r"^\| field .*\n(?:\|.*\n)+", re.MULTILINE)


def fields(section: str) -> list[FieldLine]:
    """Fields of a section. Those of a shared block are listed in the section of that block only."""
    return list(list_fields(SECTIONS[section], without=tuple(SHARED.values())))


def table(section: str) -> str:
    lines = ["| field | type | default | what it does |", "|---|---|---|---|"]
    for field in fields(section):
        text = re.sub(r"docs/reference/(\w+\.md)", r"[\1](\1)", field.description)
        text = text.replace(" ([recipes.md](recipes.md))", "")
        default = field.default if field.default == "required" else f"`{field.default}`"
        lines.append(f"| `{field.name}` | `{escaped(field.type)}` | {default} | {text} |")
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def body_of(section: str) -> str:
    return PAGE.split(f"\n## {section}\n", 1)[1].split("\n## ")[0]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_description(section: str) -> None:
    for field in fields(section):
        assert re.match(r"\S.*[.]$", field.description), f"{field.name} needs a description that ends with a full stop"
        assert "|" not in field.description and "\n" not in field.description, f"{field.name}: one line, no |"


@pytest.mark.parametrize("section", SECTIONS)
def test_the_page_lists_every_field(section: str) -> None:
    assert TABLE.findall(body_of(section)) == [table(section)], "rewrite it: python tests/docs/test_recipe_page.py"


def test_no_section_is_about_anything_else() -> None:
    named = set(re.findall(r"^## (.+)$", PAGE, re.MULTILINE))
    assert named == {*SECTIONS, "Overrides"}


def rewrite_page() -> None:
    page = PAGE
    for section in SECTIONS:
        body = body_of(section)
        page = page.replace(body, TABLE.sub(lambda _, section=section: table(section), body))
    PATH.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    rewrite_page()
