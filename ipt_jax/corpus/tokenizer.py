"""Tokenizers: any `tokenizer.json`, or a SentencePiece `tokenizer.model`, behind one small interface.

Guarantees: `encode` adds no BOS or EOS, and text that spells a control token stays text. Pieces of a document are
encoded one by one, in training and at inference alike, so that a prompt's tokens are a prefix of the training row's;
`continuing` leaves out the space that SentencePiece models put before a text's first word.
"""

import json
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as JsonTokenizer

from ipt_jax.corpus.settings import UserError, directory_digest

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
        self._sentencepiece: Any = None
        self._json: Any = None
        if self.path.name.endswith(".json"):
            self._open_json()
        else:
            self._open_sentencepiece()
        self._local = threading.local()
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
        if continuing and self._lead is not None:
            ids = self._encode("\n" + text)
            if ids[: len(self._lead)] == self._lead:
                return ids[len(self._lead) :]
        return self._encode(text)

    def encode_batch(self, texts: list[str], continuing: bool = False) -> list[list[int]]:
        """`encode` of each text; the tokenizer's own threads share the work."""
        if continuing and self._lead is not None:
            return [self.encode(text, continuing=True) for text in texts]
        if self._json is not None:
            return [one.ids for one in self._json.encode_batch_fast(texts, add_special_tokens=False)]
        return self._sentencepiece.encode(texts)

    def _encode(self, text: str) -> list[int]:
        if self._json is not None:
            return self._json.encode(text, add_special_tokens=False).ids
        return self._sentencepiece.encode(text)

    def char_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of `text` and, for each, the character position in `text` where its piece ends."""
        if self._json is not None:
            encoding = self._json.encode(text, add_special_tokens=False)
            return encoding.ids, [end for _, end in encoding.offsets]
        pieces = self._sentencepiece.encode(text, return_type="proto").pieces
        leading = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80  # SentencePiece counts bytes, not characters
        chars = np.concatenate([[0], np.cumsum(leading)])
        return [piece.id for piece in pieces], [int(chars[piece.end]) for piece in pieces]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; control tokens are left out."""
        if self._json is not None:
            return self._json.decode(ids, skip_special_tokens=True)
        return self._sentencepiece.decode(ids)

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
