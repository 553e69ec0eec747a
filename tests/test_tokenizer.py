"""Tokenizers: no control token from text, pieces that join as the whole does, character ends, both file kinds."""

import copy
import shutil
from pathlib import Path

import pytest
from extras import need
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as JsonTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from ipt_jax.corpus.settings import UserError
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def bytes_bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = JsonTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["a small world of words"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    package = need("mistral_common", extra="test")
    folder = tmp_path_factory.mktemp("mistral")
    model = Path(package.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(model, folder / "tokenizer.model")
    return load_tokenizer(folder)


def test_control_ids(bytes_bpe: Tokenizer, mistral: Tokenizer) -> None:
    assert (bytes_bpe.bos_id, bytes_bpe.eos_id) == (1, 2)
    assert (mistral.bos_id, mistral.eos_id, mistral.vocab_size) == (1, 2, 32000)


def test_text_that_spells_a_control_token_stays_text(bytes_bpe: Tokenizer, mistral: Tokenizer) -> None:
    for tokenizer in (bytes_bpe, mistral):
        ids = tokenizer.encode("a<s>b</s>") + tokenizer.encode("</s>", continuing=True)
        assert not {1, 2} & set(ids)
        assert tokenizer.decode(ids) == "a<s>b</s></s>"


@given(st.text(max_size=40))
def test_bytes_round_trip(bytes_bpe: Tokenizer, text: str) -> None:
    assert bytes_bpe.decode(bytes_bpe.encode(text)) == text
    assert bytes_bpe.encode_batch([text, "a"]) == [bytes_bpe.encode(text), bytes_bpe.encode("a")]


def test_a_continuing_piece_has_no_leading_space(mistral: Tokenizer) -> None:
    joined = mistral.encode("Hello\n\n<QUE> hi")
    assert mistral.encode("Hello\n\n") + mistral.encode("<QUE> hi", continuing=True) == joined
    assert mistral.encode("Hello\n\n") + mistral.encode("<QUE> hi") != joined
    assert mistral.encode_batch(["<QUE> hi"], continuing=True) == [mistral.encode("<QUE> hi", continuing=True)]


def test_the_wire_format_has_the_ids_of_the_official_tokenizer(mistral: Tokenizer) -> None:
    """' <CON>' after BOS is U+2581 twice, then the tag: 28705, 523, 3185, 28767 in Mistral's vocabulary."""
    assert mistral.encode(" <CON> Hello") == [28705, 523, 3185, 28767, 22557]


@given(st.text(alphabet="aé日 w\n𝄞", max_size=20))
def test_character_ends_cover_the_text(bytes_bpe: Tokenizer, mistral: Tokenizer, text: str) -> None:
    for tokenizer in (bytes_bpe, mistral):
        ids, ends = tokenizer.char_ends(text)
        assert ids == tokenizer.encode(text)
        assert ends == sorted(ends) and (ends[-1:] == [len(text)] or not text.strip())


def test_travels_between_processes_and_names_its_files(bytes_bpe: Tokenizer) -> None:
    again = copy.copy(bytes_bpe)  # by the same state that pickling carries
    assert again.encode("a world") == bytes_bpe.encode("a world") and again.digest == bytes_bpe.digest
    assert [file.name for file in bytes_bpe.files()] == ["tokenizer.json"]


def test_what_is_no_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer.json or tokenizer.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such file or directory"):
        load_tokenizer(tmp_path / "none")
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match="not a "):
            load_tokenizer(tmp_path / name)
