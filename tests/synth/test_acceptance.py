"""What `synth run` says when it accepts few pairs or none: early, at the end, and by its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from synthkit import recipe, settings, write_corpus

from ipt_jax.corpus.records import GroupText, Pair, SynthGroup
from synth.format.parser import REASONS, rejected
from synth.generate.acceptance import Acceptance
from synth.generate.run import run_synth


def group(*pairs: Pair) -> SynthGroup:
    text = GroupText("t", 0, 4, "text", "s", list(pairs), 1, 5, 0, 3, "stop")
    return SynthGroup("g", [text], "model", "weights", {}, "print")


def test_first_pair_and_warning_come_once() -> None:
    lines: list[str] = []
    acceptance = Acceptance(lines.append)
    acceptance.see(
        group(rejected("no_answer", "<QUE> Who?"), rejected("leftover_text", "Sure!\nHere"), Pair("a\nb?", "c"))
    )
    acceptance.see(group(Pair("d?", "e"), rejected("no_answer", "later")))
    assert lines == ["first accepted pair: Q: a b? A: c"]
    counts = {"texts": 99, "pairs": 19, "rejected.no_answer": 60, "rejected.leftover_text": 20, "rejected.unclosed": 1}
    acceptance.check(counts)
    assert len(lines) == 1
    acceptance.check({**counts, "texts": 100})
    acceptance.check({**counts, "texts": 130})
    assert lines[1].startswith(
        "warning: 19 of 100 pairs (19.0%) of 100 texts were accepted; a model that was not tuned"
    )
    assert lines[2:] == [
        "no_answer 74%: no <ANS> before </END>, for example: '<QUE> Who?'",
        f"leftover_text 25%: {REASONS['leftover_text']}, for example: 'Sure! Here'",
        "unclosed 1%: the model stopped by itself inside a pair, without </END>",
    ]


@pytest.mark.parametrize(
    ("pairs", "broken", "said"),
    [(20, 80, None), (19, 81, "19 of 100 pairs (19.0%) of 31 texts were accepted: unclosed 81; "),
     (0, 0, "0 pairs of 31 texts were accepted: the answers hold no pairs; "),
     (0, 5, "0 pairs of 31 texts were accepted: unclosed 5; ")],
)  # fmt: skip
def test_verdict(pairs: int, broken: int, said: str | None) -> None:
    lines: list[str] = []
    Acceptance(lines.append).judge({"texts": 31, "pairs": pairs, "rejected": {"unclosed": broken} if broken else {}})
    assert [line[: len(said or "")] for line in lines] == ([said] if said else [])


def run(folder: Path, **changes: Any) -> subprocess.CompletedProcess[str]:
    (folder / "run.yaml").write_text(json.dumps(recipe(folder, **changes)))
    command = [sys.executable, "-m", "synth.cli", "run", str(folder / "run.yaml"), "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_run_that_accepted_nothing_exits_with_1_and_keeps_its_output(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"id": "a", "text": "x"}\n')
    changes = {"synthesizer__max_new_tokens": 5, "rounds": 1}  # no pair is so short
    first, again = run(tmp_path, **changes), run(tmp_path, **changes)
    for result in (first, again):
        assert result.returncode == 1
        assert json.loads(result.stdout)["texts"] == 1
        assert "0 pairs of 1 texts were accepted: truncated 1; raise synthesizer.max_new_tokens" in result.stderr
    assert (tmp_path / "groups" / "manifest.json").exists()


def test_a_run_with_few_pairs_warns_after_a_hundred_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "corpus.jsonl", 120)
    result = run_synth(settings(tmp_path, synthesizer__max_new_tokens=55, rounds=1))
    said = capsys.readouterr().err
    assert 0 < result["pairs"] < 0.2 * (result["pairs"] + sum(result["rejected"].values()))
    assert said.count("first accepted pair: Q: ") == said.count("warning: ") == 1
    assert "synth run: truncated " in said and ", for example: '<QUE> " in said
    assert said.count("were accepted") == 2
