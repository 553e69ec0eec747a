"""Writes the tokenizer files of an export.

Guarantees: under transformers and vLLM a text gets the ids of training, BOS included, and a text that spells a control
token stays text; both are compared on 600 texts before the files are kept, and a difference is one warning that names
the text. A SentencePiece model is converted to a tokenizer.json. A tokenizer with a chat template reads control tokens
in text, because its template writes them.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as protos
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as JsonTokenizer

from ipt_jax.core.checkpoint_path import ModelSource
from ipt_jax.corpus.tokenizer import SPACE_MARK, Tokenizer, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of a SentencePiece piece
UNIGRAM = 1  # type of a SentencePiece model
HARD = " ,  ,   ,\n,\r\n,\t,\u00a0,\u3000,\u2581,é,e\u0301,ﬁ,日本,مرحبا,नमस्ते,𝄞,👩‍👩‍👧,\x00,\ufffd,7,<0x0A>,<unk>".split(
    ","
)


def copy_tokenizer(source: ModelSource, target: Path) -> Tokenizer | None:
    """Copies the tokenizer files of a model, or prints a warning that there are none."""
    if source.tokenizer is None:
        print("warning: the model has no tokenizer files; add them before texts are tokenized for it", file=sys.stderr)
        return None
    tokenizer = load_tokenizer(source.tokenizer)
    tokenizer.save(target)
    return tokenizer


def export_tokenizer(source: ModelSource, target: Path) -> None:
    """Copies the tokenizer files and adds what transformers and vLLM need to encode as in training."""
    tokenizer = copy_tokenizer(source, target)
    if tokenizer is None:
        return
    settings_file = target / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    chat = "chat_template" in settings or (target / "chat_template.jinja").is_file()
    is_json = tokenizer.path.suffix == ".json"
    given = tokenizer.path.read_text(encoding="utf-8") if is_json else _from_sentencepiece(tokenizer.path.read_bytes())
    text = given if is_json and _first_difference(tokenizer, given, chat) is None else _with_bos(given, tokenizer)
    different = _first_difference(tokenizer, text, chat)
    if different is not None:
        print(
            f"warning: transformers and vLLM will encode some texts unlike training, the first found is {different!r}; "
            "pass them the ids of ipt_jax.load(...).encode(text)",
            file=sys.stderr,
        )
        if not is_json:  # a tokenizer.json would be read here, too, instead of the model
            return
    (target / "tokenizer.json").write_text(text, encoding="utf-8")
    settings.pop("auto_map", None)  # code of the original model, which is not copied
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is; others rebuild it
        "bos_token": _name(tokenizer, tokenizer.bos_id),
        "eos_token": _name(tokenizer, tokenizer.eos_id),
        "add_bos_token": tokenizer.bos_id is not None,
        "add_eos_token": False,
        "split_special_tokens": not chat,
        "fix_mistral_regex": False,  # else transformers 5 warns of any local tokenizer with 100,000 ids
        "clean_up_tokenization_spaces": False,
    }
    settings_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _name(tokenizer: Tokenizer, token: int | None) -> str | None:
    return None if token is None else tokenizer.control_name(token)


def _from_sentencepiece(data: bytes) -> str:
    """The tokenizer.json of a SentencePiece model."""
    model = protos.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(data)
    pieces, trained, rules = model.pieces, model.trainer_spec, model.normalizer_spec
    own = sorted((piece.piece for piece in pieces if piece.type == USER_DEFINED), key=len, reverse=True)
    known = {piece.piece for piece in pieces if piece.type == NORMAL}
    others = [piece.piece for piece in pieces if piece.type not in (NORMAL, USER_DEFINED)]
    unknown = next(index for index, piece in enumerate(pieces) if piece.type == UNKNOWN)
    if trained.model_type == UNIGRAM:
        never = min(piece.score for piece in pieces) - 1000  # text that spells another piece than a normal one
        special = {NORMAL: 0.0, USER_DEFINED: 0.0}
        scored = [(piece.piece, special.get(piece.type, never) or piece.score) for piece in pieces]
        tokenizer = JsonTokenizer(models.Unigram(scored, unk_id=unknown, byte_fallback=trained.byte_fallback))
    else:
        tokenizer = JsonTokenizer(
            models.BPE(
                vocab={piece.piece: index for index, piece in enumerate(pieces)},
                merges=_merges(pieces),
                unk_token=pieces[unknown].piece,
                fuse_unk=True,
                byte_fallback=trained.byte_fallback,
                ignore_merges=bool(own),  # a user-defined piece has no merges
            )
        )
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        if rules.name.startswith("nmt_"):  # Precompiled reads "\r\n" as one character
            steps.append(normalizers.Replace("\r", " "))
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(rf"\A +|[ {SPACE_MARK}]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE_MARK if rules.escape_whitespaces else " "))
    if rules.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE_MARK))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if own:
        hidden = "|".join(_start_of(name, known) for name in others)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex("|".join(map(re.escape, own))), "isolated"),
                # between two of them, a text that spells a control token would be found in the vocabulary
                pre_tokenizers.Split(Regex(rf"\A({hidden})"), "isolated"),
            ]
        )
    parts: list[Any] = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * rules.add_dummy_prefix)
    controls = [piece.piece for piece in pieces if piece.type in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in controls])
    return tokenizer.to_str(pretty=True)


def _start_of(name: str, known: set[str]) -> str:
    """A pattern of the start of a text that is `name`, not cut between two unknown characters: those are one id."""
    cut = next((at for at in range(1, len(name)) if known & {name[at - 1], name[at]}), 1)
    return rf"{re.escape(name[:cut])}(?={re.escape(name[cut:])}\z)"


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """Every split of a piece into two others, by the score of the piece: SentencePiece stores no merges."""
    normal = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL}
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(normal, key=lambda name: -normal[name])
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in normal and piece[cut:] in normal
    ]


def _with_bos(text: str, tokenizer: Tokenizer) -> str:
    """A tokenizer.json that adds BOS, if there is one, and nothing else."""
    raw = json.loads(text)
    name, a, b = _name(tokenizer, tokenizer.bos_id), *({"Sequence": {"id": id_, "type_id": 0}} for id_ in "AB")
    bos: list[Any] = [] if name is None else [{"SpecialToken": {"id": name, "type_id": 0}}]
    known = {} if name is None else {name: {"id": name, "ids": [tokenizer.bos_id], "tokens": [name]}}
    raw["post_processor"] = {
        "type": "TemplateProcessing", "single": [*bos, a], "pair": [*bos, a, *bos, b], "special_tokens": known,
    }  # fmt: skip
    return json.dumps(raw | {"truncation": None, "padding": None}, indent=2, ensure_ascii=False)


def _first_difference(tokenizer: Tokenizer, text: str, chat: bool) -> str | None:
    """The first text that a tokenizer.json encodes unlike training."""
    exported = JsonTokenizer.from_str(text)
    exported.encode_special_tokens = not chat
    texts = _texts(tokenizer, chat)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    pairs = zip(texts, tokenizer.encode_batch(texts), exported.encode_batch(texts), strict=True)
    return next((text for text, ids, found in pairs if found.ids != bos + ids), None)


def _texts(tokenizer: Tokenizer, chat: bool) -> list[str]:
    """600 texts of the vocabulary's own pieces, hard characters and, without a chat template, control tokens."""
    draw = random.Random(0)
    names = [_name(tokenizer, token) for token in (tokenizer.bos_id, tokenizer.eos_id)]
    hard = HARD + [name for name in names if name is not None and not chat]
    texts = ["", *hard]
    while len(texts) < 600:
        drawn = [tokenizer.spell([token], first=False) for token in draw.choices(range(tokenizer.vocab_size), k=12)]
        parts = drawn + draw.choices(hard, k=6)
        draw.shuffle(parts)
        texts.append("".join(parts))
    return texts
