"""The mini-world: its wordings, what is held out, that equal settings give equal bytes, and the judge."""

from __future__ import annotations

import json
import string
from collections import Counter
from pathlib import Path

import pytest
from extras import need
from hypothesis import given
from hypothesis import strategies as st

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.tokenizer import load_tokenizer
from synth.format.wire import ANSWER_CUE, wire_pair
from synth.miniworld import World, judge, open_world, run_miniworld
from synth.miniworld.articles import write_article
from synth.miniworld.questions import parse_question
from synth.miniworld.world import (
    KINDS,
    PROVINCE,
    Entity,
    Fact,
    answer_words,
    attributes,
    closed_values,
    name_words,
    province_entities,
    scramble,
    words,
)

SMALL = {"articles": 120, "tuning_articles": 80, "instructions": 40, "questions": 30, "tokenizer_size": 2000}
WORLD = World(seed=0, articles=120, entities=60, tuning_articles=80)
FACTS = [(kind, attribute) for kind in KINDS for attribute in attributes(kind)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("world")
    run_miniworld(output, **SMALL)
    return output


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tuning_rows(made: Path) -> list[dict]:
    return [row for path in sorted((made / "tuning").iterdir()) for row in rows(path)]


@pytest.mark.parametrize(("kind", "attribute"), FACTS)
def test_each_fact_has_eight_wordings_and_two_questions(kind: str, attribute: str) -> None:
    fact = words()[kind][attribute]
    assert len(set(fact["say"])) == len(fact["say"]) >= 8
    assert len(set(fact["ask"])) == 2
    for wording in fact["say"]:
        fields = sorted(name for _, name, _, _ in string.Formatter().parse(wording) if name)
        assert fields == ["e", "v"] and not wording.endswith(".") and not wording[0].isupper(), wording
        assert wording.index("{e}") < wording.index("{v}"), wording
    assert fact["type"] in (*KINDS, "emblem", "year", *words()["values"])


def test_no_wording_stands_twice_within_a_kind() -> None:
    for kind in KINDS:
        said = Counter(wording for fact in words()[kind].values() for wording in fact["say"] + fact["ask"])
        doubled = [wording for wording, count in said.items() if count > 1]
        assert doubled == []


def test_value_lists_and_parts_of_names_hold_no_doubles() -> None:
    for values in words()["values"].values():
        assert len(set(values)) == len(values)
    assert len(set(name_words())) == len(name_words()) == 384
    assert all(len(set(words()["nouns"][kind])) == 16 for kind in KINDS)


def test_large_worlds_get_longer_names_and_no_two_are_equal() -> None:
    provinces = [*range(300), *range(1536, 1836), *range(600_000, 600_300)]
    for kind in KINDS:
        names = {WORLD.name(Entity(kind, province, slot)) for province in provinces for slot in range(4)}
        assert len(names) == 3600


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_scrambling_is_a_bijection(size: int, key: int) -> None:
    assert sorted(scramble(number, size, key) for number in range(size)) == list(range(size))


def test_relations_stay_in_the_province_and_never_lead_home() -> None:
    for province in range(20):
        for entity in province_entities(province):
            for attribute in attributes(entity.kind):
                target = WORLD.target(Fact(entity, attribute))
                assert target is None or (target.province == province and target != entity)


def test_an_article_follows_from_its_own_number_alone() -> None:
    longer = World(seed=0, articles=100_000, entities=60, tuning_articles=5)
    assert write_article(longer, "article", 7) == write_article(WORLD, "article", 7)
    assert write_article(World(1, 120, 60, 80), "article", 7).text != write_article(WORLD, "article", 7).text


def test_repeated_visits_tell_every_fact() -> None:
    world = World(seed=3, articles=400, entities=40, tuning_articles=1)
    told = {sentence.fact for index in range(400) for sentence in write_article(world, "article", index).sentences}
    everything = {Fact(e, name) for p in (0, 1) for e in province_entities(p) for name in attributes(e.kind)}
    assert told == everything


def test_articles_are_short_and_tell_three_facts_of_several_entities() -> None:
    articles = [write_article(WORLD, "article", index) for index in range(120)]
    assert {len(article.sentences) for article in articles} == {3}
    assert all(len({sentence.fact.entity for sentence in article.sentences}) >= 2 for article in articles)
    assert all(25 <= len(article.text.split()) <= 130 for article in articles)


def test_figures_and_files(made: Path) -> None:
    figures = run_miniworld(made, **SMALL)  # complete: read back, nothing written
    raw, kept = rows(made / "raw/articles.jsonl"), rows(made / "raw/heldout.jsonl")
    assert figures["articles"] == len(raw) + len(kept) == 120 and figures["heldout_articles"] == len(kept) == 40
    assert figures["entities"] == 60 and figures["questions"] == 30 == len(rows(made / "heldout/answers.jsonl"))
    assert figures["pairs"] == sum(len(row["qa"]) for row in tuning_rows(made))
    assert len(rows(made / "instructions.jsonl")) == 40


def test_tuning_pairs_are_right_and_stand_in_their_context_in_all_four_formats(made: Path) -> None:
    world, formats = open_world(made), Counter()
    for row in tuning_rows(made):
        for entry in row["qa"]:
            pair = wire_pair(**entry)
            formats[pair.format] += 1
            assert entry["answer"] in row["context"] and judge(world, row["id"], pair.question, pair.answer) == "right"
            assert entry["answer"] in entry.get("options", [entry["answer"]])
            assert entry.get("rationale", "") in row["context"]
    assert set(formats) == {"free", "choice", "free_cot", "choice_cot"}


def test_held_out_entities_have_articles_but_no_pairs(made: Path) -> None:
    world = open_world(made)
    held = {world.name(entity) for entity in province_entities(2)}  # the last of three raw provinces
    told = (made / "raw/heldout.jsonl").read_text()
    elsewhere = (made / "raw/articles.jsonl").read_text() + "".join(p.read_text() for p in (made / "tuning").iterdir())
    assert all(name in told and name not in elsewhere for name in held)
    for question, answer in zip(
        rows(made / "heldout/questions.jsonl"), rows(made / "heldout/answers.jsonl"), strict=True
    ):
        asked = question["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
        fact = parse_question(world, 2, asked)
        assert fact is not None and len(set(question["choices"])) == 4
        assert (
            question["choices"][question["gold"]] == answer["answer"] == world.value(fact) and answer["answer"] in told
        )


def test_equal_settings_give_equal_bytes(made: Path, tmp_path: Path) -> None:
    run_miniworld(tmp_path, **SMALL)
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((made / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)


def test_other_settings_and_foreign_directories_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"made with seed=0, now 1; use another output"):
        run_miniworld(made, **SMALL, seed=1)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"contains 'thesis.tex' but no world.json"):
        run_miniworld(tmp_path, **SMALL)
    with pytest.raises(UserError, match="synth miniworld wrote"):
        open_world(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"articles": 0}, "articles is 0; set it to at least 1"),
        ({"articles": 2, "entities": 200}, "200 entities need at least 10 articles"),
        ({"tuning_articles": -1}, "tuning_articles is -1; set it to at least 1"),
    ],
)
def test_impossible_worlds_are_refused(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_miniworld(tmp_path / "world", **{**SMALL, **settings})
    assert not (tmp_path / "world").exists()


def test_tokenizer_round_trips_and_keeps_tags_whole(made: Path) -> None:
    tokenizer = load_tokenizer(made / "tokenizer")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2) and tokenizer.vocab_size <= SMALL["tokenizer_size"]
    for whole in (" <CON>", " </CON>", "<QUE>", " <ANS>", " </END>", "\n\n", *(f" {word}" for word in answer_words())):
        assert len(tokenizer.encode(whole)) == 1, whole
    for text in (rows(made / "raw/articles.jsonl")[0]["text"], "  naïve\t<s>\n\n\n中 x ", "</CON><QUE>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.extra
def test_transformers_opens_the_tokenizer(made: Path) -> None:
    auto = need("transformers", extra="test").AutoTokenizer
    tokenizer = auto.from_pretrained(made / "tokenizer")
    text = rows(made / "raw/articles.jsonl")[0]["text"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == load_tokenizer(made / "tokenizer").encode(text)


class TestJudge:
    """Literal cases about article 0, which lies in province 0."""

    person = Entity("person", 0, 0)
    name = WORLD.name(person)
    trade = WORLD.value(Fact(person, "trade"))
    other = closed_values("trade")[closed_values("trade").index(trade) - 1]
    question = f"What is the trade of {name}?"

    def verdict(self, question: str, answer: str) -> str:
        return judge(WORLD, "article-000000", question, answer)

    def test_free_form(self) -> None:
        assert self.verdict(self.question, self.trade) == "right"
        assert self.verdict(self.question, f" {self.trade}.") == "right"
        assert self.verdict(self.question, self.other) == "wrong"
        assert self.verdict(f"What does {self.name} do for a living?", self.trade) == "right"

    def test_options_must_hold_the_answer(self) -> None:
        offered = f"{self.question}\nOptions:\n- {self.other}\n- {self.trade}"
        assert self.verdict(offered, self.trade) == "right"
        assert self.verdict(offered, self.other) == "wrong"
        assert self.verdict(f"{self.question}\nOptions:\n- {self.other}\n- smithy", self.trade) == "wrong"

    def test_reasoning_is_judged_by_its_final_answer(self) -> None:
        cued = f"{self.question}\nLet's think step by step."
        assert self.verdict(cued, f"It says {self.other}.{ANSWER_CUE}{self.trade}") == "right"
        assert self.verdict(cued, f"It says {self.trade}.{ANSWER_CUE}{self.other}") == "wrong"

    def test_names_may_carry_their_article(self) -> None:
        guild = WORLD.value(Fact(self.person, "member_of"))
        assert self.verdict(f"Which guild does {self.name} belong to?", f"the {guild}") == "right"

    def test_what_no_template_asks_is_unknown(self) -> None:
        stranger = WORLD.name(Entity("person", 1, 0))
        for question in (f"How tall is {self.name}?", f"What is the trade of {stranger}?", "", self.question[:-1]):
            assert self.verdict(question, self.trade) == "unknown_question"

    @pytest.mark.parametrize("article", ["article-000120", "tuning-000080", "article-x", "other-000000", ""])
    def test_unknown_articles_are_refused(self, article: str) -> None:
        with pytest.raises(UserError, match="not an article of this world"):
            judge(WORLD, article, self.question, self.trade)


def test_every_question_form_is_read_back_to_its_fact() -> None:
    for entity in province_entities(0):
        for attribute in attributes(entity.kind):
            for form in words()[entity.kind][attribute]["ask"]:
                assert parse_question(WORLD, 0, form.format(e=WORLD.name(entity))) == Fact(entity, attribute)


def test_entities_are_rounded_up_to_whole_provinces() -> None:
    assert [World(0, 100, count, 1).provinces * PROVINCE for count in (1, 40, 41)] == [40, 40, 60]
