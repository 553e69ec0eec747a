"""The shape of a model: presets, the YAML `model:` block, and what a block resolves to.

Guarantees that a `ModelConfig` is consistent (heads divide, head_dim is even, ids are below vocab_size) and
that it alone decides the parameters' shapes. Imports no JAX, so that `ipt plan` starts fast.
The 500M and 1.3B presets are the paper's (arXiv 2406.14491, Table 10/14); what the paper leaves open (window, norm
epsilon) is taken from Mistral-7B-v0.1, without its window, which a 2,048-token row never reaches.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ipt_jax.core.settings import PathText, Settings


class RopeScaling(Settings):
    """Llama-3.1 frequency scaling; `factor` stretches wavelengths longer than the original context."""

    factor: float = Field(gt=0)
    """Scaling factor of long wavelengths."""
    low_freq_factor: float = Field(gt=0)
    """Wavelengths above `original_max_positions` / this are scaled by the full factor."""
    high_freq_factor: float = Field(gt=0)
    """Wavelengths below `original_max_positions` / this are not scaled."""
    original_max_positions: int = Field(gt=0)
    """Context length before scaling, in tokens."""


class ModelConfig(Settings):
    """Everything that decides parameter shapes and the forward pass; stored with every checkpoint."""

    family: Literal["mistral", "llama"] = "mistral"
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    layers: int = Field(gt=0)
    q_heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    sliding_window: int | None = Field(default=None, gt=0)
    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    norm_eps: float = Field(default=1e-5, gt=0)
    max_positions: int = Field(default=2048, gt=0)
    initializer_range: float = Field(default=0.02, gt=0)
    bos_id: int | None = 1
    eos_id: int | tuple[int, ...] | None = 2

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.q_heads % self.kv_heads:
            raise ValueError(f"q_heads ({self.q_heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even, RoPE rotates pairs")
        if self.family == "llama" and self.sliding_window is not None:
            raise ValueError("family llama has no sliding_window; use family mistral, which may have rope_scaling too")
        for name, tokens in (("bos_id", () if self.bos_id is None else (self.bos_id,)), ("eos_id", self.eos_ids)):
            for token in tokens:
                if not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name} ({token}) must be below vocab_size ({self.vocab_size})")
        return self

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a text."""
        return self.eos_id if isinstance(self.eos_id, tuple) else () if self.eos_id is None else (self.eos_id,)


class ModelSettings(Settings):
    """The YAML `model:` block: a preset or a directory with weights, and any field that overrides it."""

    preset: str | None = None
    """New weights: tiny, mistral-500m, mistral-1.3b, mistral-7b, llama3-8b or smollm2-135m."""
    from_: PathText | None = Field(default=None, alias="from")
    """Weights of a Hugging Face directory, a run or a checkpoint."""
    family: Literal["mistral", "llama"] | None = None
    """Architecture."""
    vocab_size: int | None = None
    """Tokens of the vocabulary. null: from the preset, or from the tokenizer of the sources."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    layers: int | None = None
    """Number of decoder layers."""
    q_heads: int | None = None
    """Query heads. A multiple of `kv_heads`."""
    kv_heads: int | None = None
    """Key and value heads."""
    head_dim: int | None = None
    """Width of a head. Even."""
    intermediate_size: int | None = None
    """Width of the feed-forward layer."""
    sliding_window: int | None = None
    """Attention window in tokens. mistral only."""
    rope_theta: float | None = None
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Llama-3.1 frequency scaling."""
    tie_embeddings: bool | None = None
    """Use one matrix for input and output embeddings."""
    norm_eps: float | None = None
    """Epsilon of the RMS norms."""
    max_positions: int | None = None
    """Context length in tokens, written into exports."""
    initializer_range: float | None = None
    """Standard deviation of new weights."""
    bos_id: int | None = None
    """Id of the BOS token. null: from the preset or the tokenizer."""
    eos_id: int | None = None
    """Id of the EOS token. null: from the preset or the tokenizer."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSettings:
        if self.preset and self.from_:
            raise ValueError("give `preset` (new weights) or `from` (weights of a directory), not both")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r} is unknown; there are {', '.join(PRESETS)}")
        return self


PRESETS: dict[str, dict[str, Any]] = {
    # A miniature for CPUs: takes the vocabulary and the control ids of the sources' tokenizer.
    "tiny": dict(
        hidden_size=128, layers=3, q_heads=4, kv_heads=2, head_dim=32, intermediate_size=384,
        tie_embeddings=True, initializer_range=0.05,
    ),
    "mistral-500m": dict(
        vocab_size=32_000, hidden_size=1536, layers=16, q_heads=24, kv_heads=24, head_dim=64, intermediate_size=4320,
    ),
    "mistral-1.3b": dict(
        vocab_size=32_000, hidden_size=2048, layers=20, q_heads=32, kv_heads=8, head_dim=64, intermediate_size=8192,
    ),
    "mistral-7b": dict(
        vocab_size=32_000, hidden_size=4096, layers=32, q_heads=32, kv_heads=8, head_dim=128, intermediate_size=14_336,
        sliding_window=4096, max_positions=32_768,
    ),
    "llama3-8b": dict(
        family="llama", vocab_size=128_256, hidden_size=4096, layers=32, q_heads=32, kv_heads=8, head_dim=128,
        intermediate_size=14_336, rope_theta=500_000.0, max_positions=8192, bos_id=128_000, eos_id=128_001,
    ),
    "smollm2-135m": dict(
        family="llama", vocab_size=49_152, hidden_size=576, layers=30, q_heads=9, kv_heads=3, head_dim=64,
        intermediate_size=1536, rope_theta=100_000.0, tie_embeddings=True, max_positions=8192,
    ),
}  # fmt: skip


def param_count(config: ModelConfig) -> int:
    """Parameters, embeddings included; a tied head counts once."""
    c = config
    attention = c.hidden_size * c.head_dim * 2 * (c.q_heads + c.kv_heads)
    mlp = 3 * c.hidden_size * c.intermediate_size
    embeddings = c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)
    return c.layers * (attention + mlp + 2 * c.hidden_size) + c.hidden_size + embeddings
