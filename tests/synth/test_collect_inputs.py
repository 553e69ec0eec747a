"""What `synth collect` reads beside the adapters: the released collection, generic rows, splits, long contexts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pytest
from extras import need
from typer.testing import CliRunner

import synth.cli
from ipt_jax.core.errors import UserError
from ipt_jax.corpus import datasets
from ipt_jax.corpus.records import Document, Segment
from ipt_jax.corpus.shards import read_documents
from synth.collect.run import CollectSettings, run_collect
from synth.format.parser import parse_completion
from synth.miniworld.write import write_tokenizer

COT = "\nLet's think step by step."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of bytes alone: an example's tokens are its characters, BOS and EOS."""
    directory = tmp_path_factory.mktemp("bytes")
    write_tokenizer([], 259, directory)
    return str(directory)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def collect(output: Path, *inputs: dict[str, Any], **settings: Any) -> tuple[dict[str, Any], list[Document]]:
    recipe = {"inputs": list(inputs), "output": str(output), **settings}
    figures = run_collect(CollectSettings.model_validate(recipe))
    return figures, list(read_documents(output))


def pairs_of(documents: list[Document]) -> dict[str, Counter[str]]:
    """Formats by data set, as the parser reads the targets."""
    found: dict[str, Counter[str]] = {}
    for document in documents:
        texts = [segment.text for segment in document.segments if segment.loss and segment.text]
        parsed = [pair for text in texts for pair in parse_completion(text, finished=True)]
        assert all(pair.accepted for pair in parsed)
        found.setdefault(document.source, Counter()).update(pair.format for pair in parsed)
    return found


def qa(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"Q": question, "A": answer} for question, answer in pairs]


def released(folder: Path) -> Path:
    """Three data sets in the layout of the release: options and chains inside Q and A, an index beside the shards."""
    options = "\nOptions:\n- rye\n- oats\n- hay"
    race = qa(
        (f"What did she sow?{options}", "oats"),
        (f"What do horses eat?{options}", "rye, hay"),
        (f"What grew here?{options}", "None of the above"),
        (f"What was sold?{options}", "bread"),
    )
    write(folder / "race/shard/0.jsonl", [{"context": "She sowed oats.", "QA_list": race, "rc_name": "race"}])
    write(folder / "race/shard/1.jsonl", [{"context": "He ran.", "QA_list": qa(("Who ran?", "He")), "rc_name": "race"}])
    chain = qa(
        (f"What is 2 + 3?\nOptions:\n- 4\n- 5{COT}", "Two and three.\nTherefore, the answer is 5"),
        (f"Why is it 5?{COT}", "Count. Therefore, the answer is by counting"),
        (f"Why not 6?{COT}", "Because."),
    )
    row = {"context": "", "QA_list": chain[:1], "QA_type": "yes_opt", "rc_name": "AQUA_RAT"}
    write(folder / "AQUA_RAT_yes_opt/shard/0.jsonl", [row, {**row, "context": "Sums.", "QA_list": chain[1:]}])
    squad = {"context": "Ann ran.", "QA_list": qa(("Who ran?", "Ann"), ("Who ran?", "Ann")), "QA_type": "free"}
    write(folder / "squad/shard/0.jsonl", [squad, {**squad, "QA_list": None}, {"context": "x"}])
    write(folder / "squad/index.jsonl", [{"source": "squad", "source_lang": "en", "weight": 1}])
    (folder / "README.md").write_text("card")
    return folder


def test_the_released_collection_in_its_own_layout(tmp_path: Path) -> None:
    figures, documents = collect(tmp_path / "out", {"path": str(released(tmp_path / "ft")), "adapter": "ft_collection"})
    assert pairs_of(documents) == {
        "AQUA_RAT": {"choice_cot": 1, "free_cot": 1},
        "race": {"choice": 2, "free": 2},
        "squad": {"free": 1},
    }
    assert figures["datasets"] == 3 and figures["dropped"] == {
        "pair_answer_not_in_options": 1,
        "pair_cot_malformed": 1,
        "pair_duplicate_question": 1,
        "unreadable_pairs": 1,
        "missing_pairs": 1,
    }
    texts = {document.text for document in documents}
    chain = f"<QUE> What is 2 + 3?\nOptions:\n- 4\n- 5{COT} <ANS> Two and three.\nTherefore, the answer is 5 </END>"
    assert chain in texts
    answers = (
        "<QUE> What do horses eat? <ANS> rye, hay </END>\n\n<QUE> What grew here?\nOptions:\n- rye\n- oats\n- hay\n"
    )
    assert any(f"{answers}- None of the above <ANS> None of the above </END>" in text for text in texts)


