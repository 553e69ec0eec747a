"""`synth eval` from recipe to results: a scripted engine as oracle, kills, failures, existing pairs, a helper."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from synthkit import recipe, shard_bytes, write_tokenizer

from ipt_jax.core.errors import Fault, UserError
from ipt_jax.core.settings import check_settings
from ipt_jax.corpus.records import GroupText, Pair, SynthGroup
from ipt_jax.corpus.tokenizer import load_tokenizer
from synth import read_groups
from synth.config import RunSettings, SynthesizerSettings
from synth.evaluate.quality import LOSS, Helper, show_results
from synth.evaluate.run import EvalSettings, read_answer, run_evaluate
from synth.format.wire import final_answer, question_stem, wire_pair
from synth.generate.run import run_synth
from synth.mine.run import MineSettings, run_mine

TEXTS = 20


def write_rows(path: Path, contexts: dict[str, str], pairs: dict[str, list[Pair]]) -> Path:
    with path.open("w") as file:
        for name, context in contexts.items():
            qa = [
                {
                    "question": question_stem(pair),
                    "answer": final_answer(pair),
                    "options": pair.options or None,
                    "rationale": pair.rationale,
                }
                for pair in pairs[name]
            ]
            file.write(json.dumps({"id": name, "context": context, "qa": qa}) + "\n")
    return path


def write_task(path: Path, texts: int = TEXTS) -> dict[str, str]:
    """Texts in which no word occurs twice, with a gold pair each."""
    rng = Random(3)
    contexts = {
        f"t{place}": " ".join("".join(rng.choices("bdfklmnoprstu", k=7)) for _ in range(16)) for place in range(texts)
    }
    gold = {name: [wire_pair("Why?", "because of rain")] for name in contexts}
    write_rows(path, contexts, gold)
    return contexts


def settings(folder: Path, **changes: Any) -> EvalSettings:
    plain = recipe(folder, texts=1)
    block = plain["synthesizer"] | {"max_new_tokens": 1200} | changes.pop("model", {})
    if not (folder / "task.jsonl").exists():
        write_task(folder / "task.jsonl")
    values = {"synthesizer": block, "tasks": [{"path": str(folder / "task.jsonl")}], "output": str(folder / "out")}
    return check_settings(EvalSettings, values | changes, where="recipe")


def written_pairs(output: str | Path) -> dict[str, list[Pair]]:
    return {text.raw_id: text.accepted_pairs for group in read_groups(output) for text in group.texts}


def test_an_oracle_scores_one_and_swapped_gold_scores_zero(tmp_path: Path) -> None:
    contexts = write_task(tmp_path / "task.jsonl")
    run_evaluate(settings(tmp_path))
    oracle = written_pairs(tmp_path / "out")
    names = list(contexts)
    swapped = {name: oracle[other] for name, other in zip(names, names[1:] + names[:1], strict=True)}
    write_rows(tmp_path / "right.jsonl", contexts, oracle)
    write_rows(tmp_path / "wrong.jsonl", contexts, swapped)
    tasks = [{"path": str(tmp_path / "right.jsonl")}, {"path": str(tmp_path / "wrong.jsonl"), "seen": False}]
    found = run_evaluate(settings(tmp_path, tasks=tasks, output=str(tmp_path / "scored")))
    right, wrong = found["sets"]["right"], found["sets"]["wrong"]
    perfect = ("f1", "exact_match", "well_formed", "pair_f1", "pair_precision", "pair_recall", "rouge_l")
    assert {name: right[name] for name in perfect} == dict.fromkeys(perfect, 1.0)
    assert right["intervals"]["f1"] == [1.0, 1.0]
    assert (wrong["f1"], wrong["exact_match"]) == (0.0, 0.0)
    assert wrong["pair_f1"] < 0.6  # the words of the scripted question are left
    assert right["pairs_per_text"] == wrong["pairs_per_text"] == sum(map(len, oracle.values())) / TEXTS
    assert (found["seen"]["f1"], found["unseen"]["f1"]) == (1.0, 0.0)
    assert json.loads((tmp_path / "scored" / "results.json").read_text())["sets"] == found["sets"]


def test_few_shot_groups_are_those_of_synth_run(tmp_path: Path) -> None:
    contexts = write_task(tmp_path / "task.jsonl", texts=8)
    run_evaluate(settings(tmp_path, few_shot=3))
    corpus = {"path": str(tmp_path / "task.jsonl"), "text": "context", "id": "id", "source": "task"}
    plain = recipe(tmp_path, corpus=corpus, output=str(tmp_path / "run"), synthesizer__max_new_tokens=1200)
    run_synth(check_settings(RunSettings, plain, where="recipe"))
    scored, expected = (list(read_groups(tmp_path / name)) for name in ("out", "run"))
    assert [group.texts for group in scored] == [group.texts for group in expected]
    assert [text.round for group in scored for text in group.texts] == [1, 2, 3, 1, 2, 3, 1, 2]
    assert [text.raw_id for group in scored for text in group.texts] == list(contexts)


def test_limit_draws_texts_by_seed_and_growing_limits_are_nested(tmp_path: Path) -> None:
    def drawn(name: str, **changes: Any) -> set[str]:
        run_evaluate(settings(tmp_path, output=str(tmp_path / name), **changes))
        return set(written_pairs(tmp_path / name))

    few, more, other = drawn("a", limit=5), drawn("b", limit=9), drawn("c", limit=5, seed=1)
    assert (len(few), len(more), len(other)) == (5, 9, 5)
    assert few < more and few != other


def test_seed_examples_are_shown_and_not_scored(tmp_path: Path) -> None:
    found = run_evaluate(settings(tmp_path, seed_examples={"path": str(tmp_path / "task.jsonl"), "count": 2}))
    assert (found["sets"]["task"]["texts"], found["sets"]["task"]["dropped"]) == (TEXTS - 2, {"seed_example": 2})
    shown = next(text for group in read_groups(tmp_path / "out") for text in group.texts)
    assert shown.prompt_tokens > 3 * len(shown.text)


# ---- interruptions


def test_an_evaluation_that_dies_again_and_again_is_finished_in_the_end(tmp_path: Path) -> None:
    run_evaluate(settings(tmp_path, few_shot=2, helper=helper(tmp_path), output=str(tmp_path / "undisturbed")))
    mortal = {"helper": helper(tmp_path, {"dies_at": 45}), "model": {"faults": {"dies_at": 21}}}
    calls = 1
    while calls < 20:
        try:
            run_evaluate(settings(tmp_path, few_shot=2, **mortal))
            break
        except Fault as fault:
            assert "rerun the same command to resume" in str(fault)
            calls += 1
    assert 3 < calls < 20  # 40 requests of the synthesizer and 60 of the helper, at most 20 and 44 a call
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "undisturbed")
    assert (tmp_path / "out/results.json").read_bytes() == (tmp_path / "undisturbed/results.json").read_bytes()
    assert not (tmp_path / "out/spool").exists()


def helper(folder: Path, faults: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"model": str(folder / "model"), "engine": "scripted", "max_num_seqs": 4, "faults": faults}


def test_a_killed_process_is_resumed(tmp_path: Path) -> None:
    slow = settings(tmp_path, model={"faults": {"latency_seconds": 0.1}, "max_num_seqs": 1})
    (tmp_path / "eval.yaml").write_text(json.dumps(slow.model_dump()))
    command = [sys.executable, "-c", "from synth.cli import main; main()", "eval", str(tmp_path / "eval.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    journal = tmp_path / "out/spool/pairs.spool"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.stat().st_size):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = journal.stat().st_size
    found = run_evaluate(settings(tmp_path))
    assert kept > 0 and found["sets"]["task"]["texts"] == TEXTS
    run_evaluate(settings(tmp_path, output=str(tmp_path / "undisturbed")))
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "undisturbed")


def test_failed_groups_are_counted_and_retried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_evaluate(settings(tmp_path, model={"faults": {"error": 0.2}}))
    lost = TEXTS - found["sets"]["task"]["texts"]
    assert 0 < lost < TEXTS and found["failed"]["error"] >= lost
    assert found["sets"]["task"]["dropped"] == {"not_scored": lost}
    assert "rerun the same command to retry them" in capsys.readouterr().err
    again = run_evaluate(settings(tmp_path))
    assert (again["sets"]["task"]["texts"], again["failed"]) == (TEXTS, {})
    undisturbed = run_evaluate(settings(tmp_path, output=str(tmp_path / "undisturbed")))
    assert again["sets"] == undisturbed["sets"]


def test_a_finished_evaluation_asks_nothing(tmp_path: Path) -> None:
    first = run_evaluate(settings(tmp_path))
    second = run_evaluate(settings(tmp_path, model={"faults": {"dies_at": 1}}))
    assert first["sets"] == second["sets"]


# ---- existing pairs


def test_rules_are_scored_alone_and_as_groups_of_synth_mine(tmp_path: Path) -> None:
    text = "Ben was a baker. He lived in Ulm, because his father had been a miller there. The mill is an old house."
    contexts = {f"t{place}": f"{text} It stood there for {place + 2} years." for place in range(4)}
    write_rows(tmp_path / "task.jsonl", contexts, dict.fromkeys(contexts, [wire_pair("Who was Ben?", "a baker")]))
    rules = run_evaluate(settings(tmp_path, synthesizer=None))
    corpus = {"path": str(tmp_path / "task.jsonl"), "text": "context", "id": "id"}
    run_mine(check_settings(MineSettings, {"corpus": corpus, "output": str(tmp_path / "mined")}, where="recipe"))
    mined = run_evaluate(
        settings(tmp_path, synthesizer=None, groups=str(tmp_path / "mined"), output=str(tmp_path / "b"))
    )
    assert rules["sets"] == mined["sets"]
    found = rules["sets"]["task"]
    assert (found["f1"], found["exact_match"], found["loss_own"]) == (None, None, None)
    assert found["pairs"] == sum(len(pairs) for pairs in written_pairs(tmp_path / "mined").values()) > 0


def test_texts_that_the_groups_lack_are_counted(tmp_path: Path) -> None:
    run_evaluate(settings(tmp_path, limit=15))
    found = run_evaluate(settings(tmp_path, synthesizer=None, groups=str(tmp_path / "out"), output=str(tmp_path / "b")))
    assert (found["sets"]["task"]["texts"], found["sets"]["task"]["dropped"]) == (15, {"not_scored": 5})


# ---- the helper


class Reader:
    """An engine whose loss is a tenth of the prompt's length, to see which prompts are scored."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    async def score(self, prompt_ids: list[int], answer_ids: list[int], *, request_id: str) -> float:
        self.prompts.append(bytes_of(prompt_ids))
        return -len(prompt_ids) / 10


