"""`synth run`: prompts to the token, spans, budgets, faults that are counted, and what a second run does."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from synthkit import BOS, EOS, damage_shard, groups_of, recipe, settings, shard_bytes, write_corpus, write_tokenizer

from ipt_jax.core.errors import UserError
from ipt_jax.core.manifest import Manifest
from ipt_jax.core.settings import check_settings
from ipt_jax.corpus.records import Document, Segment, SynthGroup
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth import read_groups
from synth.config import RunSettings, SynthesizerSettings
from synth.engine.base import Completion, GenerationRequest, RequestFailed
from synth.generate.few_shot import Chain
from synth.generate.run import run_synth, summarize
from synth.groups import make_group


class Recorder:
    """An engine that answers from a list and remembers what it was asked."""

    def __init__(self, tokenizer: Tokenizer, answers: list[str | None]) -> None:
        self.tokenizer, self.answers, self.prompts = tokenizer, answers, list[list[int]]()

    async def generate(self, request: GenerationRequest) -> Completion:
        self.prompts.append(request.prompt_ids)
        answer = self.answers.pop(0)
        if answer is None:
            raise RequestFailed("on purpose")
        return Completion(self.tokenizer.encode(answer, continuing=True), "stop", len(request.prompt_ids), 0)

    async def close(self) -> None: ...


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path / "model"))


def answer_group(
    tokenizer: Tokenizer,
    answers: list[str | None],
    texts: list[str],
    examples: list[list[int]] | None = None,
    **fields: int,
) -> tuple[SynthGroup, list[list[int]]]:
    """The group that these answers make of these texts, and the prompts that were asked."""
    lengths = {"max_model_len": 1000, "max_new_tokens": 200, **fields}
    synthesizer = SynthesizerSettings(model="m", engine="scripted", **lengths)
    chain = Chain(synthesizer, tokenizer, 0, examples or [], "m", "w", "f")
    documents = [Document(f"t{number}", "s", "raw", [Segment(text)]) for number, text in enumerate(texts)]
    engine = Recorder(tokenizer, answers)
    return asyncio.run(chain.run(engine, make_group(0, documents))), engine.prompts


def test_next_prompt_goes_on_from_the_last_tokens(tokenizer: Tokenizer) -> None:
    first = "<QUE> a? <ANS> b </END>"
    group, prompts = answer_group(tokenizer, [f"{first}\n\n<QUE> cut", ""], ["one", "two"])
    encode = tokenizer.encode
    assert prompts[0] == [BOS, *encode(" <CON> one </CON>\n\n")]
    assert prompts[1] == [*prompts[0], *encode(first), EOS, BOS, *encode(" <CON> two </CON>\n\n")]
    assert [pair.verdict for pair in group.texts[0].pairs] == ["accepted", "rejected"]
    assert group.meta["cache_lost_tokens"] == 0
    assert [text.round for text in group.texts] == [1, 2]


def test_rejected_pair_inside_is_cut_out_and_the_loss_counted(tokenizer: Tokenizer) -> None:
    one, bad, two = "<QUE> a? <ANS> b </END>", "<QUE> no answer </END>", "<QUE> c? <ANS> d </END>"
    group, prompts = answer_group(tokenizer, ["\n\n".join([one, bad, two]), ""], ["one", "two"])
    kept = tokenizer.encode(f"{one}\n\n{two}")
    assert prompts[1][: len(prompts[0]) + len(kept) + 1] == [*prompts[0], *kept, EOS]
    # 'a? <ANS> b </END>\n\n<QUE> ' is common to both; from 'c' against 'n' on the cache is of no use.
    assert group.meta["cache_lost_tokens"] == len(two) - len("<QUE> ")


def test_text_without_pairs_is_not_shown_to_the_next(tokenizer: Tokenizer) -> None:
    _, prompts = answer_group(tokenizer, ["", ""], ["one", "two"])
    assert prompts[1] == [BOS, *tokenizer.encode(" <CON> two </CON>\n\n")]


def test_oldest_examples_are_dropped_first(tokenizer: Tokenizer) -> None:
    pair = "<QUE> a? <ANS> b </END>"
    texts = ["x" * 40, "y" * 40, "z" * 40]
    group, prompts = answer_group(tokenizer, [pair, pair, pair], texts, max_model_len=370, max_new_tokens=200)
    start = [[BOS, *tokenizer.encode(f" <CON> {text} </CON>\n\n")] for text in texts]
    assert prompts[1] == [*start[0], *tokenizer.encode(pair), EOS, *start[1]]  # 83 + 58 tokens of 170
    assert prompts[2] == [*start[1], *tokenizer.encode(pair), EOS, *start[2]]  # 83 more would be 224
    assert group.meta["examples_dropped"] == 1


def test_seed_examples_stand_first(tokenizer: Tokenizer) -> None:
    seed = [BOS, 50, 51, EOS]
    _, prompts = answer_group(tokenizer, ["<QUE> a? <ANS> b </END>", ""], ["one", "two"], examples=[seed])
    assert prompts[0] == [*seed, BOS, *tokenizer.encode(" <CON> one </CON>\n\n")]
    assert prompts[1][: len(prompts[0])] == prompts[0]


def test_long_text_is_cut_at_a_sentence_and_its_span_kept(tokenizer: Tokenizer) -> None:
    text = "One is here. Two is here! Three is here? Four."
    group, prompts = answer_group(tokenizer, [""], [text], max_model_len=250, max_new_tokens=200)
    assert (group.texts[0].start, group.texts[0].end, group.texts[0].text) == (0, 25, "One is here. Two is here!")
    assert len(prompts[0]) <= 50
    assert group.meta["texts_cut"] == 1


def test_failed_requests_are_tried_again_then_counted(tokenizer: Tokenizer) -> None:
    pair = "<QUE> a? <ANS> b </END>"
    group, prompts = answer_group(tokenizer, [None, None, pair, None, None, None], ["one", "two"])
    assert len(prompts) == 6
    assert [text.finish_reason for text in group.texts] == ["stop", "error"]
    assert [len(text.pairs) for text in group.texts] == [1, 0]


ANSWERS = [
    "<QUE> a? <ANS> b </END>",
    "<QUE> no answer </END>",
    "<QUE> cut",
    "\n\n",
    "<QUE> cc? <ANS> dd </END>",
    "z" * 50,
]


@given(
    st.lists(st.text("ab .\n你", max_size=150).filter(str.strip), min_size=1, max_size=5),
    st.lists(st.lists(st.sampled_from(ANSWERS), max_size=4), min_size=5, max_size=5),
)
@hypothesis_settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_prompt_fits_and_goes_on_from_kept_tokens(
    tokenizer: Tokenizer, texts: list[str], answers: list[list[str]]
) -> None:
    written = [" ".join(parts) for parts in answers]
    group, prompts = answer_group(tokenizer, list(written), texts, max_model_len=400, max_new_tokens=200)
    assert [text.raw_id for text in group.texts] == [f"t{number}" for number in range(len(texts))]
    for text, prompt, raw in zip(group.texts, prompts, texts, strict=True):
        assert len(prompt) == text.prompt_tokens <= 200
        assert prompt.count(BOS) == prompt.count(EOS) + 1
        assert text.text == raw[text.start : text.end]
        opened = tokenizer.encode(f" <CON> {text.text.strip()} </CON>\n\n")
        assert prompt[len(prompt) - prompt[::-1].index(BOS) :] == opened
        accepted = [pair for pair in text.pairs if pair.accepted]
        assert len({pair.question for pair in accepted}) == len(accepted)


@pytest.mark.parametrize("fault", ["malformed", "truncated"])
def test_faults_are_counted_and_never_thrown(tmp_path: Path, fault: str) -> None:
    result = run_synth(settings(tmp_path, synthesizer__faults={fault: 1.0}))
    assert (result["texts"], result["groups"]) == (30, 10)
    rejected, finished = set(result["rejected"]), result["finished"]
    if fault == "truncated":
        assert finished == {"length": 30} and "truncated" in rejected
    else:
        assert {"no_answer", "two_answers", "no_question", "empty_answer", "leftover_text"} <= rejected
    assert sum(result["rejected"].values()) > 0


def test_figures_are_those_of_the_records(tmp_path: Path) -> None:
    recipe = settings(tmp_path, synthesizer__faults={"malformed": 0.3, "truncated": 0.2, "error": 0.1})
    result = run_synth(recipe)
    texts = [text for group in read_groups(recipe.output) for text in group.texts]
    pairs = [pair for text in texts for pair in text.pairs]
    assert [text.raw_id for text in texts] == [f"t{number}" for number in range(30)]
    assert result["pairs"] == sum(pair.accepted for pair in pairs)
    assert sum(result["rejected"].values()) == sum(not pair.accepted for pair in pairs)
    for name in ("prompt_tokens", "cached_prompt_tokens", "completion_tokens"):
        assert result[name] == sum(getattr(text, name) for text in texts)
    assert 0 < result["cached_prompt_tokens"] < result["prompt_tokens"]
    assert result["engine"] == "scripted" and result["seconds"] > 0


def test_second_run_reads_the_figures_and_does_nothing(tmp_path: Path) -> None:
    recipe = settings(tmp_path)
    first, before = run_synth(recipe), shard_bytes(recipe.output)
    (tmp_path / "other").mkdir()
    again = run_synth(recipe)
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert shard_bytes(recipe.output) == before
    assert len(before) == 4


def test_a_damaged_shard_is_made_again_once_it_is_deleted(tmp_path: Path) -> None:
    recipe = settings(tmp_path)
    run_synth(recipe)
    before = shard_bytes(recipe.output)
    damage_shard(recipe.output, 1)
    with pytest.raises(UserError, match="groups-00001.*; delete this file, then rerun its stage"):
        list(read_groups(recipe.output))
    (Path(recipe.output) / sorted(before)[1]).unlink()
    run_synth(recipe)
    assert shard_bytes(recipe.output) == before
    manifest = Path(recipe.output) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(UserError, match="restore it from a backup, or write to another output"):
        run_synth(recipe)
    assert shard_bytes(recipe.output) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rounds": 2}, "rounds"),
        ({"seed": 1}, "seed"),
        ({"synthesizer__temperature": 0.5}, "synthesizer.temperature"),
        ({"corpus__fraction": 0.5}, "corpus.fraction"),
        ({"groups_per_shard": 4}, "groups_per_shard"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    run_synth(settings(tmp_path))
    with pytest.raises(UserError, match=f"made with {named}="):
        run_synth(settings(tmp_path, **change))


def test_changed_corpus_is_refused_but_speed_settings_are_not(tmp_path: Path) -> None:
    run_synth(settings(tmp_path))
    run_synth(settings(tmp_path, synthesizer__max_num_seqs=9, synthesizer__faults=None))
    write_corpus(tmp_path / "corpus.jsonl", 30, seed=1)
    with pytest.raises(
        UserError,
        match="other files: corpus.jsonl has changed; restore the input, convert new texts with --ext",
    ):
        run_synth(settings(tmp_path))


def test_concurrency_and_latency_change_no_byte(tmp_path: Path) -> None:
    faults = {"malformed": 0.2, "truncated": 0.1}
    one = settings(tmp_path, synthesizer__faults=faults, synthesizer__max_num_seqs=1, output=str(tmp_path / "one"))
    slow = {**faults, "latency_seconds": 0.005}
    many = settings(tmp_path, synthesizer__faults=slow, synthesizer__max_num_seqs=7, output=str(tmp_path / "many"))
    run_synth(one), run_synth(many)
    assert shard_bytes(one.output) == shard_bytes(many.output)


def test_grouping_by_source_and_fraction(tmp_path: Path) -> None:
    by_source = groups_of(settings(tmp_path, grouping="source"))
    assert all(len({text.source for text in group.texts}) == 1 for group in by_source)
    assert sorted(len(group.texts) for group in by_source)[-8:] == [3] * 8
    half = {text.id for group in groups_of(settings(tmp_path, corpus__fraction=0.5)) for text in group.texts}
    most = {text.id for group in groups_of(settings(tmp_path, corpus__fraction=0.8)) for text in group.texts}
    assert 6 <= len(half) <= 24
    assert half < most


def test_group_ids_follow_from_raw_ids(tmp_path: Path) -> None:
    groups = groups_of(settings(tmp_path))
    assert len({group.id for group in groups}) == 10
    assert groups[0].id == make_group(5, groups[0].texts).id


def test_seed_examples_from_a_file(tmp_path: Path) -> None:
    rows = [{"context": f"text {n}", "qa": [{"question": "who?", "answer": str(n)}]} for n in range(9)]
    rows.append({"context": "x" * 2000, "qa": [{"question": "long?", "answer": "yes"}]})
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seeds = {"path": str(tmp_path / "seeds.jsonl"), "count": 2}
    recipe = settings(tmp_path, seed_examples=seeds)
    run_synth(recipe)
    shown = min(text.prompt_tokens - len(text.text) for group in read_groups(recipe.output) for text in group.texts)
    assert shown > 2 * len(" <CON> text 0 </CON>\n\n<QUE> who? <ANS> 0 </END>")
    with pytest.raises(UserError, match="count is 10, but 9 of 10 rows with pairs have at most"):
        run_synth(settings(tmp_path, seed_examples={**seeds, "count": 10}, output=str(tmp_path / "other")))


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"rounds": 0}, "rounds: input should be greater than or equal to 1"),
    ({"synthesizer__max_new_tokens": 2000}, r"max_new_tokens: .*max_model_len \(2000\)"),
    ({"synthesizer__max_new_tokens": 1980}, "leaves a text 3 tokens"),
    ({"synthesizer__model": "/nowhere"}, "no such directory"),
    ({"synthesizer__engine": "vllm"}, r"config\.json"),
    ({"synthesizer__engine": "vllm", "synthesizer__faults": {}}, "faults are for engine: scripted"),
    ({"synthesizer__max_new_token": 3}, "did you mean 'synthesizer.max_new_tokens'"),
    ({"corpus__path": "/nowhere.jsonl"}, "no such file"),
    ({"corpus__fraction": 1e-9}, "no text to convert"),
    ({"seed_examples": {"path": "/nowhere.jsonl"}}, "seed_examples /nowhere.jsonl: no such file"),
    ({"seed_examples": {"path": "corpus.jsonl"}}, "no row has pairs .* line 1: missing question"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[message[:24] for _, message in MISTAKES])
def test_mistakes_are_told_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = recipe(tmp_path, **change)
    with pytest.raises(UserError, match=message) as error:
        run_synth(check_settings(RunSettings, plain, where="recipe"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "groups").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file", "/file: .*/file is not a directory; use another path"),
        ("file/x/y", "/file/x/y: .*/file is not a directory; use another path"),
        ("nowhere", "/nowhere: .*/nowhere is not a directory; use another path"),
        ("occupied", "holds 'other' but no manifest of this project; set an empty directory"),
        ("closed/x", "/closed cannot be written"),
    ],
)
def test_unusable_output_is_told_before_the_corpus_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, message: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to("absent")
    for name in ("occupied", "closed"):
        (tmp_path / name).mkdir()
    (tmp_path / "occupied" / "other").touch()
    run, access = settings(tmp_path, output=str(tmp_path / output)), os.access
    # Permissions do not bind root, who runs many a container's tests.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and access(path, mode))
    monkeypatch.setattr("synth.generate.run.Corpus", None)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        run_synth(run)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_share_of_no_pairs_is_none() -> None:
    manifest = Manifest(1, "synth", "f", {})
    manifest.counts = {"texts": 3}
    assert summarize(manifest, "scripted")["well_formed"] is None
    manifest.counts = {"texts": 3, "pairs": 1, "rejected.no_answer": 3}
    assert summarize(manifest, "scripted")["well_formed"] == 0.25


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ('{"id": 1, "text": "a b"}\n{broken\n', "line 2 is not valid JSON"),
        ('{"id": 1, "text": "a b"}\n{"id": 1, "text": "c d"}\n', "duplicate id '1'"),
        ('{"id": 1}\n', "no field 'text'"),
        ('{"id": 1, "text": " "}\n', "empty_text"),
    ],
)
def test_bad_corpus(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "corpus.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        run_synth(settings(tmp_path))
    assert not (tmp_path / "groups").exists()


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    with (tmp_path / "corpus.jsonl").open("w") as file:
        for number, text in enumerate(["a b", "  ", "c d", None]):
            file.write(json.dumps({"id": number, "text": text}) + "\n")
    assert run_synth(settings(tmp_path))["dropped"] == {"empty_text": 1, "null_text": 1}
