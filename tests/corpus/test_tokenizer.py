"""Tokenizers: no control token from text, pieces that join as the whole does, character ends, both file kinds."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
from extras import need
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as JsonTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ipt_jax.core.errors import UserError
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


@pytest.mark.extra
def test_control_ids(bytes_bpe: Tokenizer, mistral: Tokenizer) -> None:
    assert (bytes_bpe.bos_id, bytes_bpe.eos_id) == (1, 2)
    assert (mistral.bos_id, mistral.eos_id, mistral.vocab_size) == (1, 2, 32000)


@pytest.mark.extra
def test_text_that_spells_a_control_token_stays_text(bytes_bpe: Tokenizer, mistral: Tokenizer) -> None:
    for tokenizer in (bytes_bpe, mistral):
        ids = tokenizer.encode("a<s>b</s>") + tokenizer.encode("</s>", continuing=True)
        assert not {1, 2} & set(ids)
        assert tokenizer.decode(ids) == "a<s>b</s></s>"


def unigram() -> JsonTokenizer:
    """T5's kind: the model's own vocabulary spells the control token, at the best score of all."""
    pieces = [("<unk>", -20.0), ("</s>", 0.0), ("\u2581", -5.0), *((char, -9.0) for char in "ab</s>")]
    tokenizer = JsonTokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def merging() -> JsonTokenizer:
    """A BPE whose merges end in the control token."""
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", "</s>", *"<>/sab", "</", "</s"])}
    merges = [("<", "/"), ("</", "s"), ("</s", ">")]
    tokenizer = JsonTokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.mark.parametrize("make", [unigram, merging])
def test_a_vocabulary_that_spells_a_control_token_never_gives_it(tmp_path: Path, make) -> None:
    made = make()
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 1
    for text in ("a</s>b", "</s>", "</s></s>ab", "a</s"):
        for continuing in (False, True):
            ids = tokenizer.encode(text, continuing)
            assert 1 not in ids
            assert tokenizer.spell(ids, first=not continuing) == text
            assert tokenizer.encode_batch(["a", text], continuing)[1] == ids


def test_text_that_a_normalizer_turns_into_a_control_token_is_refused(tmp_path: Path) -> None:
    made = unigram()
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="makes </s> of text that has no </s>"):
        load_tokenizer(tmp_path).encode("a\uff1c/s\uff1eb")


@given(st.text(max_size=40))
def test_bytes_round_trip(bytes_bpe: Tokenizer, text: str) -> None:
    assert bytes_bpe.decode(bytes_bpe.encode(text)) == text
    assert bytes_bpe.encode_batch([text, "a"]) == [bytes_bpe.encode(text), bytes_bpe.encode("a")]


@pytest.mark.extra
def test_a_continuing_piece_has_no_leading_space(mistral: Tokenizer) -> None:
    joined = mistral.encode("Hello\n\n<QUE> hi")
    assert mistral.encode("Hello\n\n") + mistral.encode("<QUE> hi", continuing=True) == joined
    assert mistral.encode("Hello\n\n") + mistral.encode("<QUE> hi") != joined
    assert mistral.encode_batch(["<QUE> hi"], continuing=True) == [mistral.encode("<QUE> hi", continuing=True)]


@pytest.mark.extra
def test_the_wire_format_has_the_ids_of_the_official_tokenizer(mistral: Tokenizer) -> None:
    """' <CON>' after BOS is U+2581 twice, then the tag: 28705, 523, 3185, 28767 in Mistral's vocabulary."""
    assert mistral.encode(" <CON> Hello") == [28705, 523, 3185, 28767, 22557]


@pytest.mark.extra
@given(st.text(alphabet="aé日 w\n𝄞", max_size=20))
def test_character_ends_cover_the_text(bytes_bpe: Tokenizer, mistral: Tokenizer, text: str) -> None:
    for tokenizer in (bytes_bpe, mistral):
        ids, ends = tokenizer.char_ends(text)
        assert ids == tokenizer.encode(text)
        assert ends == sorted(ends) and (ends[-1:] == [len(text)] or not text.strip())
        covered = tokenizer.characters([text], [ids], np.array(ids, np.uint32))
        assert covered.sum() == len(text) and len(covered) == len(ids)
        assert tokenizer.spell(ids, first=True) == text


@given(st.text(alphabet="aé日 w\n𝄞ﬁA", max_size=20))
def test_characters_fall_to_the_tokens_that_spell_them(bytes_bpe: Tokenizer, text: str) -> None:
    ids = bytes_bpe.encode(text)
    covered = bytes_bpe.characters([text], [ids], np.array(ids, np.uint32))
    for place in np.flatnonzero(covered):
        stop = int(covered[: place + 1].sum())
        assert bytes_bpe.spell(ids[: place + 1], first=True).rstrip("\ufffd") in (text[:stop], text[: stop - 1])


@pytest.mark.extra
def test_a_batch_counts_each_text_for_itself(bytes_bpe: Tokenizer, mistral: Tokenizer) -> None:
    texts = ["", "a world", " é", "日本 <s>", "", "w" * 300, "\n"]
    for tokenizer in (bytes_bpe, mistral):
        for continuing in (False, True):
            batch = tokenizer.encode_batch(texts, continuing)
            joined = np.array([token for ids in batch for token in ids], np.uint32)
            alone = [
                tokenizer.characters([t], [i], np.array(i, int), continuing) for t, i in zip(texts, batch, strict=True)
            ]
            assert tokenizer.characters(texts, batch, joined, continuing).tolist() == np.concatenate(alone).tolist()
            assert [int(one.sum()) for one in alone] == [len(text) for text in texts]


def test_a_tokenizer_that_changes_its_text_is_asked_for_offsets(tmp_path: Path) -> None:
    made = JsonTokenizer(models.WordLevel({"[UNK]": 0, "ab": 1, "c": 2}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("AB  zzz c")
    assert ids == [1, 0, 2]
    assert tokenizer.characters(["AB  zzz c"], [ids], np.array(ids)).tolist() == [2, 5, 2]
    assert tokenizer.characters(["AB  zzz c"], [ids], np.array(ids), continuing=True).tolist() == [9, 0, 0]


def test_travels_between_processes_and_saves_its_files(bytes_bpe: Tokenizer, tmp_path: Path) -> None:
    again = copy.copy(bytes_bpe)  # by the same state that pickling carries
    assert again.encode("a world") == bytes_bpe.encode("a world") and again.digest == bytes_bpe.digest
    bytes_bpe.save(tmp_path / "copy")
    assert [file.name for file in (tmp_path / "copy").iterdir()] == ["tokenizer.json"]


def test_what_is_no_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer.json or tokenizer.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such file or directory"):
        load_tokenizer(tmp_path / "none")
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match="not a "):
            load_tokenizer(tmp_path / name)
