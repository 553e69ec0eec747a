"""The recipe of `synth verify`."""

from pydantic import Field, ValidationInfo, field_validator

from ipt_jax.corpus.settings import Settings
from synth.config import SynthesizerSettings
from synth.verify.names import ENGINE_SCORES, ScoreName


class VerifySettings(Settings):
    """The recipe of `synth verify`."""

    groups: str
    """Output of `synth run`, `mine`, `decontaminate` or `verify`."""
    synthesizer: SynthesizerSettings | None = None
    """Model and engine. Required by open_closed and agreement, used by options if given."""
    scores: list[ScoreName] = Field(min_length=1)
    """Scores to compute (docs/verify.md)."""
    seed: int = 0
    """Random seed of the order in which options are shown."""
    output: str
    """Directory to write. It must be empty or hold output of the same recipe, which is resumed."""

    @field_validator("scores")
    @classmethod
    def _can_be_given(cls, scores: list[ScoreName], info: ValidationInfo) -> list[ScoreName]:
        asked = sorted(ENGINE_SCORES.intersection(scores))
        if asked and info.data.get("synthesizer", ...) is None:
            raise ValueError(f"{', '.join(asked)} need an engine; give a synthesizer, or leave them out")
        return scores
