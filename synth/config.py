"""Settings of `synth run`, and the `synthesizer` block that `synth eval` and `synth verify` share with it.

`Synthesizer` says which model answers, on which engine and within which budget. Identities of outputs cover what
changes the answers (`meaning`), not what only changes the speed.
"""

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from ipt_jax.corpus.settings import Settings
from ipt_jax.corpus.sources import SourceSettings
from synth.verify.names import ScoreName


class FaultSettings(Settings):
    """What the scripted engine does wrong, as shares of its requests; a request's faults follow from its prompt."""

    malformed: float = Field(default=0.0, ge=0, le=1)
    truncated: float = Field(default=0.0, ge=0, le=1)
    error: float = Field(default=0.0, ge=0, le=1)
    latency_seconds: float = Field(default=0.0, ge=0)


class SynthesizerSettings(Settings):
    """The model that writes pairs. `model` is an HF directory; the jax engine also takes a checkpoint."""

    model: str
    engine: Literal["vllm", "jax", "scripted"] = "vllm"
    max_model_len: int = Field(default=4096, ge=2)
    max_new_tokens: int = Field(default=400, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_num_seqs: int = Field(default=64, ge=1)
    tensor_parallel_size: int = Field(default=1, ge=1)
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    faults: FaultSettings | None = None

    @field_validator("max_new_tokens")
    @classmethod
    def _leaves_room(cls, value: int, info: ValidationInfo) -> int:
        longest = info.data.get("max_model_len")
        if longest is not None and value >= longest:
            raise ValueError(f"expected fewer than max_model_len ({longest}) so that a prompt has room; lower it")
        return value

    @field_validator("faults")
    @classmethod
    def _only_scripted(cls, value: FaultSettings | None, info: ValidationInfo) -> FaultSettings | None:
        if value is not None and info.data.get("engine") != "scripted":
            raise ValueError("faults are for engine: scripted; leave them out")
        return value

    @property
    def max_prompt_tokens(self) -> int:
        return self.max_model_len - self.max_new_tokens

    @property
    def meaning(self) -> dict[str, Any]:
        """The fields that decide what comes back; the model's contents are hashed by the engine."""
        faults = self.faults.model_dump(exclude={"latency_seconds"}) if self.faults else {}
        fields = {"engine", "max_model_len", "max_new_tokens", "temperature", "dtype"}
        return {**self.model_dump(include=fields), "faults": {name: share for name, share in faults.items() if share}}


class CorpusSettings(SourceSettings):
    """Raw texts; `fraction` of them are converted, drawn from (seed, id)."""

    fraction: float = Field(default=1.0, gt=0, le=1)


class SeedExamples(Settings):
    """Examples shown before each group's first text: rows {context, qa: [{question, answer, …}]}."""

    path: str
    count: int = Field(default=2, ge=1)


class RunSettings(Settings):
    """The recipe of `synth run`. Of a text too long for a prompt `cut` asks about the beginning, `split` about all.

    `verify`: the scores that pairs get at once, as `synth verify` would give them afterwards.
    """

    synthesizer: SynthesizerSettings
    corpus: CorpusSettings
    rounds: int = Field(default=2, ge=1)
    grouping: Literal["position", "source"] = "position"
    long_texts: Literal["cut", "split"] = "cut"
    seed_examples: SeedExamples | None = None
    verify: list[ScoreName] = []
    seed: int = 0
    executor: Literal["local", "ray"] = "local"
    groups_per_shard: int = Field(default=10_000, ge=1)
    output: str
