"""The counts and the worked example of docs/reference/render.md, recomputed."""

import re

from extras import ROOT
from renderkit import group, recipe, render

from synth.format.wire import wire_pair
from synth.render.documents import RenderSettings
from synth.render.templates import FORMATS, LAYOUTS, load_templates

PAGE = (ROOT / "docs" / "reference" / "render.md").read_text(encoding="utf-8")
PARTS = ("text", "question", "options", "rationale", "answer")


def block(language: str) -> str:
    [found] = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def test_counts_of_templates() -> None:
    templates = load_templates()
    lines = [
        f"{f'patterns of {name}':<24}{len(templates.patterns[name])}, in two parts {len(templates.turns[name])}"
        for name in FORMATS
    ]
    lines.append(f"{'styles of options':<24}{len(templates.options)}")
    lines += [f"{name:<24}{len(templates.frames[name].openings)} openings" for name in LAYOUTS]
    assert block("templates").splitlines() == lines


def test_layouts_and_their_defaults() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == list(LAYOUTS)
    shares = dict(re.findall(r"(\w+): ([\d.]+)", re.search(r"^layouts: \{(.*?)\}", PAGE, re.MULTILINE)[1]))
    assert {name: float(share) for name, share in shares.items()} == recipe().layouts.weights
    fields = re.findall(r"^(\w+):", block("yaml"), re.MULTILINE)
    assert sorted(fields) == sorted(RenderSettings.model_fields)


def test_worked_example() -> None:
    pairs = [
        [
            wire_pair("Who built the hall?", "Ann"),
            wire_pair("Where does it stand?", "by the river", ["in the woods", "by the river"]),
        ],
        [wire_pair("How long did it rain?", "three days")],
    ]
    one = group("tale-7", pairs, ["Ann built the old hall by the river.", "It rained for three days."])
    [document] = render(one, layouts={"few_shot": 1}, seed=3)
    assert block("document") == document.text + "\n"
    spans = document.meta["spans"]
    lines = [f"{part:<10}{' '.join(map(str, spans[part]))}" for part in PARTS if part in spans]
    assert block("spans").splitlines() == lines
