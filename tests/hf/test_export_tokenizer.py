"""An exported tokenizer gives the ids of training, BOS included, under `tokenizers` and under transformers."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from extras import need
from test_hf_roundtrip import MISTRAL, save_run
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as JsonTokenizer

import ipt_jax
from ipt_jax.hf.convert import run_export, run_import

LINES = [
    "a small world of words, 1234 of them",
    "der Fluß fließt über 7 Brücken",
    "日本語のテキスト",
    "x = [1, 2]\n\ty",
]


def train_sentencepiece(folder: Path, **options: Any) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 9), model_prefix=str(folder / "tokenizer"), hard_vocab_limit=False,
        minloglevel=3, **{"vocab_size": 400, "model_type": "bpe", "byte_fallback": True} | options,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()


def as_mistral(folder: Path) -> None:
    train_sentencepiece(folder, normalization_rule_name="identity", remove_extra_whitespaces=False)


def with_defaults(folder: Path) -> None:
    train_sentencepiece(folder, byte_fallback=False, user_defined_symbols=["<sep>", "[X]"])


def with_spaces(folder: Path) -> None:
    train_sentencepiece(folder, remove_extra_whitespaces=False, add_dummy_prefix=False)


def as_unigram(folder: Path) -> None:
    train_sentencepiece(
        folder, model_type="unigram", user_defined_symbols=["<sep>"], required_chars="<s/>unk0x12345789ABCDEF6"
    )


def real_mistral(folder: Path) -> None:
    data = Path(need("mistral_common", extra="test").__file__).parent / "data"
    shutil.copy(data / "mistral_instruct_tokenizer_241114.model.v7", folder / "tokenizer.model")


def byte_level(folder: Path, specials: list[str], pattern: str | None = None, ignore_merges: bool = False) -> None:
    tokenizer = JsonTokenizer(models.BPE(ignore_merges=ignore_merges))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, plain])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(LINES * 9, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    tokenizer.save(str(folder / "tokenizer.json"))


def as_llama3(folder: Path) -> None:
    """BOS and EOS named in tokenizer_config.json, with a class of transformers that would rebuild the tokenizer."""
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    byte_level(folder, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], pattern, ignore_merges=True)
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def plain_bytes(folder: Path) -> None:
    byte_level(folder, ["<s>", "</s>"])


def no_controls(folder: Path) -> None:
    byte_level(folder, [])


def texts() -> list[str]:
    """500 texts: words, runs of spaces, newlines, emoji, combining marks, controls, random code points."""
    draw = random.Random(1)
    parts = [
        *" ".join(LINES).split(" "),
        " ",
        "  ",
        "     ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "e\u0301",
        "ﬁ",
        "👩‍👩‍👧",
        "🇫🇷",
    ]
    parts += [
        "<s>",
        "</s>",
        "<unk>",
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<sep>",
        "[X]",
        "[INST]",
        "<0x0A>",
        "▁",
        "\x00",
    ]
    found = ["", " ", "\n", "<s>", " <CON> Hello", "Hello\n\n<QUE> hi", *LINES]
    while len(found) < 500:
        letters = [chr(draw.choice([draw.randrange(32, 0xD800), draw.randrange(0x10000, 0x1FFFF)])) for _ in range(3)]
        chosen = draw.choices(parts, k=draw.randrange(1, 25)) + letters
        draw.shuffle(chosen)
        found.append("".join(chosen))
    return found


def export(make: Callable[[Path], None], tmp_path: Path) -> tuple[Path, list[list[int]]]:
    """The exported directory, and the ids of training."""
    run = save_run(tmp_path / "run", MISTRAL)
    (run / "tokenizer").mkdir()
    make(run / "tokenizer")
    run_export(run, tmp_path / "hf")
    model = ipt_jax.load(run)
    return tmp_path / "hf", [model.encode(text) for text in texts()]


SENTENCEPIECE = [as_mistral, with_defaults, with_spaces, as_unigram]
JSON = [as_llama3, plain_bytes, no_controls]


@pytest.mark.parametrize("make", SENTENCEPIECE + JSON)
def test_the_written_file_encodes_as_training(
    make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, ids = export(make, tmp_path)
    tokenizer = JsonTokenizer.from_file(str(hf / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    assert [tokenizer.encode(text).ids for text in texts()] == ids
    assert "unlike training" not in capsys.readouterr().err


@pytest.mark.extra
@pytest.mark.parametrize("make", [*SENTENCEPIECE, *JSON, real_mistral])
def test_transformers_encodes_as_training(make: Callable[[Path], None], tmp_path: Path) -> None:
    transformers = need("transformers", extra="test")
    hf, ids = export(make, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(hf)
    assert [theirs(text).input_ids for text in texts()] == ids
    model = ipt_jax.load(hf)
    assert model.tokenizer is not None
    assert (theirs.bos_token_id, theirs.eos_token_id) == (model.tokenizer.bos_id, model.tokenizer.eos_id)
    assert [model.encode(text) for text in texts()] == ids
    run_import(hf, tmp_path / "imported")
    run_export(tmp_path / "imported", tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (hf / name).read_bytes()


def test_literal_ids_and_settings(tmp_path: Path) -> None:
    hf, _ = export(plain_bytes, tmp_path)
    tokenizer = JsonTokenizer.from_file(str(hf / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    bos, less, letter, more = (tokenizer.token_to_id(token) for token in ("<s>", "<", "s", ">"))
    assert tokenizer.encode("<s>").ids == [bos, less, letter, more]
    assert json.loads((hf / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True,
        "add_eos_token": False, "split_special_tokens": True, "fix_mistral_regex": False,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip


def test_a_chat_template_reads_control_tokens(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        as_llama3(folder)
        (folder / "chat_template.jinja").write_text("{{ bos_token }}")

    hf, _ = export(make, tmp_path)
    assert json.loads((hf / "tokenizer_config.json").read_text())["split_special_tokens"] is False


def test_a_model_that_cannot_be_converted_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def words(folder: Path) -> None:
        train_sentencepiece(folder, model_type="word", byte_fallback=False)

    hf, _ = export(words, tmp_path)
    assert capsys.readouterr().err.count("warning: transformers and vLLM will encode some texts unlike training") == 1
    assert not (hf / "tokenizer.json").exists() and (hf / "tokenizer.model").exists()