def test_the_report_page(tmp_path: Path) -> None:
    recipe, page = tmp_path / "collect.yaml", tmp_path / "pages" / "report.html"
    source = {"path": str(released(tmp_path / "ft")), "adapter": "ft_collection"}
    recipe.write_text(json.dumps({"inputs": [source], "output": str(tmp_path / "out")}))
    done = CliRunner().invoke(synth.cli.app, ["collect", str(recipe), "-o", str(page), "--json"])
    assert done.exit_code == 0, done.output
    text = page.read_text(encoding="utf-8")
    assert "3 data sets, 5 contexts, 7 pairs in 5 records" in text
    race = "<tr><td>race</td><td>2</td><td>4</td><td>–</td><td>2</td><td>2</td>"
    assert race in text.replace("\n", "") and "no context" in text
    for reason in ("pair_cot_malformed", "pair_answer_not_in_options", "unreadable_pairs", "missing_pairs"):
        assert f"<td>{reason}<br/>" in text
    groups = ["write=groups", f"output={tmp_path}/groups", "-o", str(tmp_path / "groups.html"), "--json"]
    assert CliRunner().invoke(synth.cli.app, ["collect", str(recipe), *groups]).exit_code == 0
    assert race in (tmp_path / "groups.html").read_text(encoding="utf-8").replace("\n", "")
    assert "She sowed oats." in text and "Therefore, the answer is 5" in text


def test_held_out_sets_by_name_or_folder_are_never_read(tmp_path: Path) -> None:
    source = {"path": str(released(tmp_path / "ft")), "adapter": "FT-Collection"}
    for number, name in enumerate(["AQUA_RAT_yes_opt", "aqua_rat"]):
        documents = collect(tmp_path / str(number), source, exclude=[name, "Squad"])[1]
        assert {document.source for document in documents} == {"race"}
    with pytest.raises(UserError, match="no data set 'quac' among the inputs; they are AQUA_RAT, race, squad"):
        collect(tmp_path / "x", source, exclude=["quac"])
    mixed = [{"context": "A.", "QA_list": qa(("Who?", name)), "rc_name": name} for name in ("squad", "quail", "squad")]
    path = str(write(tmp_path / "all.jsonl", mixed))
    figures, documents = collect(tmp_path / "mixed", {"path": path, "adapter": "ft_collection"}, exclude=["squad"])
    assert [document.source for document in documents] == ["quail"] and figures["dropped"] == {}


def test_generic_rows_as_people_have_them(tmp_path: Path) -> None:
    options = ["in May", "in June"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"answer": 1802}, "1802"),
        ({"answer": 2.5}, "2.5"),
        ({"answer": True}, "yes"),
        ({"answers": "Ann"}, "Ann"),
        ({"answers": ["Ann", "Ann B."]}, "Ann"),
        ({"answers": {"text": ["Ann"], "answer_start": [0]}}, "Ann"),
        ({"answer": "B", "options": options}, "in June"),
        ({"answer": "(a)", "choices": options}, "in May"),
        ({"answer": 1, "options": options}, "in June"),
        ({"answer": "in June.", "options": options}, "in June"),
        ({"answer": 3, "options": [1, 2, 3, 4]}, "3"),
        ({"label": "b", "choices": {"text": options, "label": ["a", "b"]}}, "in June"),
        ({"answerKey": "B", "choices": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]}, "y"),
        ({"answer": "A", "options": {"A": "in May", "B": "in June"}}, "in May"),
        ({"answer": "in May", "options": ["A. in May", "B. in June"]}, "in May"),
        ({"answer": "neither", "options": options}, "neither"),
        ({"answer": "in May", "rationale": "It says so."}, "It says so.\nTherefore, the answer is in May"),
    ]
    rows = [{"passage": f"Text {number}.", "question": "Q?", **case} for number, (case, _) in enumerate(cases)]
    figures, documents = collect(tmp_path / "out", {"path": str(write(tmp_path / "a.jsonl", rows))})
    found = {document.text.split(" <ANS> ")[1].removesuffix(" </END>") for document in documents}
    assert figures["dropped"] == {} and found == {answer for _, answer in cases} and len(documents) == len(cases)
    written = {"context": "x", "qa": [{"question": "Who?\nOptions:\n- Ann\n- Bo", "answer": "Bo"}]}
    assert pairs_of(collect(tmp_path / "b", {"path": str(write(tmp_path / "b.jsonl", [written]))})[1]) == {
        "b": {"choice": 1}
    }


