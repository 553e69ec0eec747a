"""The wire format to the byte, and prompts as tokens: one BOS an example, the prefix unchanged from round to round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from extras import need
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as JsonTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.records import Segment
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth.format.parser import parse_completion
from synth.format.prompt import Prompt, context_tokens, keep_accepted
from synth.format.truncate import cut_point, fit_text
from synth.format.wire import context_block, example_segments, final_answer, pair_text, question_stem, wire_pair

LINES = [">\n\n", "<QUE> Who was it?", " <ANS> Ann </END>", " <CON> The hall. It stood. </CON>", "a b c. 你好。"]


def byte_tokenizer(path: Path, special: list[str], lines: list[str] = LINES) -> Tokenizer:
    """A byte-level BPE that merges whole tags, so that '>' and the blank line behind it may share a token."""
    tokenizer = JsonTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines * 5, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("bpe"), ["<s>", "</s>"])


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    package = need("mistral_common", extra="test")
    folder = tmp_path_factory.mktemp("mistral")
    model = Path(package.__file__).parent / "data" / "tokenizer.model.v1"
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    return load_tokenizer(folder)


@pytest.fixture(params=["tiny", pytest.param("mistral", marks=pytest.mark.extra)])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def test_wire_strings() -> None:
    assert context_block("A text.") == " <CON> A text. </CON>\n\n"
    assert pair_text(wire_pair("Who?", "Ann")) == "<QUE> Who? <ANS> Ann </END>"
    assert pair_text(wire_pair("Who?", "Ann", ["Bo", "Ann"])) == "<QUE> Who?\nOptions:\n- Bo\n- Ann <ANS> Ann </END>"
    assert pair_text(wire_pair("Who?", "Ann", rationale="It says so.")) == (
        "<QUE> Who?\nLet's think step by step. <ANS> It says so.\nTherefore, the answer is Ann </END>"
    )
    assert pair_text(wire_pair("Who?", "Ann", ["Bo", "Ann"], "It says so.")) == (
        "<QUE> Who?\nOptions:\n- Bo\n- Ann\nLet's think step by step. "
        "<ANS> It says so.\nTherefore, the answer is Ann </END>"
    )


@pytest.mark.parametrize("options", [None, ["Bo", "Ann"]])
@pytest.mark.parametrize("rationale", [None, "It says so."])
def test_wire_parts_come_back(options: list[str] | None, rationale: str | None) -> None:
    pair = wire_pair("Who?", "Ann", options, rationale)
    assert (question_stem(pair), final_answer(pair)) == ("Who?", "Ann")
    assert pair.format == ("choice" if options else "free") + ("_cot" if rationale else "")


def test_example_segments() -> None:
    pairs = [wire_pair("Who?", "Ann"), wire_pair("Where?", "Rome")]
    assert example_segments("T", pairs) == [
        Segment(loss=False, control="bos"),
        Segment(text=" <CON> T </CON>\n\n", loss=False),
        Segment(text="<QUE> Who? <ANS> Ann </END>\n\n<QUE> Where? <ANS> Rome </END>", loss=True),
        Segment(loss=True, control="eos"),
    ]


def test_one_bos_an_example_and_none_from_text(tokenizer: Tokenizer) -> None:
    """The released code sends '<s>' as text to an engine that adds another: two BOS an example."""
    prompt = Prompt(tokenizer)
    prompt.open("First <s> text.")
    prompt.close(
        tokenizer.encode("<QUE> a <ANS> b </END>", continuing=True), parse_completion("<QUE> a <ANS> b </END>", True)
    )
    ids = prompt.open("Second </s> text.")
    assert ids.count(tokenizer.bos_id) == 2
    assert ids.count(tokenizer.eos_id) == 1
    assert ids[0] == tokenizer.bos_id
    assert ids[ids.index(tokenizer.eos_id) + 1] == tokenizer.bos_id


def test_prompt_equals_the_tuning_rows_tokens(tokenizer: Tokenizer) -> None:
    """What the synthesizer was tuned on, segment by segment, is what it is asked with."""
    pairs = [wire_pair("Who?", "Ann"), wire_pair("Where?", "Rome")]
    control = {"bos": [tokenizer.bos_id], "eos": [tokenizer.eos_id]}
    row: list[int] = []
    for segment in example_segments("The hall.", pairs):
        continuing = segment.text.startswith("<QUE>")
        row += control[segment.control] if segment.control else tokenizer.encode(segment.text, continuing=continuing)
    prompt = Prompt(tokenizer)
    prompt.examples.append(prompt.example("The hall.", pairs))
    opened = prompt.open("Next.")
    assert opened[: len(row)] == row
    assert opened[len(row) :] == prompt.start_example("Next.")


@pytest.mark.parametrize("tail", ["", "\n\n<QUE> cut o", "\n\nsome more", "\n\n"])
def test_next_prompt_extends_the_last(tokenizer: Tokenizer, tail: str) -> None:
    text = "<QUE> a <ANS> b </END>\n\n<QUE> c <ANS> d </END>" + tail
    completion = tokenizer.encode(text, continuing=True)
    prompt = Prompt(tokenizer)
    first = prompt.open("First text.")
    assert not prompt.close(completion, parse_completion(tokenizer.decode(completion), False))
    second = prompt.open("Second text.")
    kept = second[len(first) : second.index(tokenizer.eos_id)]
    assert second[: len(first)] == first
    assert kept == completion[: len(kept)]
    assert tokenizer.decode(kept).strip() == text[: text.rfind("</END>") + 6]


def test_rejected_pair_inside_is_cut_out(tokenizer: Tokenizer) -> None:
    text = "<QUE> a <ANS> b </END>\n\n<QUE> no answer </END>\n\n<QUE> c <ANS> d </END>\n\n<QUE> e <ANS> "
    completion = tokenizer.encode(text, continuing=True)
    pairs = parse_completion(text, False)
    assert [pair.reason for pair in pairs] == [None, "no_answer", None, "truncated"]
    kept = keep_accepted(tokenizer, completion, pairs)
    assert kept != completion[: len(kept)]
    assert tokenizer.decode(kept).strip() == "<QUE> a <ANS> b </END>\n\n<QUE> c <ANS> d </END>"
    first = len(tokenizer.encode("<QUE> a <ANS> b </END>", continuing=True)) - 1
    assert kept[:first] == completion[:first]


def test_token_that_spans_two_pairs_is_encoded_anew(tmp_path: Path) -> None:
    """A tokenizer may merge the end of one pair with the start of the next: then half a pair must not be shown."""
    tokenizer = byte_tokenizer(tmp_path, ["<s>", "</s>"], lines=["</END>\n\n<QUE> "])
    text = "<QUE> a <ANS> b </END>\n\n<QUE> cut"
    completion = tokenizer.encode(text, continuing=True)
    kept = keep_accepted(tokenizer, completion, parse_completion(text, False))
    assert kept != completion[: len(kept)]
    assert tokenizer.decode(kept) == "<QUE> a <ANS> b </END>"


def test_rejected_first_pair_leaves_no_blank_line(tokenizer: Tokenizer) -> None:
    text = "<QUE> no answer </END>\n\n<QUE> c <ANS> d </END>"
    kept = keep_accepted(tokenizer, tokenizer.encode(text, continuing=True), parse_completion(text, True))
    assert kept == tokenizer.encode("<QUE> c <ANS> d </END>", continuing=True)


def test_example_without_pairs_is_not_shown_again(tokenizer: Tokenizer) -> None:
    prompt = Prompt(tokenizer)
    prompt.open("First.")
    assert not prompt.close(tokenizer.encode("nothing"), parse_completion("nothing", True))
    assert prompt.open("Second.") == prompt.start_example("Second.")


def test_oldest_example_goes_first(tokenizer: Tokenizer) -> None:
    prompt = Prompt(tokenizer)
    for name in ("One", "Two"):
        prompt.examples.append(prompt.example(name, [wire_pair("Who?", "Ann")]))
    whole = len(prompt.open("Three."))
    shorter = prompt.open("Three.", max_tokens=whole - 1)
    assert "One" not in tokenizer.decode(shorter)
    assert "Two" in tokenizer.decode(shorter)
    assert len(shorter) == prompt.token_count < whole


OFFICIAL = (  # the released script's prompt for the second text of a group, as its HF Space tokenizes it
    "<s> <CON> The mill stood by the river. </CON>\n\n<QUE> Where did the mill stand? <ANS> By the river. </END>\n\n"
    "<QUE> What stood there?\nOptions:\n- a mill\n- a barn <ANS> a mill </END></s><s> <CON> Anna walks. </CON>\n\n"
)
OFFICIAL_IDS = (
    "415 2545 4857 486 272 7782 28723 1867 3185 28767 13 13 28789 20749 28767 6926 863 272 2545 1876 28804 523 1251 "
    "28735 28767 2463 272 7782 28723 1867 5000 28767 13 13 28789 20749 28767 1824 4857 736 28804 13 4018 28747 13 "
    "28733 264 2545 13 28733 264 18581 523 1251 28735 28767 264 2545 1867 5000 28767 2 1 CON 11106 16830 28723 1867 "
    "3185 28767 13 13"
)


@pytest.mark.extra
@pytest.mark.parametrize("form", ["legacy", "metaspace", "sentencepiece"])
def test_prompts_are_the_official_ones_token_for_token(mistral: Tokenizer, tmp_path: Path, form: str) -> None:
    """With Mistral's vocabulary as a tokenizer.json of 2023, as one of today, and as its SentencePiece model."""
    tokenizer, opened = mistral, "28705 523 3185 28767"
    if form != "sentencepiece":
        transformers = need("transformers", extra="test")
        whole = transformers.LlamaTokenizer.from_pretrained(mistral.directory)._tokenizer
        if form == "legacy":
            steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            whole.normalizer, whole.pre_tokenizer = normalizers.Sequence(steps), None
        whole.save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path)
        opened = "259 28789 3185 28767" if form == "legacy" else "523 3185 28767"
    prompt = Prompt(tokenizer)
    pairs = [wire_pair("Where did the mill stand?", "By the river.")]
    pairs.append(wire_pair("What stood there?", "a mill", ["a mill", "a barn"]))
    prompt.examples.append(prompt.example("The mill stood by the river.", pairs))
    ids = prompt.open("Anna walks.")
    assert ids == [int(token) for token in f"1 {opened} {OFFICIAL_IDS.replace('CON', opened)}".split()]
    if form != "sentencepiece":
        assert ids == whole.encode(OFFICIAL, add_special_tokens=False).ids


