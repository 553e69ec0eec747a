"""Settings of `synth run`, the `synthesizer` block that `synth verify` shares with it, and the names of the scores."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator

from ipt_jax.core.seeding import uniform
from ipt_jax.core.settings import PathText, Settings
from ipt_jax.corpus.records import Document
from ipt_jax.corpus.row_reader import OneOrMore, SourceSettings

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
# Fields that decide completions, in an output's identity only where they differ from their defaults.
OPTIONAL_MEANING = {"top_p", "top_k", "min_p", "repetition_penalty", "stop", "prompt", "quantization"}
BETTER_WITH_ENGINE = ENGINE_SCORES | {"options"}  # without one, only the form of the options is scored


class FaultSettings(Settings):
    """Faults of the scripted engine, for tests and rehearsals. The faults of a request follow from its prompt."""

    malformed: float = Field(default=0.0, ge=0, le=1)
    """Fraction of answers that are not valid pairs."""
    truncated: float = Field(default=0.0, ge=0, le=1)
    """Fraction of answers that end early."""
    error: float = Field(default=0.0, ge=0, le=1)
    """Fraction of requests that fail."""
    timeout: float = Field(default=0.0, ge=0, le=1)
    """Fraction of requests that hang. Needs `request_timeout_seconds`."""
    dies_at: int | None = Field(default=None, ge=1)
    """Number of the request, counted from 1, at which the engine exits. null: never."""
    latency_seconds: float = Field(default=0.0, ge=0)
    """Mean seconds per request; each takes between half and one and a half times as long."""


class SpeculationSettings(Settings):
    """Drafts that the model checks several tokens at a time. Outputs keep their distribution; greedy ones are equal."""

    method: Literal["ngram"] = "ngram"
    """ngram: drafts continue the last tokens as an earlier place of prompt or answer does. Answers often quote."""
    tokens: int = Field(default=4, ge=1, le=64)
    """Maximum tokens of a draft."""
    min_match: int = Field(default=2, ge=1)
    """Least number of last tokens that must occur earlier."""
    max_match: int = Field(default=5, ge=1, validate_default=True)
    """Greatest number of last tokens to compare; the longest match is used."""

    @field_validator("max_match")
    @classmethod
    def _not_below_min(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("min_match", 1):
            raise ValueError(f"expected min_match ({info.data['min_match']}) or more; raise it")
        return value


class SynthesizerSettings(Settings):
    """The model that writes pairs.

    With `engine: openai` the weights are on the server, and the output's identity covers the served name and the
    tokenizer. On vllm and jax, `request_timeout_seconds` includes the time in the queue.
    """

    model: PathText
    """Hugging Face directory or `hf:NAME`. jax also reads a checkpoint. openai and scripted read only the tokenizer."""
    engine: Literal["vllm", "openai", "jax", "scripted"] = "vllm"
    """openai: an OpenAI-compatible server. scripted: no model, pairs that quote the text, for rehearsals."""
    server: str | None = Field(default=None, validate_default=True, pattern=r"^https?://")
    """Base URL for engine openai, such as `http://localhost:8000/v1`. Its key is read from IPT_API_KEY."""
    served_model: str | None = None
    """Name of the model at the server. null: the last part of `model`."""
    server_patience_seconds: float = Field(default=600.0, ge=0)
    """Seconds to wait for a server that stops responding."""
    request_timeout_seconds: float | None = Field(default=None, gt=0)
    """Timeout of each try of a request, in seconds. null: no timeout."""
    max_model_len: int = Field(default=4096, ge=2)
    """Maximum tokens of prompt and answer."""
    max_new_tokens: int = Field(default=400, ge=1)
    """Maximum tokens of an answer."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature. 0: greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most probable tokens with this total probability. 1: from all."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this number of most probable tokens. 0: from all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample from tokens with at least this fraction of the highest probability. 0: from all."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divides the logits of tokens that occurred before. 1: off."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end an answer. They are not part of it."""
    prompt: Literal["completion", "chat"] = "completion"
    """completion: the wire format, for tuned synthesizers. chat: a chat model is instructed by `prompt_file`."""
    prompt_file: PathText | None = Field(default=None, validate_default=True)
    """YAML file with the instruction of a chat model. null: the one of the package (docs/reference/synthesis.md)."""
    lora: PathText | None = None
    """Directory of a LoRA adapter for vllm. null: none."""
    quantization: str | None = None
    """Quantization method of vllm, such as `fp8`. null: as the model's config says."""
    speculation: SpeculationSettings | None = None
    """Speculative decoding on vllm. null: off."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations. auto: chosen by the engine."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Maximum number of concurrent requests."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs per vllm engine."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Fraction of GPU memory that vllm uses."""
    faults: FaultSettings | None = None
    """Faults of the scripted engine, as fractions of its requests."""

    @field_validator("max_new_tokens")
    @classmethod
    def _leaves_room(cls, value: int, info: ValidationInfo) -> int:
        longest = info.data.get("max_model_len")
        if longest is not None and value >= longest:
            raise ValueError(f"expected fewer than max_model_len ({longest}) so that a prompt has room; lower it")
        return value

    @field_validator("prompt_file")
    @classmethod
    def _only_chat(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("prompt") != "chat":
            raise ValueError("it is read with prompt: chat; set that, or remove it")
        return value

    @field_validator("lora", "quantization", "speculation")
    @classmethod
    def _only_vllm(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("engine") != "vllm":
            raise ValueError("it is for engine: vllm; remove it, or configure the server with it")
        if info.field_name == "speculation" and value is not None and info.data.get("min_p"):
            raise ValueError("vllm cannot combine it with min_p; remove one")
        return value

    @field_validator("top_p", "top_k", "min_p", "repetition_penalty")
    @classmethod
    def _not_jax(cls, value: float, info: ValidationInfo) -> float:
        assert info.field_name is not None
        if info.data.get("engine") == "jax" and value != cls.model_fields[info.field_name].default:
            raise ValueError("engine: jax samples by temperature only; remove it, or use vllm")
        return value

    @field_validator("faults")
    @classmethod
    def _only_scripted(cls, value: FaultSettings | None, info: ValidationInfo) -> FaultSettings | None:
        if value is not None and info.data.get("engine") != "scripted":
            raise ValueError("faults are for engine: scripted; remove them")
        if value is not None and value.timeout and info.data.get("request_timeout_seconds") is None:
            raise ValueError("requests that hang need request_timeout_seconds; set it")
        return value

    @field_validator("server")
    @classmethod
    def _only_openai(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (value is None) == (info.data.get("engine") == "openai"):
            raise ValueError("expected a base URL with engine: openai, and none with the others; set both or none")
        return value

    @property
    def served_name(self) -> str:
        return self.served_model or Path(self.model).resolve().name

    @property
    def max_prompt_tokens(self) -> int:
        return self.max_model_len - self.max_new_tokens

    @property
    def meaning(self) -> dict[str, Any]:
        """The fields that decide the completions. Failures and delays do not: --retry-failed repairs them."""
        faults = self.faults.model_dump(include={"malformed", "truncated"}) if self.faults else {}
        fields = {"engine", "max_model_len", "max_new_tokens", "temperature", "dtype"}
        shares = {name: share for name, share in faults.items() if share}
        return {**self.model_dump(include=fields), **self.stated(OPTIONAL_MEANING), "faults": shares}

    def stated(self, names: set[str]) -> dict[str, Any]:
        """Those of the fields that differ from their defaults."""
        return self.model_dump(include=names, exclude_defaults=True)


class CorpusSettings(SourceSettings):
    """Raw texts, and the fraction of them to convert."""

    fraction: float = Field(default=1.0, gt=0, le=1)
    """Fraction of the texts to convert, drawn from (seed, id)."""


Corpora = Annotated[list[CorpusSettings], OneOrMore]


def is_converted(seed: int, source: Any, document: Document) -> bool:
    """Whether a text is in the fraction of its source (CorpusSettings) that is converted."""
    return bool(uniform(seed, "fraction", document.id) < source.fraction)


class SeedExamples(Settings):
    """Examples shown before each group's first text: rows {context, qa: [{question, answer, …}]}."""

    path: PathText
    """File of rows as in `synth collect`, in any format of inputs."""
    count: int = Field(default=2, ge=1)
    """Maximum number of examples in a prompt."""


class RunSettings(Settings):
    """The recipe of `synth run`."""

    synthesizer: SynthesizerSettings
    """Model and engine that write the pairs."""
    corpus: Corpora = Field(min_length=1)
    """Raw texts to convert: a source, or a list of sources."""
    drop_duplicates: bool = False
    """Convert only the first of texts that are identical. false: convert all, and report how many are."""
    rounds: int = Field(default=2, ge=1)
    """Texts per group (M in the paper)."""
    grouping: Literal["position", "source"] = "position"
    """Which texts share a group. position: neighbours. source: texts of one source."""
    long_texts: Literal["cut", "split"] = "cut"
    """Texts longer than a prompt. cut: use the beginning. split: use all parts."""
    seed_examples: SeedExamples | None = None
    """Texts with pairs to show before each group's first text, for a model that was not tuned."""
    verify: list[ScoreName] = []
    """Scores to compute during the run, named as in `synth verify`."""
    seed: int = 0
    """Random seed of all draws. A draw depends only on the seed and an id."""
    executor: Literal["local", "ray"] = "local"
    """Where engines run. ray: one engine per GPU of the cluster."""
    groups_per_shard: int = Field(default=10_000, ge=1)
    """Groups per output shard. A shard is the unit of parallel work and of resumption."""
    output: PathText
    """Directory to write. It must be empty or hold output of the same recipe, which is resumed."""
