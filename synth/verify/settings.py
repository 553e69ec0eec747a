"""The recipe of `synth verify`."""

from pydantic import Field, ValidationInfo, field_validator

from ipt_jax.corpus.settings import Settings
from synth.config import SynthesizerSettings
from synth.verify.names import ENGINE_SCORES, ScoreName


class VerifySettings(Settings):
    """`synthesizer` is the block of `synth run`; it may be left out when no score needs an engine."""

    groups: str
    synthesizer: SynthesizerSettings | None = None
    scores: list[ScoreName] = Field(min_length=1)
    seed: int = 0
    output: str

    @field_validator("scores")
    @classmethod
    def _can_be_given(cls, scores: list[ScoreName], info: ValidationInfo) -> list[ScoreName]:
        asked = sorted(ENGINE_SCORES.intersection(scores))
        if asked and info.data.get("synthesizer", ...) is None:
            raise ValueError(f"{', '.join(asked)} need an engine; give a synthesizer, or leave them out")
        return scores