def bytes_of(ids: list[int]) -> str:
    return TOKENIZERS[0].decode(ids[1:])


TOKENIZERS: list[Any] = []


def test_the_helper_reads_text_pairs_and_question(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "model"))
    TOKENIZERS[:] = [tokenizer]
    own, other = wire_pair("Who?", "Ann"), wire_pair("Where?", "Ulm")
    gold = wire_pair("What?", "red")
    text = GroupText("t", 0, 5, "A text", "set", [own], 1, 0, 0, 0, "stop")
    model = SynthesizerSettings(model="m", engine="scripted", max_model_len=300, max_new_tokens=4)
    asked = Helper(model, tokenizer, {("set", "t"): [gold, wire_pair("Long?", "x" * 300)]}, {("set", "t"): [other]})
    engine = Reader()
    found = asyncio.run(asked.run(engine, SynthGroup("g", [text], "s", "w", {}, "f")))  # type: ignore[arg-type]
    none = "A text\n\nQuestion: What?\nAnswer:"
    assert engine.prompts == [
        none,
        "A text\n\nQuestion: Where?\nAnswer: Ulm\n\nQuestion: What?\nAnswer:",
        "A text\n\nQuestion: Who?\nAnswer: Ann\n\nQuestion: What?\nAnswer:",
    ]
    losses = [(len(prompt) + 1) / 10 for prompt in engine.prompts]
    assert found.meta[LOSS] == {"t": [(*map(pytest.approx, losses), 4), None]}  # the second is too long for the helper


