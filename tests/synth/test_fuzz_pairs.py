"""benchmarks/fuzz_pairs.py: its grammar knows what the parser's examples say, and a share of its outputs runs here."""

from __future__ import annotations

import sys

import pytest
from extras import ROOT
from test_parse import CUE, REJECTED, THEREFORE

sys.path.insert(0, str(ROOT / "benchmarks"))
import fuzz_pairs  # noqa: E402

ACCEPTED = [
    "<QUE> Who? <ANS> Ann </END>",
    "<QUE>Who?<ANS>Ann</END>",
    "\n<QUE> Who?\n\nOptions:\n- Rome\n\n- Oslo <ANS> Oslo. </END>",
    f"<QUE> How many?{CUE} <ANS> Two.{THEREFORE}4 </END>",
    f"<QUE> Which?\nOptions:\n- a\n- b{CUE} <ANS> Not a.{THEREFORE}b </END>",
    "<QUE> - a\n- b <ANS> Therefore, the answer is b </END>",
]


@pytest.mark.parametrize("text", ACCEPTED)
def test_the_grammar_accepts(text: str) -> None:
    assert fuzz_pairs.accepts(text) == [True]
    assert fuzz_pairs.accepts(text + text) == [True, False]
    assert fuzz_pairs.accepts(f"{text} more") == [True, False]


@pytest.mark.parametrize("text", [text for text, _ in REJECTED])
def test_the_grammar_refuses(text: str) -> None:
    assert fuzz_pairs.accepts(text) == [False]


def test_parser_and_grammar_agree_and_nothing_raises() -> None:
    found = fuzz_pairs.run((0, 0, 20_000))
    assert found["outputs"] == 20_000
    shares = {kind.__name__: found[f"accepted.{kind.__name__}"] for kind in fuzz_pairs.KINDS}
    assert all(shares[name] > 100 for name in ("valid_text", "mutated", "swapped", "truncated", "soup_between_tags"))
    assert 0.2 < found["accepted"] / found["pairs"] < 0.8


def test_a_difference_is_told_with_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_pairs, "accepts", lambda text: [])
    with pytest.raises(RuntimeError, match=r"seed 3, number 0, valid_text: grammar and parser differ"):
        fuzz_pairs.run((3, 0, 1))