def test_tokenizer_whose_config_says_no_bos_gets_none(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path, ["<s>", "</s>"])
    assert tokenizer.bos_id == 0
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)
    prompt = Prompt(tokenizer)
    example = prompt.example("One.", [wire_pair("Who?", "Ann")])
    prompt.examples.append(example)
    text = " <CON> One. </CON>\n\n"
    assert example == [*tokenizer.encode(text), *tokenizer.encode("<QUE> Who? <ANS> Ann </END>", continuing=True), 1]
    assert prompt.open("Two.") == [*example, *tokenizer.encode(" <CON> Two. </CON>\n\n")]
    assert context_tokens("One.", tokenizer) == len(tokenizer.encode(text))


def test_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no EOS token"):
        Prompt(byte_tokenizer(tmp_path, []))


def test_fit_text_cuts_behind_a_sentence(tokenizer: Tokenizer) -> None:
    text = "One short sentence. Another one follows here. " + "And it goes on and on " * 40
    whole = len(Prompt(tokenizer).start_example(text))
    assert fit_text(text, tokenizer, whole) == (0, len(text))
    assert fit_text(text, tokenizer, whole - 1)[1] == text.index("here.") + 5
    assert fit_text("word " * 500, tokenizer, 100)[1] % 5 == 4
    assert text[: cut_point(text, 30)] == "One short sentence."


