"""Tokenizers: any `tokenizer.json`, or a SentencePiece `tokenizer.model`, behind one small interface.

Guarantees: `encode` adds no BOS or EOS, and text that spells a control token stays text, even where the model's own
vocabulary holds the spelling. Pieces of a document are encoded one by one, in training and at inference alike, so that
a prompt's tokens are a prefix of the training row's; `continuing` leaves out the space that SentencePiece models put
before a text's first word. `characters` says how much of the text each token covers: by the spelling of its ids where
they spell the text, which costs a tenth of asking the library, else by the library's offsets.

The bytes that each id of a vocabulary stands for in text.

Exact for byte-level vocabularies and for SentencePiece's (the mark U+2581 is a space, `<0x0A>` a byte). Nothing rests
on it alone: whoever uses the table compares what the ids spell with the text, so that a tokenizer which changes its
text (lower case, other forms of a character) is noticed and asked for offsets instead.
"""

import json
import re
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as JsonTokenizer

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import directory_digest

SPACE_MARK = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def sentencepiece_token_bytes(model: Any) -> list[bytes]:
    """Of a SentencePieceProcessor. Control and unknown ids stand for nothing."""
    return [
        b"" if model.is_control(index) or model.is_unknown(index) else _marked(model.id_to_piece(index))
        for index in range(model.vocab_size())
    ]


def json_token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """Of a tokenizers.Tokenizer. Special tokens stand for nothing: text that spells one is other ids."""
    byte_level = _byte_alphabet() if "ByteLevel" in repr(tokenizer.decoder) else None
    token_bytes = [b""] * vocab_size
    for piece, index in tokenizer.get_vocab(with_added_tokens=False).items():
        token_bytes[index] = _marked(piece) if byte_level is None else _from_alphabet(piece, byte_level)
    for index, token in tokenizer.get_added_tokens_decoder().items():
        token_bytes[index] = b"" if token.special else token.content.encode()
    return token_bytes


def _marked(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE_MARK, " ").encode()


def _from_alphabet(piece: str, alphabet: dict[str, int]) -> bytes:
    return bytes(alphabet[char] for char in piece) if all(char in alphabet for char in piece) else piece.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes in order for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|im_start|>", "[BOS]")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|endoftext|>", "[EOS]")


