"""The names of the scores, as recipes spell them, and which of them need an engine."""

from typing import Literal, get_args

TextScore = Literal[
    "grounded",
    "quoted",
    "located",
    "question_grounded",
    "entities",
    "polarity",
    "answer_type",
    "unrepeated",
    "language",
    "options",
    "combined",
]
EngineScore = Literal["open_closed", "agreement"]
ScoreName = Literal[TextScore, EngineScore]

ENGINE_SCORES: frozenset[str] = frozenset(get_args(EngineScore))
# An engine says more about options than their form does, where there is one.
BETTER_WITH_ENGINE = ENGINE_SCORES | {"options"}
