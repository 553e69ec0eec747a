"""The filter expression: what it keeps, and that it reads nothing but comparisons."""

from __future__ import annotations

import pytest

from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import check_settings
from ipt_jax.corpus.records import Pair
from synth.render.documents import RenderSettings
from synth.render.pair_filter import keeps, read_keep


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        (None, True),
        ("well_formed", True),
        ("grounded >= 0.3 and well_formed", True),
        ("grounded > 0.5", False),
        ("not grounded > 0.5", True),
        ("0.1 < grounded <= 0.5 and agreement == 1", True),
        ("grounded < 0.1 or agreement != 0", True),
        ("other < 1 or other >= 1 or other == other", False),
        ("grounded > -1", True),
    ],
)
def test_keep(expression: str | None, kept: bool) -> None:
    pair = Pair("Q?", "A", scores={"grounded": 0.5, "agreement": 1.0})
    assert keeps(expression, pair) is kept


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "grounded >=",
        "__import__('os')",
        "grounded.real > 1",
        "a if b else c",
        "[1]",
        "'x' == 'x'",
        "a + b > 1",
        "x\0",
    ],
)
def test_keep_refuses_all_else(expression: str) -> None:
    with pytest.raises(ValueError, match="expected scores, numbers"):
        read_keep(expression)
    with pytest.raises(UserError, match="keep: "):
        check_settings(RenderSettings, {"groups": "g", "output": "o", "keep": expression}, where="test")
