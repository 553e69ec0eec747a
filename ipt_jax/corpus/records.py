"""The records that stages exchange: msgspec structs in msgpack, one per ArrayRecord entry.

Field names are the contract between stages (docs/reference/file_formats.md). No times and no paths: equal work gives
equal bytes.
"""

from typing import Any, Literal, TypeVar

import msgspec

from ipt_jax.core.errors import UserError

Kind = Literal["raw", "augmented", "task", "instruction"]
KINDS: tuple[Kind, ...] = ("raw", "augmented", "task", "instruction")
KIND_CODES = {kind: code for code, kind in enumerate(KINDS, start=1)}  # 0 is padding
TokenType = Literal["uint16", "uint32"]  # of token ids, little-endian
Format = Literal["free", "free_cot", "choice", "choice_cot"]
Reason = Literal[
    "truncated",
    "unclosed",
    "leftover_text",
    "no_question",
    "no_answer",
    "two_answers",
    "nested_tag",
    "empty_question",
    "empty_answer",
    "duplicate_question",
    "cot_malformed",
    "options_malformed",
    "too_many_options",
    "answer_not_in_options",
    "contaminated",  # by `synth decontaminate`; all others by the parser
]


class Segment(msgspec.Struct, frozen=True, omit_defaults=True):
    """A span of text, or one control token. Text that spells a control token stays text."""

    text: str = ""
    loss: bool = True
    control: Literal["bos", "eos"] | None = None


class Parent(msgspec.Struct, frozen=True):
    """The span [start, end) of characters of the raw text `id` that a document was made from."""

    id: str
    start: int
    end: int


class Document(msgspec.Struct, omit_defaults=True):
    id: str
    source: str
    kind: Kind
    segments: list[Segment]
    parents: list[Parent] = []
    meta: dict[str, Any] = {}

    @property
    def text(self) -> str:
        """The segments' text, without control tokens."""
        return "".join(segment.text for segment in self.segments)


class Pair(msgspec.Struct, omit_defaults=True):
    """A question and its answer in the paper's format (Table 7); `options` and `rationale` are parsed from them."""

    question: str
    answer: str
    format: Format = "free"
    options: list[str] = []
    rationale: str | None = None
    scores: dict[str, float] = {}
    verdict: Literal["accepted", "rejected"] = "accepted"
    reason: Reason | None = None

    @property
    def accepted(self) -> bool:
        return self.verdict == "accepted"

    @property
    def rejection(self) -> Reason | Literal["rejected"] | None:
        """The reason of a rejected pair, "rejected" if none is stored. None for an accepted pair."""
        return None if self.accepted else self.reason or "rejected"


class GroupText(msgspec.Struct):
    """One text of a group: the span [start, end) of raw text `raw_id`, its pairs, and how they were generated."""

    raw_id: str
    start: int
    end: int
    text: str
    source: str
    pairs: list[Pair]
    round: int
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    finish_reason: str

    @property
    def accepted_pairs(self) -> list[Pair]:
        return [pair for pair in self.pairs if pair.accepted]


class SynthGroup(msgspec.Struct):
    """The M texts of one few-shot group in order, with their provenance. Rejected pairs have their reasons."""

    id: str
    texts: list[GroupText]
    synthesizer: str
    weights: str
    sampling: dict[str, Any]
    fingerprint: str
    meta: dict[str, Any] = {}


class TokenDocument(msgspec.Struct, omit_defaults=True):
    """Token ids as little-endian bytes of `dtype`; `loss_runs` are ranges [start, stop) of target tokens."""

    id: str
    kind: Kind
    dtype: TokenType
    tokens: bytes
    loss_runs: list[tuple[int, int]]
    parents: list[Parent] = []
    source: str = ""


class TokenPage(msgspec.Struct):
    """Consecutive TokenDocuments of a shard, column by column, so that the loader makes no object per document.

    Little-endian bytes: the joined `tokens`, one `ROW` of data.token_shards per document, and loss `runs` (start, stop
    within the document; uint32). `first` is the number of the first document in the shard. `parents` are by the place
    of their document in the page.
    """

    first: int
    dtype: TokenType
    tokens: bytes
    rows: bytes
    runs: bytes
    ids: list[str]
    sources: list[str]
    parents: dict[int, list[Parent]]


AnyRecord = TypeVar("AnyRecord", bound=msgspec.Struct)
_encoder = msgspec.msgpack.Encoder()
_decoders: dict[type, Any] = {}


def encode(record: msgspec.Struct) -> bytes:
    return _encoder.encode(record)


def decode(data: bytes, cls: type[AnyRecord]) -> AnyRecord:
    """The record of type `cls` in `data`. Raises UserError if the bytes are not one."""
    decoder = _decoders.get(cls)
    if decoder is None:
        decoder = _decoders[cls] = msgspec.msgpack.Decoder(cls)
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"record is not a {cls.__name__}: {error}; set the path to the output of the right stage"
        ) from error
