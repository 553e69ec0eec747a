"""Templates of documents, read from data files, and the random choices among them.

Guarantees: every choice is drawn from (seed, id, epoch, purpose), so choices are independent of each other and of
other documents. The wording of the shipped templates was written for this project.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import msgspec
import yaml

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import directory_digest
from ipt_jax.core.seeding import draw, uniform
from ipt_jax.core.settings import parse_yaml
from ipt_jax.corpus.records import Format

Layout = Literal["text_first", "questions_first", "dialogue", "numbered", "few_shot"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
FORMATS: tuple[Format, ...] = get_args(Format)
FOLDER = Path(__file__).parent / "templates"
FILES = tuple(f"{name}.yaml" for name in (*FORMATS, "turns", "options", "layouts"))
PLACEHOLDER = re.compile(r"\{(\w+)\}")
PARTS = {
    "free": {"question", "answer"},
    "free_cot": {"question", "rationale", "answer"},
    "choice": {"question", "options", "answer"},
    "choice_cot": {"question", "options", "rationale", "answer"},
}
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
def load_templates(folder: str | None = None) -> Templates:
    """The shipped templates. Files of the same names in `folder` replace theirs. Raises UserError for invalid ones."""
    own = {path.name: path for path in Path(folder).glob("*.yaml")} if folder else {}
    if folder and (not own or own.keys() - set(FILES)):
        found = f"unknown file {min(own.keys() - set(FILES))}" if own else "no template file"
        raise UserError(f"templates {folder}: {found}; name the files {', '.join(FILES)}")
    paths = {name.removesuffix(".yaml"): own.get(name, FOLDER / name) for name in FILES}
    content: dict[str, Any] = {}
    for name, path in paths.items():
        try:
            content[name] = read_templates(name, path.read_text(encoding="utf-8"))
        except (msgspec.ValidationError, yaml.YAMLError, UnicodeDecodeError, ValueError, KeyError) as error:
            raise UserError(
                f"templates {path}: {error}; correct the file, or delete it to use the shipped one"
            ) from error
    return Templates(
        patterns={name: content[name] for name in FORMATS},
        turns=content["turns"],
        options=content["options"],
        **content["layouts"],
        digest=directory_digest(list(paths.values())),
    )


def read_templates(name: str, text: str) -> Any:
    """The checked content of the file `name`."""
    content = parse_yaml(text)
    if name == "options":
        return msgspec.convert(content, list[OptionStyle])
    if name == "turns":
        turns = msgspec.convert(content, dict[Format, list[Turn]])
        for kind in FORMATS:
            check_patterns(kind, [turn.ask + turn.reply for turn in turns[kind]])
        return turns
    if name == "layouts":
        bare = msgspec.convert(content.pop("bare"), float)
        separators = msgspec.convert(content.pop("separators"), list[str])
        frames = msgspec.convert(content, dict[Layout, Frame])
        if missing := set(LAYOUTS) - frames.keys():
            raise ValueError(f"layout {min(missing)} is missing")
        return {"bare": bare, "separators": separators, "frames": frames}
    patterns = msgspec.convert(content, list[str])
    check_patterns(name, patterns)
    return patterns


def check_patterns(kind: str, patterns: Sequence[str]) -> None:
    """Raises ValueError unless each pattern has every part of a pair once, the question before the answer."""
    if not patterns:
        raise ValueError(f"{kind} has no pattern")
    for pattern in patterns:
        parts = PLACEHOLDER.findall(pattern)
        if sorted(parts) != sorted(PARTS[kind]) or parts.index("question") > parts.index("answer"):
            needed = ", ".join(f"{{{part}}}" for part in sorted(PARTS[kind]))
            raise ValueError(f"pattern {pattern!r} must contain {needed} once each, the question before the answer")


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

    def __init__(
        self, draws: Draws, weights: Mapping[Layout, float], templates: Templates, *, has_example: bool = True
    ) -> None:
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
