"""docs/reference/synthesis.md: what its arithmetic says follows from what it says was measured."""

from __future__ import annotations

import re

from extras import ROOT

from synth.config import RunSettings

PAGE = (ROOT / "docs" / "reference" / "synthesis.md").read_text(encoding="utf-8")
JOINED = " ".join(PAGE.split())


def lines(kind: str) -> dict[str, float]:
    block = re.search(r"```scale\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    rows = re.findall(rf"^{kind}\s+(.+?)\s+([\d.,]+)$", block[1], re.MULTILINE)
    return {name: float(number.replace(",", "")) for name, number in rows}


def test_what_follows_follows() -> None:
    one = {**lines("asked"), **lines("measured")}
    texts, size = one["texts"], one["bytes a text"]
    groups = texts / one["rounds"]
    shards = groups / one["groups a shard"]
    assert lines("follows") == {
        "corpus, GB": texts * size / 1e9,
        "groups": groups,
        "shards": shards,
        "files of a finished output": shards + 4,
        "first pass, minutes": round(texts * one["first pass, microseconds a text"] / 60e6, 1),
        "hashing, core seconds": round(texts * size / 1e6 / one["hashing, MB a second and core"]),
        "marks of ids on disk, MB": texts * 8 / 1e6,
        "work list, kB": texts * one["work list, bytes a text"] / 1e3,
        "manifest, kB": shards * one["manifest, bytes a shard"] / 1e3,
        "spool of an open shard, MB": round(one["groups a shard"] * one["spool, bytes a group"] / 1e6),
        "groups before compression, GB": round(groups * one["spool, bytes a group"] / 1e9),
    }


def test_gpu_hours_of_the_paper() -> None:
    hours = 40e6 * 500 / 1e9 * 24
    assert (
        f"{hours:.0f} GPU-hours, {40e6 * 260 / hours / 3600:,.0f} new tokens and {40e6 / hours / 3600:.0f} texts"
        in JOINED
    )


def test_the_recipe_is_one() -> None:
    block = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    assert set(re.findall(r"^(\w+):", block[1], re.MULTILINE)) <= set(RunSettings.model_fields)
