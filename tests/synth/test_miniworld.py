"""The mini-world: its wordings, what is held out, that equal settings give equal bytes, and the judge."""

from __future__ import annotations

import json
import re
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
from synth.miniworld.questions import TASKS, parse_question
from synth.miniworld.world import (
    NAME_WORDS,
    Fact,
    answer_words,
    attributes,
    invented_words,
    scramble,
    values,
    words,
    write_article,
)

SMALL = {
    "articles": 120,
    "people": 20,
    "tuning_articles": 80,
    "instructions": 40,
    "questions": 30,
    "tokenizer_size": 2000,
}
WORLD = World(seed=0, articles=120, people=20, tuning_articles=80)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("world")
    run_miniworld(output, **SMALL)
    return output


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tuning_rows(made: Path) -> list[dict]:
    return [row for path in sorted((made / "tuning").iterdir()) for row in rows(path)]


@pytest.mark.parametrize("attribute", attributes())
def test_each_fact_has_nine_wordings_and_questions(attribute: str) -> None:
    fact = words()["facts"][attribute]
    assert len(set(fact["say"])) == len(fact["say"]) == 9
    assert len({*fact["ask"], fact["rephrased"]}) == (1 if attribute == "good" else 3)
    for wording in fact["say"]:
        fields = sorted(name for _, name, _, _ in string.Formatter().parse(wording) if name)
        assert fields == ["e", "v"] and not wording.endswith(".") and not wording[0].isupper(), wording
        assert wording.index("{e}") < wording.index("{v}"), wording
    assert len(set(values(attribute))) == 32


def test_no_wording_occurs_twice() -> None:
    facts = words()["facts"].values()
    said = Counter(wording for fact in facts for wording in [*fact["say"], *fact["ask"], fact["rephrased"]])
    assert [wording for wording, count in said.items() if count > 1] == []


def test_invented_words_are_distinct_and_none_is_both_a_name_and_a_value() -> None:
    assert len(set(invented_words())) == len(invented_words()) == 384
    assert not {*invented_words()[: 2 * NAME_WORDS]} & {value for name in attributes() for value in values(name)}


def test_large_worlds_get_longer_names_and_no_two_are_equal() -> None:
    people = [*range(4000), *range(8000, 9000), *range(600_000, 601_000)]
    names = [WORLD.name(person) for person in people]
    assert len(set(names)) == 6000
    assert {len(name.split()) for name in names[:4000]} == {2} and {len(name.split()) for name in names[-1000:]} == {3}


def test_tuning_people_have_names_of_their_own() -> None:
    raw = {WORLD.name(person) for person in range(8192)}
    assert not raw & {WORLD.name(-1 - person) for person in range(3000)}


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_scrambling_is_a_bijection(size: int, key: int) -> None:
    assert sorted(scramble(number, size, key) for number in range(size)) == list(range(size))


@pytest.mark.parametrize(("paired", "held"), [(0.5, 200), (0.8, 80), (0.05, 380), (0.95, 20)])
def test_held_out_people_are_spread_evenly(paired: float, held: int) -> None:
    world = World(0, 400, 400, 1, paired)
    places = [person for person in range(400) if world.held_out(person)]
    assert len(places) == held
    assert all(abs(sum(place < end for place in places) - end * held / 400) <= 1 for end in range(0, 401, 20))


def test_values_of_two_facts_are_independent() -> None:
    together = Counter((WORLD.value(Fact(p, "trade")), WORLD.value(Fact(p, "prize"))) for p in range(20_000))
    assert len(together) == 32 * 32 and max(together.values()) < 60  # 19.5 expected


def test_an_article_follows_from_its_own_number_alone() -> None:
    longer = World(seed=0, articles=100_000, people=20, tuning_articles=5)
    assert write_article(longer, "article", 7) == write_article(WORLD, "article", 7)
    assert write_article(World(1, 120, 20, 80), "article", 7).text != write_article(WORLD, "article", 7).text


def test_an_article_states_every_fact_of_one_person_in_an_order_of_its_own() -> None:
    orders = set()
    for index in range(120):
        article = write_article(WORLD, "article", index)
        person, name = index % 20, WORLD.name(index % 20)
        assert sorted(sentence.fact for sentence in article.sentences) == sorted(Fact(person, a) for a in attributes())
        assert all(name in text and WORLD.value(fact) in text for fact, text in article.sentences)
        assert 35 <= len(article.text.split()) <= 90
        orders.add(tuple(sentence.fact.attribute for sentence in article.sentences))
    assert len(orders) > 90


