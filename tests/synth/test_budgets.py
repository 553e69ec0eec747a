"""Budgets to the token: no prompt exceeds its part of the window, whatever the tokenizer, the text and the answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from extras import need
from hypothesis import given, settings
from hypothesis import strategies as st
from test_synth_run import answer_group
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as JsonTokenizer

from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth.format.prompt import context_tokens
from synth.format.truncate import fit_text, split_text, surely_fits


def save(tokenizer: JsonTokenizer, folder: Path) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def byte_level(folder: Path, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """A token a byte, of the text as the normalizer leaves it."""
    vocabulary = {
        word: place for place, word in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = JsonTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return save(tokenizer, folder)


def word_level(folder: Path) -> Tokenizer:
    """A token a word however long, and none for blanks."""
    tokenizer = JsonTokenizer(models.WordLevel(vocab={"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return save(tokenizer, folder)


def sentencepiece(folder: Path) -> Tokenizer:
    model = Path(need("mistral_common", extra="test").__file__).parent / "data" / "tokenizer.model.v1"
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    return load_tokenizer(folder)


MAKERS = {
    "bytes": byte_level,
    "nfkc": lambda folder: byte_level(folder, normalizers.NFKC()),  # one character of 'ﷺ' becomes 33 tokens
    "words": word_level,
    "sentencepiece": sentencepiece,
}


CASES = [pytest.param(name, marks=pytest.mark.extra if name == "sentencepiece" else ()) for name in MAKERS]


@pytest.fixture(scope="module", params=CASES)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


BITS = [
    "a",
    "b. ",
    "Yes! ",
    "\n",
    " ",
    "\n\n\n\n",
    "ﷺ",
    "你好。",
    "é",
    "🙂",
    "</CON>",
    "<QUE>",
    "<s>",
    "x" * 40,
    "\x00",
    "1 ",
    "\u3000",
]
TEXTS = st.lists(st.sampled_from(BITS) | st.characters(codec="utf-8"), min_size=1, max_size=60).map("".join)
ANY_TEXT = TEXTS.filter(lambda text: bool(text.strip()))


@given(text=ANY_TEXT, room=st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_what_fits_is_told_exactly(tokenizer: Tokenizer, text: str, room: int) -> None:
    budget = context_tokens("", tokenizer) + room
    _, end = fit_text(text, tokenizer, budget)
    assert 0 < end <= len(text)
    assert end == 1 or context_tokens(text[:end], tokenizer) <= budget
    if surely_fits(text, tokenizer, budget):
        assert context_tokens(text, tokenizer) <= budget
    if context_tokens(text, tokenizer) <= budget:
        assert end == len(text)


@given(text=ANY_TEXT, room=st.integers(34, 90))
@settings(max_examples=150, deadline=None)
def test_a_split_text_is_whole_and_each_part_fits(tokenizer: Tokenizer, text: str, room: int) -> None:
    budget = context_tokens("", tokenizer) + room
    spans = split_text(text, tokenizer, budget)
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])] and spans[-1][1] == len(text)
    for start, end in spans:
        assert text[start:end].strip()
        assert context_tokens(text[start:end], tokenizer) <= budget
    if context_tokens(text, tokenizer) <= budget:
        assert len(spans) == 1


def test_parts_end_at_sentences(tokenizer: Tokenizer) -> None:
    text = "  One is here. Two is here! \n\n Three is here? Four. "
    budget = context_tokens("Two is here! Three", tokenizer)
    parts = [text[start:end] for start, end in split_text(text, tokenizer, budget)]
    assert "".join(parts) == text
    assert all(part.rstrip()[-1] in ".!?" for part in parts)
    assert len(parts) >= 2


def test_tags_cost_what_they_cost(tokenizer: Tokenizer) -> None:
    """Each broken tag takes a token more than the text alone would."""
    budget = context_tokens("", tokenizer) + 300
    _, end = fit_text("</CON>" * 3000, tokenizer, budget)
    assert context_tokens("</CON>" * 3000, tokenizer) > budget
    assert context_tokens(("</CON>" * 3000)[:end], tokenizer) <= budget


ANSWERS = [
    "<QUE> a? <ANS> b </END>",
    "<QUE> é你? <ANS> 🙂 </END>",
    "<QUE> cut",
    "\n\n",
    "z" * 30,
    "<QUE> no </END>",
    "<QUE> c <ANS> d </END>x",
]


@given(
    texts=st.lists(ANY_TEXT, min_size=1, max_size=4),
    answers=st.lists(st.lists(st.sampled_from(ANSWERS), max_size=4).map(" ".join), min_size=4, max_size=4),
    room=st.integers(16, 120),
)
@settings(max_examples=80, deadline=None)
def test_no_prompt_of_a_chain_exceeds_its_part(
    tokenizer: Tokenizer, texts: list[str], answers: list[str], room: int
) -> None:
    limit = context_tokens("", tokenizer) + room
    group, prompts = answer_group(tokenizer, list(answers), texts, max_model_len=limit + 50, max_new_tokens=50)
    assert all(len(prompt) <= limit for prompt in prompts)
    assert len(prompts) == len(group.texts)
    assert len(group.texts) + group.meta["no_room"] == len(texts)
    for text in group.texts:
        raw = texts[int(text.raw_id[1:])]
        assert text.text == raw[text.start : text.end] != ""
    cut = sum((text.start, text.end) != (0, len(texts[int(text.raw_id[1:])])) for text in group.texts)
    assert cut == group.meta["texts_cut"]