class Tokenizer:
    """One tokenizer and where it came from. `bos_id` and `eos_id` are None where it has none."""

    def __init__(self, path: Path, directory: Path):
        self.path, self.directory = path, directory
        self._open()

    def _open(self) -> None:
        self._lead: list[int] | None = None
        self._spelled_controls: dict[str, int] = {}
        self._sentencepiece: Any = None
        self._json: Any = None
        self.path.open("rb").close()  # a file that may not be read is told as such, not as a broken one
        if self.path.name.endswith(".json"):
            self._open_json()
        else:
            self._open_sentencepiece()
        plain, after = self._encode("a"), self._encode("\na")
        lead = self._encode("\n")
        # A tokenizer that puts a space before the first word encodes "a" apart from its start.
        self._lead = lead if after[: len(lead)] == lead and after[len(lead) :] != plain else None

    def _open_json(self) -> None:
        try:
            self._json = JsonTokenizer.from_file(str(self.path))
        except Exception as error:  # tokenizers raises bare Exception for every kind of broken file
            raise UserError(f"tokenizer {self.path}: not a tokenizer.json ({error})") from error
        self._json.encode_special_tokens = True  # a text that spells "<s>" is text
        self._json.no_padding()
        self._json.no_truncation()
        special = {token.content: index for index, token in self._json.get_added_tokens_decoder().items()}
        self.bos_id = self._control("bos", _BOS_NAMES, special)
        self.eos_id = self._control("eos", _EOS_NAMES, special)
        self.vocab_size = max(self._json.get_vocab(with_added_tokens=True).values()) + 1
        own = self._json.get_vocab(with_added_tokens=False)  # spellings that the model itself might make of text
        self._spelled_controls = {
            name: index for name, index in special.items() if name in own and index in (self.bos_id, self.eos_id)
        }

    def _open_sentencepiece(self) -> None:
        import sentencepiece

        try:
            self._sentencepiece = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer {self.path}: not a SentencePiece model ({error})") from error
        bos, eos = self._sentencepiece.bos_id(), self._sentencepiece.eos_id()
        self.bos_id, self.eos_id = (bos if bos >= 0 else None), (eos if eos >= 0 else None)
        self.vocab_size = self._sentencepiece.vocab_size()

    def _control(self, which: str, usual: tuple[str, ...], special: dict[str, int]) -> int | None:
        """The id that the configs beside the tokenizer name, else the first usual spelling it has."""
        config = self.directory / "tokenizer_config.json"
        if config.is_file():
            named = json.loads(config.read_text(encoding="utf-8")).get(f"{which}_token")
            content = named.get("content") if isinstance(named, dict) else named
            if content is not None:
                return self._json.token_to_id(content)
        return next((special[name] for name in usual if name in special), None)

    def encode(self, text: str, continuing: bool = False) -> list[int]:
        """Ids of `text`. `continuing`: it goes on from a former piece, so no space is put before its first word."""
        return self.encode_batch([text], continuing)[0]

    def encode_batch(self, texts: list[str], continuing: bool = False) -> list[list[int]]:
        """`encode` of each text; the tokenizer's own threads share the work."""
        if not continuing or self._lead is None:
            return self._encode_batch(texts)
        size = len(self._lead)
        found = self._encode_batch(["\n" + text for text in texts])
        return [
            ids[size:] if ids[:size] == self._lead else self._encode(text)
            for ids, text in zip(found, texts, strict=True)
        ]

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self._json is None:
            return self._sentencepiece.encode(texts)
        batch = [one.ids for one in self._json.encode_batch_fast(texts, add_special_tokens=False)]
        if not self._spelled_controls:
            return batch
        return [
            self._encode_apart(text) if self._holds_control(text, ids) else ids
            for text, ids in zip(texts, batch, strict=True)
        ]

    def _holds_control(self, text: str, ids: list[int]) -> bool:
        """A search of the text is far cheaper than one of the ids, and enough where no normalizer changes it first."""
        normalized = self._json.normalizer is not None
        return any((normalized or name in text) and one in ids for name, one in self._spelled_controls.items())

    def _encode(self, text: str) -> list[int]:
        return self._encode_batch([text])[0]

    def _encode_apart(self, text: str) -> list[int]:
        """Ids of a text in which the model found a control token's spelling: cut behind its first character."""
        cuts = {at.start() + 1 for name in self._spelled_controls for at in re.finditer(re.escape(name), text)}
        ids: list[int] = []
        for start, stop in pairwise([0, *sorted(cuts), len(text)]):
            lead = self._lead if start and self._lead is not None else []
            found = self._json.encode("\n" * bool(lead) + text[start:stop], add_special_tokens=False).ids
            ids += found[len(lead) :]
        for name, control in self._spelled_controls.items():
            if control in ids:
                raise UserError(
                    f"tokenizer {self.path}: makes {name} of text that holds no {name}; give another tokenizer"
                )
        return ids

    def characters(
        self, texts: list[str], batch: list[list[int]], tokens: np.ndarray, continuing: bool = False
    ) -> np.ndarray:
        """How many characters of its text each token of a batch covers; a character cut by tokens counts to the first.

        `batch` is what `encode_batch` gave, `tokens` the same ids joined. All of a batch in a few passes: text by text
        it would cost a sixth of the encoding.
        """
        covered = self._covered.take(tokens)
        ends = np.cumsum([len(ids) for ids in batch])
        starts = ends - [len(ids) for ids in batch]
        sizes = np.array([(len(text), len(text.encode())) for text in texts])  # [text, characters and bytes]
        spelled = np.stack([_sums(covered, starts, ends), _sums(self._sizes.take(tokens), starts, ends)], axis=1)
        led = (spelled == sizes + 1).all(axis=1)  # a space before the first word that the text has not
        covered[starts[led]] -= 1
        exact = (spelled == sizes).all(axis=1) | (led & (not continuing))
        for place in range(len(texts)) if not self.literal else np.flatnonzero(~exact).tolist():
            here = slice(starts[place], ends[place])
            if not (exact[place] and self._spells(batch[place], texts[place])):
                covered[here] = self._characters_by_offsets(texts[place], len(batch[place]), continuing)
        return covered

    def _spells(self, ids: list[int], text: str) -> bool:
        spelled, data = b"".join(map(self._spellings.__getitem__, ids)), text.encode()
        return spelled == data or (spelled[:1] == b" " and spelled[1:] == data)

    def _characters_by_offsets(self, text: str, count: int, continuing: bool) -> np.ndarray:
        if continuing:  # its ids are no encoding of the text alone: all of it counts to the first
            return np.array([len(text)] + [0] * (count - 1), np.uint32)[:count]
        ends = np.maximum.accumulate(np.array(self.char_ends(text)[1], np.int64))
        return np.diff(ends, prepend=0).astype(np.uint32)

    def char_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of `text` and, for each, the character position in `text` where its piece ends."""
        if self._json is not None:
            encoding = self._json.encode(text, add_special_tokens=False)
            return encoding.ids, [end for _, end in encoding.offsets]
        pieces = self._sentencepiece.encode(text, return_type="proto").pieces
        leading = _leading(text.encode())  # SentencePiece counts bytes, not characters
        chars = np.concatenate([[0], np.cumsum(leading)])
        return [piece.id for piece in pieces], [int(chars[piece.end]) for piece in pieces]

    @cached_property
    def _spellings(self) -> list[bytes]:
        """The bytes that each id stands for in text; none for control tokens."""
        if self._sentencepiece is not None:
            return sentencepiece_token_bytes(self._sentencepiece)
        return json_token_bytes(self._json, self.vocab_size)

    @cached_property
    def literal(self) -> bool:
        """Whether the tokenizer takes text as it stands, so that counts suffice to tell that ids spell their text."""
        if self._json is not None:
            return self._json.normalizer is None
        from sentencepiece import sentencepiece_model_pb2 as protos

        model = protos.ModelProto()  # type: ignore[attr-defined]
        model.ParseFromString(self._sentencepiece.serialized_model_proto())
        return model.normalizer_spec.name == "identity" and not model.normalizer_spec.remove_extra_whitespaces

    @cached_property
    def _sizes(self) -> np.ndarray:
        """The bytes of each id's spelling."""
        return np.array([len(piece) for piece in self._spellings], np.uint32)

    @cached_property
    def _covered(self) -> np.ndarray:
        """The characters that begin in each id's bytes."""
        before = np.concatenate([[0], np.cumsum(_leading(b"".join(self._spellings)))])
        return np.diff(before[np.cumsum(self._sizes)], prepend=0).astype(np.uint32)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; control tokens are left out."""
        if self._json is not None:
            return self._json.decode(ids, skip_special_tokens=True)
        return self._sentencepiece.decode(ids)

    def spell(self, ids: list[int], *, first: bool) -> str:
        """The text that `ids` stand for to the space, unlike `decode`. `first`: they begin a text."""
        data = b"".join(map(self._spellings.__getitem__, ids))
        if first and self._lead is not None:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def control_name(self, token: int) -> str:
        """How the vocabulary writes a control token."""
        name = self._sentencepiece.id_to_piece(token) if self._json is None else self._json.id_to_token(token)
        return str(name)

    @cached_property
    def digest(self) -> str:
        """Digest of the file that decides the ids."""
        return directory_digest([self.path])

    def files(self) -> list[Path]:
        """The files that make up this tokenizer, for a copy beside tokens, checkpoints and exports."""
        return [self.directory / name for name in FILES if (self.directory / name).is_file()] or [self.path]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "directory": self.directory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self.directory = state["path"], state["directory"]
        self._open()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a directory (tokenizer.json, else tokenizer.model) or a file. Raises UserError."""
    path = Path(path)
    if path.is_file():
        return Tokenizer(path, path.parent)
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            return Tokenizer(path / name, path)
    what = "has no tokenizer.json or tokenizer.model" if path.is_dir() else "no such file or directory"
    raise UserError(f"tokenizer {path}: {what}; give a Hugging Face directory or a tokenizer file")


def _leading(data: bytes) -> np.ndarray:
    """Whether each byte of UTF-8 begins a character."""
    return (np.frombuffer(data, np.uint8) & 0xC0) != 0x80


def _sums(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The sum of each range of `values`."""
    before = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return before[ends] - before[starts]
