"""Settings and the recipes written with them: no field without a reader, every file in configs/ loads."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from extras import ROOT

from ipt_jax.ablate.run import AblateSettings
from ipt_jax.config import Recipe
from ipt_jax.core.settings import Settings, load_settings, parse_yaml
from ipt_jax.data.tokenize import TokenizeSettings
from synth.collect.run import CollectSettings
from synth.config import RunSettings
from synth.decontaminate.run import DecontaminateSettings
from synth.evaluate.run import EvalSettings
from synth.mine.run import MineSettings
from synth.render.documents import RenderSettings
from synth.verify.run import VerifySettings

# The first of these keys that a file has tells its kind; `tokenizer` may stand in a recipe of synth render too.
KINDS: dict[str, type[Settings]] = {
    "run_dir": Recipe,
    "arms": AblateSettings,
    "tasks": EvalSettings,
    "scores": VerifySettings,
    "synthesizer": RunSettings,
    "groups": RenderSettings,
    "few_shot": CollectSettings,
    "write": CollectSettings,
    "benchmarks": DecontaminateSettings,
    "patterns": MineSettings,
    "tokenizer": TokenizeSettings,
}
# configs/evals holds task files of lm-evaluation-harness (tests/evaluate/test_domain_tasks.py), templates/ those of
# `synth render`.
RECIPES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ("evals", "templates"))
SOURCES = [*(ROOT / "ipt_jax").rglob("*.py"), *(ROOT / "synth").rglob("*.py")]


def kind_of(path: Path) -> type[Settings]:
    keys = parse_yaml(path.read_text(encoding="utf-8")).keys()
    assert keys & KINDS.keys(), f"{path} has none of {sorted(KINDS)}: what kind of recipe is it?"
    return next(settings for key, settings in KINDS.items() if key in keys)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_loads_and_says_what_it_is_for(path: Path) -> None:
    load_settings(kind_of(path), path)
    assert path.read_text(encoding="utf-8").startswith("# "), "it opens with its command and hardware"


def test_there_are_recipes() -> None:
    assert {kind_of(path) for path in RECIPES} == set(KINDS.values())


# ---- fields


def declared(classes: dict[str, ast.ClassDef]) -> Iterator[tuple[str, str]]:
    """(class, field) of every settings class."""

    def is_settings(name: str) -> bool:
        return name == "Settings" or any(
            isinstance(base, ast.Name) and is_settings(base.id) for base in getattr(classes.get(name), "bases", [])
        )

    for name, definition in classes.items():
        if is_settings(name):
            for node in definition.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    yield name, node.target.id


def is_validator(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any("validator" in ast.unparse(mark) for mark in node.decorator_list)


def reads(node: ast.AST) -> Iterator[str]:
    """Attributes that code reads; a validator only checks its field, which is no use of it."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield node.attr
    for child in ast.iter_child_nodes(node):
        if not is_validator(child):
            yield from reads(child)


def test_every_field_has_a_reader() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    read = {name for tree in trees for name in reads(tree)}
    fields = declared({node.name: node for node in classes})
    unread = [f"{owner}.{field}" for owner, field in fields if field not in read]
    assert not unread, f"nothing reads {unread}: drop them, or use them"