def test_an_unknown_adapter_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown adapter 'squat'; did you mean 'squad'?"):
        CollectSettings.model_validate({"inputs": [{"path": "x", "adapter": "squat"}], "output": "y"})


def test_splits_and_file_formats_of_a_data_set(tmp_path: Path) -> None:
    row = {"context": "Ann ran.", "question": "Who ran?", "answers": {"text": ["Ann"], "answer_start": [0]}}
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation"):
        write(tmp_path / f"squad/{name}.jsonl", [{**row, "context": f"{name}: Ann ran."}])
    (tmp_path / "squad/dataset_infos.json").write_text("{}")
    source = {"path": str(tmp_path / "squad"), "adapter": "squad"}
    with pytest.raises(UserError, match="files of several splits; set split to one of train, validation"):
        collect(tmp_path / "x", source)
    with pytest.raises(UserError, match=r"no file of split 'test' \(they name train, validation\)"):
        collect(tmp_path / "x", {**source, "split": "test"})
    figures, documents = collect(tmp_path / "out", {**source, "split": "train"})
    assert figures["contexts"] == 2 and {document.source for document in documents} == {"squad"}
    with pytest.raises(UserError, match="subset plain is only for hf:NAME"):
        collect(tmp_path / "x", {**source, "subset": "plain"})


def test_a_name_of_the_hub_is_read_from_its_arrow_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"article": "Ann ran.", "question": "Who?", "options": ["Bo", "Ann"], "answer": "B"}]
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(str(tmp_path / "race-train.arrow"), table.schema) as stream:
        stream.write_table(table)
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "hub_files", lambda *names: asked.append(names) or [tmp_path / "race-train.arrow"])
    source = {"path": "hf:ehovy/race", "subset": "all", "split": "train", "adapter": "race"}
    assert pairs_of(collect(tmp_path / "out", source)[1]) == {"race": {"choice": 1}}
    assert set(asked) == {("ehovy/race", "all", "train")}


@pytest.mark.extra
def test_a_saved_data_set_with_splits(tmp_path: Path) -> None:
    library = need("datasets", extra="hf")
    rows = {"context": ["Ann ran."], "question": ["Who?"], "answers": [{"text": ["Ann"], "answer_start": [0]}]}
    saved = library.DatasetDict({name: library.Dataset.from_dict(rows) for name in ("train", "test")})
    saved.save_to_disk(str(tmp_path / "saved"))
    source = {"path": str(tmp_path / "saved"), "adapter": "squad"}
    with pytest.raises(UserError, match="several splits; set split"):
        collect(tmp_path / "x", source)
    assert pairs_of(collect(tmp_path / "out", {**source, "split": "train"})[1]) == {"squad": {"free": 1}}
    generic = {"path": str(tmp_path / "saved"), "split": "train"}
    assert pairs_of(collect(tmp_path / "generic", generic)[1]) == {"saved": {"free": 1}}


def test_overlap_with_evaluation_tasks_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"question": "Is it?", "context": {"contexts": ["It is."]}, "long_answer": "So.", "final_decision": "yes"}
    path = str(write(tmp_path / "a.jsonl", [row]))
    collect(tmp_path / "a", {"path": path, "adapter": "pubmedqa"})
    assert "overlap with evaluation tasks: pubmedqa; " in capsys.readouterr().err
    other = {"path": str(write(tmp_path / "b.jsonl", [{"context": "x", "question": "y", "answer": "z"}]))}
    collect(tmp_path / "b", other)
    assert "overlap" not in capsys.readouterr().err
    collect(tmp_path / "c", other, {"path": path, "adapter": "pubmedqa"}, exclude=["PubMedQA"])
    assert "overlap" not in capsys.readouterr().err


