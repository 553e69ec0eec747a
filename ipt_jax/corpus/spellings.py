"""The bytes that each id of a vocabulary stands for in text.

Exact for byte-level vocabularies and for SentencePiece's (the mark U+2581 is a space, `<0x0A>` a byte). Nothing rests
on it alone: whoever uses the table compares what the ids spell with the text, so that a tokenizer which changes its
text (lower case, other forms of a character) is noticed and asked for offsets instead.
"""

import re
from typing import Any

SPACE_MARK = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def sentencepiece_spellings(model: Any) -> list[bytes]:
    """Of a SentencePieceProcessor. Control and unknown ids stand for nothing."""
    return [
        b"" if model.is_control(index) or model.is_unknown(index) else _marked(model.id_to_piece(index))
        for index in range(model.vocab_size())
    ]


def json_spellings(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """Of a tokenizers.Tokenizer. Special tokens stand for nothing: text that spells one is other ids."""
    byte_level = _byte_alphabet() if "ByteLevel" in repr(tokenizer.decoder) else None
    spellings = [b""] * vocab_size
    for piece, index in tokenizer.get_vocab(with_added_tokens=False).items():
        spellings[index] = _marked(piece) if byte_level is None else _from_alphabet(piece, byte_level)
    for index, token in tokenizer.get_added_tokens_decoder().items():
        spellings[index] = b"" if token.special else token.content.encode()
    return spellings


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
