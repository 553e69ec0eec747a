"""Settings of `synth run`, and the `synthesizer` block that `synth verify` shares with it.

`Synthesizer` says which model answers, on which engine and within which budget. Identities of outputs cover what
changes the answers (`meaning`), not what only changes the speed.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from ipt_jax.corpus.settings import Settings
from ipt_jax.corpus.sources import SourceSettings
from synth.verify.names import ScoreName


class FaultSettings(BaseModel, frozen=True, extra="forbid"):
    """What the scripted engine does wrong, as shares of its requests; a request's faults follow from its prompt.

    A share `timeout` of them hangs for ever; the engine dies of request `dies_at`, counted from 1. For tests and
    rehearsals, no part of a recipe that makes a corpus, and so none of `Settings`.
    """

    malformed: float = Field(default=0.0, ge=0, le=1)
    truncated: float = Field(default=0.0, ge=0, le=1)
    error: float = Field(default=0.0, ge=0, le=1)
    timeout: float = Field(default=0.0, ge=0, le=1)
    dies_at: int | None = Field(default=None, ge=1)
    latency_seconds: float = Field(default=0.0, ge=0)


class SynthesizerSettings(Settings):
    """The model that writes pairs. `model` is an HF directory; the jax engine also takes a checkpoint.

    With `engine: openai`, `model` needs the tokenizer alone: the weights lie with the server at base URL `server`, such
    as http://localhost:8000/v1, and are known by the name under which they are served (`served_model`, or the name of
    the directory `model`) and by the tokenizer. Its key, where it asks for one, stands in IPT_API_KEY, nowhere else.
    A server that is gone is waited for up to `server_patience_seconds`. `request_timeout_seconds` limits each try
    of a request on any engine (on vllm and jax with its wait for a place); null is no limit.
    """

    model: str
    engine: Literal["vllm", "openai", "jax", "scripted"] = "vllm"
    server: str | None = Field(default=None, validate_default=True, pattern=r"^https?://")
    served_model: str | None = None
    server_patience_seconds: float = Field(default=600.0, ge=0)
    request_timeout_seconds: float | None = Field(default=None, gt=0)
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
        if value is not None and value.timeout and info.data.get("request_timeout_seconds") is None:
            raise ValueError("requests that hang need request_timeout_seconds; set it")
        return value

    @field_validator("server")
    @classmethod
    def _only_openai(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (value is None) == (info.data.get("engine") == "openai"):
            raise ValueError("expected a base URL with engine: openai, and none with the others; give both or none")
        return value

    @property
    def served_name(self) -> str:
        return self.served_model or Path(self.model).resolve().name

    @property
    def max_prompt_tokens(self) -> int:
        return self.max_model_len - self.max_new_tokens

    @property
    def meaning(self) -> dict[str, Any]:
        """The fields that decide what comes back; the model's contents are hashed by the engine.

        What only fails, or comes late, is another engine's to answer: --retry-failed may mend it.
        """
        faults = self.faults.model_dump(include={"malformed", "truncated"}) if self.faults else {}
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

    `verify`: the scores that pairs get at once, as `synth verify` would give them.
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
