"""Templates of documents, read from data files, and the random choices among them.

Guarantees: every choice is drawn from (seed, id, epoch, purpose), so choices are independent of each other and of
other documents. The wording of the templates was written for this project.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar, get_args

import msgspec

from ipt_jax.core.hashing import directory_digest
from ipt_jax.core.seeding import draw, uniform
from ipt_jax.core.settings import parse_yaml
from ipt_jax.corpus.records import Format

Layout = Literal["text_first", "questions_first", "dialogue", "numbered", "few_shot"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
FORMATS: tuple[Format, ...] = get_args(Format)
FOLDER = Path(__file__).parent / "templates"
FILES = tuple(FOLDER / f"{name}.yaml" for name in (*FORMATS, "turns", "options", "layouts"))
Drawn = TypeVar("Drawn")


class Turn(msgspec.Struct, frozen=True):
    """A pattern in two parts."""

    ask: str
    reply: str


class OptionStyle(msgspec.Struct, frozen=True):
    labels: Literal["none", "upper", "lower", "numbers"]
    mark: str
    between: str
    answer: str


class Frame(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The choices of one layout. Lists that the layout does not use have one empty choice."""

    between: list[str]
    openings: list[str]
    bridges: tuple[str, ...] = ("",)
    speakers: tuple[tuple[str, str], ...] = (("", ""),)
    turns: tuple[str, ...] = ("",)
    marks: tuple[tuple[str, str], ...] = (("", ""),)
    headings: tuple[tuple[str, str], ...] = (("", ""),)
    shots: tuple[tuple[str, str], ...] = (("", ""),)


@dataclass(frozen=True)
class Templates:
    """`bare`: probability of no opening, and, drawn separately, of no bridge."""

    patterns: dict[Format, list[str]]
    turns: dict[Format, list[Turn]]
    options: list[OptionStyle]
    bare: float
    separators: list[str]
    frames: dict[Layout, Frame]
    digest: str


@cache
def load_templates() -> Templates:
    content = {path.stem: parse_yaml(path.read_text(encoding="utf-8")) for path in FILES}
    bare, separators = content["layouts"].pop("bare"), content["layouts"].pop("separators")
    return Templates(
        patterns={name: msgspec.convert(content[name], list[str]) for name in FORMATS},
        turns=msgspec.convert(content["turns"], dict[Format, list[Turn]]),
        options=msgspec.convert(content["options"], list[OptionStyle]),
        bare=msgspec.convert(bare, float),
        separators=msgspec.convert(separators, list[str]),
        frames=msgspec.convert(content["layouts"], dict[Layout, Frame]),
        digest=directory_digest(list(FILES)),
    )


class Draws:
    """The choices of one group or document in one epoch, each from its own random stream."""

    def __init__(self, seed: int, name: str, epoch: int) -> None:
        self.keys = (seed, name, epoch)

    def pick(self, purpose: str, choices: Sequence[Drawn]) -> Drawn:
        return choices[int(uniform(*self.keys, purpose) * len(choices))]

    def weighted(self, purpose: str, weights: Mapping[Layout, float]) -> Layout:
        return draw(*self.keys, purpose).choices(list(weights), list(weights.values()))[0]

    def chance(self, purpose: str, share: float) -> bool:
        return uniform(*self.keys, purpose) < share

    def order(self, purpose: str, count: int) -> list[int]:
        """A shuffle of range(count)."""
        return draw(*self.keys, purpose).sample(range(count), count) if count else []


class DocumentStyle:
    """The choices drawn for one document, shared by all its texts.

    `has_example`: few_shot has an example to show before its test item. Otherwise it is replaced by text_first.
    """

    def __init__(self, draws: Draws, weights: Mapping[Layout, float], *, has_example: bool = True) -> None:
        templates = load_templates()
        layout = draws.weighted("layout", weights)
        self.layout: Layout = "text_first" if layout == "few_shot" and not has_example else layout
        frame = templates.frames[self.layout]
        has_opening, has_bridge = (not draws.chance(f"bare {part}", templates.bare) for part in ("opening", "bridge"))
        self.patterns = {name: draws.pick(f"pattern {name}", templates.patterns[name]) for name in FORMATS}
        self.turns = {name: draws.pick(f"turn {name}", templates.turns[name]) for name in FORMATS}
        self.options = draws.pick("option style", templates.options)
        self.opening = draws.pick("opening", frame.openings) if has_opening else "{text}"
        self.bridge = draws.pick("bridge", frame.bridges) if has_bridge else ""
        self.between = draws.pick("between pairs", frame.between)
        self.separator = draws.pick("separator", templates.separators)
        self.speakers = draws.pick("speakers", frame.speakers)
        self.turn = draws.pick("turn line", frame.turns)
        self.marks = draws.pick("marks", frame.marks)
        self.headings = draws.pick("headings", frame.headings)
        self.shots = draws.pick("shots", frame.shots)