def test_each_text_with_pairs_gets_those_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Helper] = []

    async def run(self: Helper, engine: Any, group: SynthGroup) -> SynthGroup:
        seen.append(self)
        return await original(self, engine, group)

    original = Helper.run
    monkeypatch.setattr(Helper, "run", run)
    found = run_evaluate(settings(tmp_path, helper=helper(tmp_path)))
    own = written_pairs(tmp_path / "out")
    others = {name: pairs for (_, name), pairs in seen[0].others.items()}
    assert others.keys() == own.keys() and not [name for name in own if own[name] == others[name]]
    assert sorted(map(repr, others.values())) == sorted(map(repr, own.values()))  # each text's pairs are used once
    gained = found["sets"]["task"]
    assert gained["gain_over_none"] == pytest.approx(gained["loss_none"] - gained["loss_own"], abs=2e-4)


# ---- answers, views and mistakes


def test_answers_end_at_their_tag_or_a_blank_line() -> None:
    assert read_answer(" the mill </END>\n\n<QUE> Who? <ANS> Ben </END>") == "the mill"
    assert read_answer("\n\nthe mill\n\nThe story goes on") == "the mill"
    assert read_answer(" It stands there.\nTherefore, the answer is the mill </END>") == "the mill"
    assert read_answer("") == ""