def test_without_a_context_an_example_is_bos_pairs_eos(tmp_path: Path, tokenizer: str) -> None:
    row = {"question": "2 + 2?", "options": ["A)3", "B)4"], "rationale": "Add.", "correct": "B"}
    path = str(write(tmp_path / "a.jsonl", [row]))
    few_shot = {"tokenizer": tokenizer, "max_tokens": 500}
    figures, documents = collect(tmp_path / "out", {"path": path, "adapter": "aqua_rat"}, few_shot=few_shot)
    text = f"<QUE> 2 + 2?\nOptions:\n- 3\n- 4{COT} <ANS> Add.\nTherefore, the answer is 4 </END>"
    bos, eos = Segment(loss=False, control="bos"), Segment(loss=True, control="eos")
    assert documents[0].segments == [bos, Segment(text, loss=True), eos] and figures["tokens"] == len(text) + 2


def test_a_paper_is_cut_into_passages_that_hold_their_answers(tmp_path: Path, tokenizer: str) -> None:
    sentences = [f"Trial {number} ran in town {number} of the north." for number in range(40)]
    paper = "  " + " ".join(sentences)
    rows = [
        {
            "context": paper,
            "question": f"Where did trial {number} run?",
            "answers": {"text": [answer], "answer_start": [at]},
        }
        for number in (0, 17, 39)
        for answer in [f"town {number}"]
        for at in [paper.index(answer + " of")]
    ]
    across = " ".join(sentences)[100:700]
    rows += [{"context": paper, "question": "Which?", "answers": {"text": [across], "answer_start": [102]}}]
    path = str(write(tmp_path / "a.jsonl", rows))
    few_shot = {"tokenizer": tokenizer, "max_tokens": 600}
    figures, documents = collect(tmp_path / "out", {"path": path, "adapter": "covid_qa"}, few_shot=few_shot)
    assert figures["pairs"] == 3 and figures["dropped"] == {"pair_answer_outside_passages": 1}
    for document in documents:
        context, _, pairs = document.text.partition(" </CON>\n\n")
        for pair in parse_completion(pairs, finished=True)[:1]:
            assert f" {pair.answer} of the north." in context and len(context) <= 310
    capped = collect(tmp_path / "cap", {"path": path, "adapter": "covid_qa"}, few_shot=few_shot, max_contexts=2)[0]
    assert capped["contexts"] == 2 and capped["dropped"]["beyond_max_contexts"] == 1
    dropped = collect(tmp_path / "x", {"path": path, "name": "y"}, {"path": path, "adapter": "covid_qa"}, exclude=["y"])
    assert dropped[0]["contexts"] == 1
    with pytest.raises(UserError, match="no example fits few_shot.max_tokens = 600"):
        collect(tmp_path / "generic", {"path": path}, few_shot=few_shot)


def test_few_shot_rows_are_full_and_hold_every_example_once(tmp_path: Path, tokenizer: str) -> None:
    texts = [f"{number}" + "x" * (20 + 7 * number % 90) for number in range(300)]
    rows = [{"context": text, "question": "Which?", "answer": "y"} for text in texts]
    path = str(write(tmp_path / "a.jsonl", rows))
    few_shot = {"tokenizer": tokenizer, "max_tokens": 2000}
    figures, documents = collect(tmp_path / "out", {"path": path}, few_shot=few_shot)
    contexts = [name for document in documents for name in document.meta["contexts"]]
    assert len(contexts) == len(set(contexts)) == figures["contexts"] == 300
    sizes = [sum(len(one.text) or 1 for one in document.segments) for document in documents]
    assert max(sizes) <= 2000 and sum(sizes) == figures["tokens"] >= 0.95 * 2000 * (len(documents) - 1)
    targets = [segment for document in documents for segment in document.segments if segment.loss]
    assert {segment.control or segment.text[:5] for segment in targets} == {"eos", "<QUE>"}
