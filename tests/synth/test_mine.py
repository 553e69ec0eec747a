"""`synth mine`: what each rule asks of a text, and that its groups are as `synth run` writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any, get_args

import pytest
from extras import shared
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from synthkit import damage_shard, shard_bytes, write_corpus

from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import check_settings
from ipt_jax.corpus.records import Pair
from ipt_jax.corpus.shards import read_documents
from synth import read_groups
from synth.collect.data_sets import read_back
from synth.format.parser import parse_completion
from synth.format.wire import pairs_text
from synth.mine.patterns import FINDERS, RELATIONS, Find, Pattern, ask, load_templates, read
from synth.mine.run import MineSettings, run_mine
from synth.render.documents import RenderSettings
from synth.render.run import run_render

TEXT = """The mill of Hollow Creek

The mill is a building in which grain is ground into flour. Anna stayed in the village because the river had taken
the only bridge. The water of the creek was high all spring. However, the miller did not stop the great wheel. In other
words, he worked against the advice of all his neighbours. The village council met in the evening and asked Boris to
repair the bridge at once. Boris asked the council for three strong horses and a cart.""".replace(
    "\nthe only", " the only"
)
TEXT = re.sub(r"(?<!\n)\n(?!\n)", " ", TEXT)


def finds(pattern: Pattern, text: str = TEXT, seed: int = 0) -> list[Find]:
    return list(FINDERS[pattern](read(text), Random(seed)))


def test_definition() -> None:
    assert finds("definition") == [Find("free", {"term": "mill"}, "A building in which grain is ground into flour.")]
    assert finds("definition", "It is a building in which grain is ground into flour.") == []


def test_title() -> None:
    assert finds("title") == [Find("free", {}, "The mill of Hollow Creek")]
    assert finds("title", TEXT.partition("\n\n")[2]) == []


def test_connectives() -> None:
    first, second = "The water of the creek was high all spring.", "The miller did not stop the great wheel."
    found = {find.variant: find for seed in range(9) for find in finds("connective", seed=seed)}
    effect, cause = "Anna stayed in the village", "the river had taken the only bridge"
    assert found["cause"] == Find("cause", {"effect": effect}, f"Because {cause}.")
    assert found["effect"] == Find("effect", {"cause": "The" + cause[3:]}, f"{effect}.")
    assert found["relation"].fields == {"first": first, "second": second}
    assert found["relation"].answer == "It goes against the first." and set(found["relation"].options) == set(RELATIONS)


def test_paraphrase_and_completion() -> None:
    told = "He worked against the advice of all his neighbours."
    assert [find.answer for find in finds("paraphrase")] == [told]
    going_on = {find.fields["first"]: find.answer for find in finds("completion")}
    last = "Boris asked the council for three strong horses and a cart."
    assert going_on["The village council met in the evening and asked Boris to repair the bridge at once."] == last
    assert last not in going_on


def test_summary_names_the_title_or_the_first_sentence() -> None:
    assert [find.answer for find in finds("summary") if find.variant == "free"] == ["The mill of Hollow Creek"]
    body = TEXT.partition("\n\n")[2]
    (first, *_) = [find.answer for find in finds("summary", body) if find.variant == "free"]
    assert first == "The mill is a building in which grain is ground into flour."


@pytest.mark.parametrize("seed", range(20))
def test_cloze_and_words_come_from_one_sentence(seed: int) -> None:
    for find in finds("cloze", seed=seed):
        assert find.fields["sentence"].count("____") == 1
        assert find.fields["sentence"].replace("____", find.answer) in TEXT
        assert not find.options or (len(set(find.options)) == 4 and find.answer in find.options)
        assert all(option in TEXT for option in find.options)
    for find in finds("words", seed=seed):
        assert find.answer in TEXT and all(word in find.answer for word in find.fields["words"].split(", "))


def test_templates_are_many_different_and_ask_for_what_rules_find() -> None:
    templates = load_templates()
    wordings = [one for many in templates.values() for one in many]
    assert len(set(wordings)) == len(wordings) and all(len(many) >= 5 for many in templates.values())
    assert {name.partition(".")[0] for name in templates} == set(get_args(Pattern)) == set(FINDERS)
    for pattern in FINDERS:
        for find in finds(pattern):
            for seed in range(20):
                assert read_back(ask(pattern, find, Random(seed))).accepted


SPOILED = st.lists(
    st.sampled_from(
        [
            *(
                "<QUE> ",
                " <ANS> ",
                " </END>",
                "</CON> ",
                "\nOptions:",
                "\n- ",
                "\nLet's think step by step.",
                "(",
                "____",
            ),
            *(" because ", "However, ", "In other words, ", "The mill is a house.", ". ", "\n\n", "{sentence}", "水。"),
            *(
                "Anna walks the old river and sees the green mill.",
                "The Boat",
                "3,000 stones ",
                " is called the Wheel of",
            ),
        ]
    ),
    max_size=25,
).map("".join)


@given(SPOILED, st.integers(0, 3))
@hypothesis_settings(max_examples=300, deadline=None)
def test_nothing_that_a_text_spells_forges_a_pair(text: str, seed: int) -> None:
    pairs = [ask(pattern, find, Random(seed)) for pattern in FINDERS for find in finds(pattern, text, seed)]
    for pair in pairs:
        read = read_back(pair)
        assert not read.accepted or read == pair


# ---- the stage


def mine(folder: Path, **fields: Any) -> dict[str, Any]:
    recipe = {"corpus": {"path": str(folder / "corpus.jsonl")}, "output": str(folder / "mined"), "workers": 1}
    return run_mine(check_settings(MineSettings, {**recipe, **fields}, where="recipe"))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_groups_are_as_synth_run_writes_them(tmp_path: Path) -> None:
    texts = rows(write_corpus(tmp_path / "corpus.jsonl", 31))
    result = mine(tmp_path, rounds=3)
    groups = list(read_groups(tmp_path / "mined"))
    told = [text for group in groups for text in group.texts]
    assert [(text.raw_id, text.text, text.start, text.end) for text in told] == [
        (row["id"], row["text"], 0, len(row["text"])) for row in texts
    ]
    assert [len(group.texts) for group in groups] == [3] * 10 + [1]
    assert {group.synthesizer for group in groups} == {"mine"} and len({group.id for group in groups}) == 11
    pairs = [pair for text in told for pair in text.pairs]
    accepted = [pair for pair in pairs if pair.accepted]
    assert (result["texts"], result["groups"], result["pairs"]) == (31, 11, len(accepted)) and accepted
    assert sum(result["patterns"].values()) == len(accepted)
    assert len(pairs) - len(accepted) == sum(result["rejected"].values())
    for text in told:
        kept = [pair for pair in text.pairs if pair.accepted]
        assert len(text.pairs) <= 5 and parse_completion(pairs_text(kept), finished=True) == kept


def test_by_source_and_fraction_as_synth_run(tmp_path: Path) -> None:
    from synthkit import settings as run_settings

    from synth.generate.run import run_synth

    recipe = run_settings(tmp_path, corpus={"path": str(tmp_path / "corpus.jsonl"), "fraction": 0.5})
    run_synth(recipe)
    mine(tmp_path, corpus={"path": str(tmp_path / "corpus.jsonl"), "fraction": 0.5}, grouping="source")
    mined = [[text for text in group.texts] for group in read_groups(tmp_path / "mined")]
    assert all(len({text.source for text in texts}) == 1 for texts in mined)
    synthesized = {text.raw_id for group in read_groups(tmp_path / "groups") for text in group.texts}
    assert {text.raw_id for texts in mined for text in texts} == synthesized and 5 < len(synthesized) < 25


def test_pairs_depend_on_seed_and_text_alone(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", 20)

    def pairs(**fields: Any) -> dict[str, list[Pair]]:
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        mine(tmp_path, output=str(output), **fields)
        return {text.raw_id: text.pairs for group in read_groups(output) for text in group.texts}

    first = pairs()
    assert pairs(seed=1) != first
    lines = (tmp_path / "corpus.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "corpus.jsonl").write_text("".join(reversed(lines[5:])))
    assert pairs(rounds=1) == {name: told for name, told in first.items() if int(name[1:]) >= 5}


def test_a_second_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(3):
        write_corpus(tmp_path / "corpus" / f"{number}.jsonl", 10, seed=number)
    corpus = {"path": str(tmp_path / "corpus"), "id": None}  # the ids of each file begin at t0
    first = mine(tmp_path, corpus=corpus)
    shards = shard_bytes(tmp_path / "mined")
    assert len(shards) == 3
    sorted((tmp_path / "mined").glob("*.array_record"))[1].unlink()
    damage_shard(tmp_path / "mined", 0)
    second = mine(tmp_path, corpus=corpus, workers=2)
    assert shard_bytes(tmp_path / "mined") == shards
    assert {**second, "seconds": 0} == {**first, "seconds": 0}
    with pytest.raises(UserError, match="max_pairs=5, now 4"):
        mine(tmp_path, corpus=corpus, max_pairs=4)


def test_tags_in_a_text_are_counted(tmp_path: Path) -> None:
    text = "Anna said <QUE> and the old miller <ANS> laughed at her </END> all day long. " * 4
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": "t", "text": text}) + "\n")
    result = mine(tmp_path, patterns=["completion"])
    assert result["pairs"] == 0 and sum(result["rejected"].values()) == 2 and result["texts_without_pairs"] == 1


def test_mistakes_are_told(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", 3)
    with pytest.raises(UserError, match="duplicate pattern title"):
        mine(tmp_path, patterns=["title", "title"])
    with pytest.raises(UserError, match="no text to convert"):
        mine(tmp_path, corpus={"path": str(tmp_path / "corpus.jsonl"), "fraction": 1e-9})
    assert not (tmp_path / "mined").exists()


def test_real_texts_give_pairs_and_render(tmp_path: Path) -> None:
    corpus = {"path": str(shared("data/pubmedqa/part1.jsonl")), "text": "context"}
    result = mine(tmp_path, corpus=corpus)
    assert result["texts"] == 500 and result["texts_without_pairs"] <= 5 and result["pairs"] >= 2000
    run_render(RenderSettings(groups=str(tmp_path / "mined"), output=str(tmp_path / "augmented")))
    assert sum(document.kind == "augmented" for document in read_documents(tmp_path / "augmented")) == 250
