"""Tokenizers: any `tokenizer.json`, or a SentencePiece `tokenizer.model`, with one interface.

Guarantees: `encode` adds no BOS or EOS. Text that spells a control token stays text, even if the vocabulary of the
model has the spelling. Segments of a document are encoded one by one, in training and at inference, so that the tokens
of a prompt are a prefix of the training row; with `continuing` a segment gets no space before its first word.

`characters` uses the bytes of each id: exact for byte-level vocabularies and those of SentencePiece
(U+2581 is a space, `<0x0A>` a byte), and ten times as fast as the offsets of the library. The bytes are compared with
the text, and the offsets are used for a tokenizer that changes its text (lower case, Unicode normalization).
"""

import json
import re
import shutil
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


def _marked(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE_MARK, " ").encode()


def _from_alphabet(piece: str, alphabet: dict[str, int]) -> bytes:
    return bytes(alphabet[char] for char in piece) if all(char in alphabet for char in piece) else piece.encode()


def _byte_alphabet() -> dict[str, int]:
    """The alphabet of GPT-2: printable Latin-1 is itself, the other bytes are U+0100 and following, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


FILES = (
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json "
    "chat_template.jinja vocab.json merges.txt"
).split()
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|im_start|>", "[BOS]")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|endoftext|>", "[EOS]")


class Tokenizer:
    """One tokenizer and its path. `bos_id` and `eos_id` are None if it has none."""

    def __init__(self, path: Path, directory: Path):
        self.path, self.directory = path, directory
        self._lead: list[int] | None = None
        self._spelled_controls: dict[str, int] = {}
        self._sentencepiece: Any = None
        self._json: Any = None
        self.path.open("rb").close()  # a missing permission is not damage
        if self.path.name.endswith(".json"):
            self._open_json()
        else:
            self._open_sentencepiece()
        plain, after = self._encode("a"), self._encode("\na")
        lead = self._encode("\n")
        # A tokenizer that adds a space before the first word encodes "a" differently at the start of a text.
        self._lead = lead if after[: len(lead)] == lead and after[len(lead) :] != plain else None

    def _open_json(self) -> None:
        try:
            self._json = JsonTokenizer.from_file(str(self.path))
        except Exception as error:  # tokenizers raises Exception for any damage
            raise UserError(f"tokenizer {self.path}: not a tokenizer.json ({error})") from error
        self._json.encode_special_tokens = True  # a text that spells "<s>" is text
        self._json.no_padding()
        self._json.no_truncation()
        special = {token.content: index for index, token in self._json.get_added_tokens_decoder().items()}
        self.bos_id = self._control("bos", _BOS_NAMES, special)
        self.eos_id = self._control("eos", _EOS_NAMES, special)
        self.vocab_size = max(self._json.get_vocab(with_added_tokens=True).values()) + 1
        own = self._json.get_vocab(with_added_tokens=False)  # spellings that the model may make of text
        self._spelled_controls = {
            name: index for name, index in special.items() if name in own and index in (self.bos_id, self.eos_id)
        }

    def _open_sentencepiece(self) -> None:
        import sentencepiece

        try:
            self._sentencepiece = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer {self.path}: not a SentencePiece model ({error})") from error
        found = {"bos": self._sentencepiece.bos_id(), "eos": self._sentencepiece.eos_id()}
        self.bos_id, self.eos_id = (
            None if found[which] < 0 or self._named(which) is None else found[which] for which in ("bos", "eos")
        )
        self.vocab_size = self._sentencepiece.vocab_size()

    def _control(self, which: str, usual: tuple[str, ...], special: dict[str, int]) -> int | None:
        """The id that tokenizer_config.json names, else that of the first usual spelling. None if it says null."""
        named = self._named(which)
        if named is None:
            return None
        content = named.get("content") if isinstance(named, dict) else named
        if content:
            return self._json.token_to_id(content)
        return next((special[name] for name in usual if name in special), None)

    def _named(self, which: str) -> Any:
        """What tokenizer_config.json says: a spelling, an object with one, None, or '' for nothing."""
        config = self.directory / "tokenizer_config.json"
        return json.loads(config.read_text(encoding="utf-8")).get(f"{which}_token", "") if config.is_file() else ""

    def hf_rules(self) -> tuple[bool, bool]:
        """Whether transformers puts BOS before a text, and whether it reads the spelling of a control token as one."""
        settings = self.directory / "tokenizer_config.json"
        stated = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        if self._json is None:
            added = bool(stated.get("add_bos_token", True))
        else:  # transformers 5 goes by tokenizer.json, whatever add_bos_token says
            added = self._json.encode("a").ids[:1] == [self.bos_id]
        return added and self.bos_id is not None, self._json is not None and not stated.get(
            "split_special_tokens", False
        )

    def encode(self, text: str, continuing: bool = False) -> list[int]:
        """Ids of `text`. `continuing`: it continues an earlier segment, so no space is added before its first word."""
        return self.encode_batch([text], continuing)[0]

    def encode_batch(self, texts: list[str], continuing: bool = False) -> list[list[int]]:
        """`encode` of each text, in the threads of the tokenizer."""
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
        """Searches the text, which is faster than the ids and sufficient without a normalizer."""
        normalized = self._json.normalizer is not None
        return any((normalized or name in text) and one in ids for name, one in self._spelled_controls.items())

    def _encode(self, text: str) -> list[int]:
        return self._encode_batch([text])[0]

    def _encode_apart(self, text: str) -> list[int]:
        """Ids of a text with the spelling of a control token, cut after the first character of the spelling."""
        cuts = {at.start() + 1 for name in self._spelled_controls for at in re.finditer(re.escape(name), text)}
        ids: list[int] = []
        for start, stop in pairwise([0, *sorted(cuts), len(text)]):
            lead = self._lead if start and self._lead is not None else []
            found = self._json.encode("\n" * bool(lead) + text[start:stop], add_special_tokens=False).ids
            ids += found[len(lead) :]
        for name, control in self._spelled_controls.items():
            if control in ids:
                raise UserError(
                    f"tokenizer {self.path}: makes {name} of text that has no {name}; set another tokenizer"
                )
        return ids

    def characters(
        self, texts: list[str], batch: list[list[int]], tokens: np.ndarray, continuing: bool = False
    ) -> np.ndarray:
        """The characters that each token of a batch covers. A character split over tokens counts for the first.

        `batch` is the result of `encode_batch`, `tokens` the same ids joined.
        """
        covered = self._covered.take(tokens)
        ends = np.cumsum([len(ids) for ids in batch])
        starts = ends - [len(ids) for ids in batch]
        sizes = np.array([(len(text), len(text.encode())) for text in texts])  # [text, characters and bytes]
        spelled = np.stack([_sums(covered, starts, ends), _sums(self._sizes.take(tokens), starts, ends)], axis=1)
        led = (spelled == sizes + 1).all(axis=1)  # a space before the first word that is not in the text
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
        if continuing:  # its ids do not encode the text alone: all characters count for the first
            return np.array([len(text)] + [0] * (count - 1), np.uint32)[:count]
        ends = np.maximum.accumulate(np.array(self.char_ends(text)[1], np.int64))
        return np.diff(ends, prepend=0).astype(np.uint32)

    @cached_property
    def control_spellings(self) -> list[str]:
        """The spellings of all control tokens, which a chat template's text turns into these tokens."""
        if self._json is not None:
            return [token.content for token in self._json.get_added_tokens_decoder().values() if token.special]
        model = self._sentencepiece
        return [model.id_to_piece(index) for index in range(model.vocab_size()) if model.is_control(index)]

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a rendered chat template, in which the spelling of a control token is that token."""
        if self._json is None:
            raise UserError(f"tokenizer {self.path}: chat templates need a tokenizer.json; convert the tokenizer to it")
        return self._for_templates.encode(text, add_special_tokens=False).ids

    @cached_property
    def _for_templates(self) -> Any:
        return JsonTokenizer.from_str(self._json.to_str())

    def char_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of `text`, and the character of `text` where each ends."""
        if self._json is not None:
            encoding = self._json.encode(text, add_special_tokens=False)
            return encoding.ids, [end for _, end in encoding.offsets]
        pieces = self._sentencepiece.encode(text, return_type="proto").pieces
        leading = _leading(text.encode())  # SentencePiece counts bytes, not characters
        chars = np.concatenate([[0], np.cumsum(leading)])
        return [piece.id for piece in pieces], [int(chars[piece.end]) for piece in pieces]

    @cached_property
    def _spellings(self) -> list[bytes]:
        """The bytes of each id in text. Control, unknown and special ids have none."""
        model = self._sentencepiece
        if model is not None:
            silent = [model.is_control(index) or model.is_unknown(index) for index in range(model.vocab_size())]
            return [b"" if one else _marked(model.id_to_piece(index)) for index, one in enumerate(silent)]
        byte_level = _byte_alphabet() if "ByteLevel" in repr(self._json.decoder) else None
        token_bytes = [b""] * self.vocab_size
        for piece, index in self._json.get_vocab(with_added_tokens=False).items():
            token_bytes[index] = _marked(piece) if byte_level is None else _from_alphabet(piece, byte_level)
        for index, token in self._json.get_added_tokens_decoder().items():
            token_bytes[index] = b"" if token.special else token.content.encode()
        return token_bytes

    @cached_property
    def literal(self) -> bool:
        """Whether the tokenizer does not change text, so that equal counts show that ids spell their text."""
        if self._json is not None:
            return self._json.normalizer is None
        from sentencepiece import sentencepiece_model_pb2 as protos

        model = protos.ModelProto()  # type: ignore[attr-defined]
        model.ParseFromString(self._sentencepiece.serialized_model_proto())
        return model.normalizer_spec.name == "identity" and not model.normalizer_spec.remove_extra_whitespaces

    @cached_property
    def _sizes(self) -> np.ndarray:
        """The number of bytes of each id."""
        return np.array([len(piece) for piece in self._spellings], np.uint32)

    @cached_property
    def _covered(self) -> np.ndarray:
        """The characters that begin in the bytes of each id."""
        before = np.concatenate([[0], np.cumsum(_leading(b"".join(self._spellings)))])
        return np.diff(before[np.cumsum(self._sizes)], prepend=0).astype(np.uint32)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids` without control tokens."""
        if self._json is not None:
            return self._json.decode(ids, skip_special_tokens=True)
        return self._sentencepiece.decode(ids)

    def spell(self, ids: list[int], *, first: bool) -> str:
        """The exact text of `ids`, with leading space, unlike `decode`. `first`: they begin a text."""
        data = b"".join(map(self._spellings.__getitem__, ids))
        if first and self._lead is not None:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def control_name(self, token: int) -> str:
        """The name of a control token in the vocabulary."""
        return str(self._sentencepiece.id_to_piece(token) if self._json is None else self._json.id_to_token(token))

    @cached_property
    def digest(self) -> str:
        """Digest of the file that defines the ids."""
        return directory_digest([self.path])

    def save(self, directory: Path) -> None:
        """Copies the files of this tokenizer."""
        directory.mkdir(exist_ok=True)
        for file in [self.directory / name for name in FILES if (self.directory / name).is_file()] or [self.path]:
            shutil.copyfile(file, directory / file.name)

    def __reduce__(self) -> Any:
        return Tokenizer, (self.path, self.directory)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a directory (tokenizer.json, else tokenizer.model) or a file. Raises UserError."""
    path = Path(path)
    if path.is_file():
        return Tokenizer(path, path.parent)
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            return Tokenizer(path / name, path)
    fault = "has no tokenizer.json or tokenizer.model" if path.is_dir() else "no such file or directory"
    raise UserError(f"tokenizer {path}: {fault}; set a Hugging Face directory or a tokenizer file")


def _leading(data: bytes) -> np.ndarray:
    """Whether each byte of UTF-8 begins a character."""
    return (np.frombuffer(data, np.uint8) & 0xC0) != 0x80


def _sums(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The sum of each range of `values`."""
    before = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return before[ends] - before[starts]