@pytest.mark.parametrize(
    ("text", "limit", "kept"),
    [
        ("A b. C d e", 8, "A b."),
        ('He said "no." Then', 15, 'He said "no."'),
        ("A line\nand more", 12, "A line"),
        ("第一句。第二句很长", 7, "第一句。"),
        ("alpha beta gamma", 12, "alpha beta"),
        ("alpha beta gamma", 10, "alpha beta"),
        ("version 3.11 is", 10, "version"),
        ("unbroken", 3, "unb"),
        ("   ", 2, "  "),
        ("x", 0, "x"),
    ],
)
def test_cut_point(text: str, limit: int, kept: str) -> None:
    assert text[: cut_point(text, limit)] == kept


def fits(tokenizer: Tokenizer, text: str, budget: int) -> None:
    start, end = fit_text(text, tokenizer, budget)
    assert start == 0 < end <= len(text)
    assert end == 1 or len(Prompt(tokenizer).start_example(text[:end])) <= budget


@pytest.mark.extra
@given(text=st.text(min_size=1, max_size=400), budget=st.integers(0, 200))
@settings(max_examples=150)
def test_fit_text_never_exceeds_nor_empties(tiny: Tokenizer, mistral: Tokenizer, text: str, budget: int) -> None:
    for tokenizer in (tiny, mistral):
        fits(tokenizer, text, budget)


PIECES = ["<QUE>", "<ANS>", "</END>", " a ", "b", "\n\n", "é你", "<CON>", "\nOptions:\n- x\n- y", "</", "END>"]


@pytest.mark.extra
@given(parts=st.lists(st.sampled_from(PIECES), max_size=30))
@settings(max_examples=300)
def test_kept_tokens_are_the_accepted_pairs(tiny: Tokenizer, mistral: Tokenizer, parts: list[str]) -> None:
    for tokenizer in (tiny, mistral):
        completion = tokenizer.encode("".join(parts), continuing=True)
        text = tokenizer.decode(completion)
        pairs = parse_completion(text, True)
        kept = keep_accepted(tokenizer, completion, pairs)
        accepted = [pair for pair in pairs if pair.accepted]
        assert parse_completion(tokenizer.decode(kept), True) == accepted


@pytest.mark.extra
@given(whole=st.integers(1, 6), tail=st.text("ab <QUE>", max_size=60))
def test_the_fewest_tokens_are_kept(tiny: Tokenizer, mistral: Tokenizer, whole: int, tail: str) -> None:
    text = "\n\n".join(f"<QUE> a{number} <ANS> b </END>" for number in range(whole)) + f"\n\n<QUE> {tail}"
    for tokenizer in (tiny, mistral):
        ids = tokenizer.encode(text, continuing=True)
        fewest = next(n for n in range(len(ids)) if tokenizer.decode(ids[:n]).count("</END>") == whole)
        assert keep_accepted(tokenizer, ids, parse_completion(text, False)) == ids[:fewest]


@pytest.mark.parametrize("build", [lambda n: "A sentence. " * (n // 12), lambda n: "x" * n, lambda n: "\n" * n])
def test_a_text_longer_than_any_budget(tiny: Tokenizer, build: Callable[[int], str]) -> None:
    fits(tiny, build(200_000), 64)