def test_figures_and_files(made: Path) -> None:
    figures = run_miniworld(made, **SMALL)  # complete: read back, nothing written
    raw, kept, gold = (rows(made / f"{name}.jsonl") for name in ("raw/articles", "raw/heldout", "gold/articles"))
    assert (figures["articles"], len(raw), len(kept), figures["heldout_articles"]) == (120, 60, 60, 60)
    assert [(row["id"], row["context"]) for row in gold] == [(row["id"], row["text"]) for row in raw]
    assert {len(row["qa"]) for row in gold} == {5}
    counts = {name: len(rows(made / f"heldout/{name}.jsonl")) for name in TASKS}
    assert counts == {"recall": 30, "rephrased": 30, "control": 30, "seen": 30, "reading": 30, "new_kind": 10}
    assert figures["people"] == 20 and figures["questions"] == 160
    assert figures["pairs"] == sum(len(row["qa"]) for row in tuning_rows(made)) == 80 * 3.5
    assert len(rows(made / "instructions.jsonl")) == 40


def test_pairs_are_right_and_their_answers_are_in_the_context_in_all_four_formats(made: Path) -> None:
    world, formats = open_world(made), Counter()
    for row in [*tuning_rows(made), *rows(made / "gold/articles.jsonl")]:
        for entry in row["qa"]:
            pair = wire_pair(**entry)
            formats[pair.format] += 1
            assert entry["answer"] in row["context"] and judge(world, row["id"], pair.question, pair.answer) == "right"
            assert entry["answer"] in entry.get("options", [entry["answer"]])
            assert entry.get("rationale", "") in row["context"]
    assert set(formats) == {"free", "choice", "free_cot", "choice_cot"}


def test_held_out_people_have_articles_but_no_pairs(made: Path) -> None:
    world = open_world(made)
    held = {world.name(person) for person in range(20) if world.held_out(person)}
    told = (made / "raw/heldout.jsonl").read_text()
    elsewhere = (made / "raw/articles.jsonl").read_text() + "".join(p.read_text() for p in (made / "tuning").iterdir())
    assert len(held) == 10 and all(name in told and name not in elsewhere for name in held)
    tasks = [rows(made / f"heldout/{name}.jsonl") for name in ("recall", "recall_answers", "control")]
    for row, answer, control in zip(*tasks, strict=True):
        question = row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
        (fact,) = [found for p in range(20) if world.held_out(p) and (found := parse_question(world, p, question))]
        assert len(set(row["choices"])) == 10 and {*row["choices"]} <= {*values(fact.attribute)}
        assert row["choices"][row["gold"]] == answer["answer"] == world.value(fact)
        assert {**control, "gold": row["gold"]} == row and control["gold"] != row["gold"]


def test_held_out_tasks_ask_what_training_lacks(made: Path) -> None:
    world = open_world(made)
    training = "".join(p.read_text() for folder in ("tuning", "gold") for p in (made / folder).iterdir())
    for attribute in attributes():
        before, after = words()["facts"][attribute]["rephrased"].split("{e}")
        assert not re.search(f"{re.escape(before)}[A-Z][a-z]+ [A-Z][a-z]+{re.escape(after)}", training)
    assert all("fond of?" in row["prompt"] for row in rows(made / "heldout/new_kind.jsonl"))
    raw = (made / "raw/articles.jsonl").read_text() + (made / "raw/heldout.jsonl").read_text() + training
    for row in rows(made / "heldout/reading.jsonl"):
        text, question = row["prompt"].split("\n\n")
        assert row["choices"][row["gold"]] in text and text.split(". ")[-1] not in raw and "Question: " in question
    seen = {world.name(person) for person in range(20) if not world.held_out(person)}
    assert all(any(name in row["prompt"] for name in seen) for row in rows(made / "heldout/seen.jsonl"))


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
        ({"articles": 0}, "articles is 0; set it to at least 2"),
        ({"articles": 2, "people": 200}, "200 people need as many articles, got 2"),
        ({"tuning_articles": -1}, "tuning_articles is -1; set it to at least 1"),
        ({"paired": 1.0}, r"paired is 1\.0; set a share between 0 and 1"),
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
    """Literal cases about article 0, which is about person 0."""

    name = WORLD.name(0)
    trade = WORLD.value(Fact(0, "trade"))
    other = values("trade")[values("trade").index(trade) - 1]
    question = f"What is the trade of {name}?"

    def verdict(self, question: str, answer: str) -> str:
        return judge(WORLD, "article-000000", question, answer)

    def test_free_form(self) -> None:
        assert self.verdict(self.question, self.trade) == "right"
        assert self.verdict(self.question, f" the {self.trade}.") == "right"
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

    def test_what_no_template_asks_is_unknown(self) -> None:
        for question in (f"How tall is {self.name}?", f"What is the trade of {WORLD.name(1)}?", "", self.question[:-1]):
            assert self.verdict(question, self.trade) == "unknown_question"

    @pytest.mark.parametrize("article", ["article-000120", "tuning-000080", "article-x", "other-000000", ""])
    def test_unknown_articles_are_refused(self, article: str) -> None:
        with pytest.raises(UserError, match="not an article of this world"):
            judge(WORLD, article, self.question, self.trade)


def test_every_question_form_is_read_back_to_its_fact() -> None:
    for attribute in attributes():
        for form in (*words()["facts"][attribute]["ask"], words()["facts"][attribute]["rephrased"]):
            assert parse_question(WORLD, 3, form.format(e=WORLD.name(3))) == Fact(3, attribute)