def test_results_are_shown_as_tables_and_as_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_evaluate(settings(tmp_path, few_shot=2, helper=helper(tmp_path), model={"faults": {"malformed": 0.5}}))
    show_results(found)
    shown = capsys.readouterr().out
    for part in ("Answers", "well-formed", "Loss of the helper", "distinct", "choice cot", "few-shot 2", "task"):
        assert part in shown
    page = (tmp_path / "out/report.html").read_text()
    for part in ("<h2>Answers</h2>", "<h2>task</h2>", "rejected: ", "because of rain", "answered: "):
        assert part in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": "x"}, "existing groups are scored without a synthesizer"),
        ({"tasks": []}, "tasks"),
        ({"tasks": [{"path": "nothing.jsonl"}]}, "nothing.jsonl"),
        ({"seed_examples": {"path": "nothing.jsonl"}}, "seed_examples nothing.jsonl"),
        ({"tasks": [{"path": "TASK", "adapter": "nothing"}]}, "unknown adapter 'nothing'"),
        ({"tasks": [{"path": "TASK"}, {"path": "TASK"}]}, "duplicate name 'task'"),
        ({"tasks": [{"path": "EMPTY"}]}, "no text with pairs"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "empty.jsonl").write_text('{"context": "a b", "qa": []}\n')
    for task in changes.get("tasks", ()):
        task["path"] = {"TASK": f"{tmp_path}/task.jsonl", "EMPTY": f"{tmp_path}/empty.jsonl"}.get(
            task["path"], task["path"]
        )
    with pytest.raises(UserError, match=message):
        run_evaluate(settings(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_groups_of_other_texts_are_refused(tmp_path: Path) -> None:
    run_evaluate(settings(tmp_path))
    write_rows(tmp_path / "other.jsonl", {"u1": "A text."}, {"u1": [wire_pair("Who?", "Ben")]})
    tasks = [{"path": str(tmp_path / "other.jsonl")}]
    changes = {"synthesizer": None, "groups": str(tmp_path / "out"), "output": str(tmp_path / "b"), "tasks": tasks}
    with pytest.raises(UserError, match="no text has an id of the tasks"):
        run_evaluate(settings(tmp_path, **changes))


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    run_evaluate(settings(tmp_path))
    with pytest.raises(UserError, match="made with limit=None, now 3"):
        run_evaluate(settings(tmp_path, limit=3))
