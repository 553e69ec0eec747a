"""Settings: overrides, one-line errors with the nearest key, numbers as people write them, independent draws."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt_jax.core.cli_support import show
from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import digest
from ipt_jax.core.seeding import draw, uniform
from ipt_jax.core.settings import Settings, load_settings


class Inner(Settings):
    name: str
    weight: float = 1.0


class Outer(Settings):
    tokens: int = 0
    inner: Inner | None = None
    items: list[Inner] = []


def write(path: Path, text: str) -> Path:
    file = path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    settings = load_settings(Outer, write(tmp_path, "tokens: 100e9\ninner: {name: a, weight: 2e-4}"))
    assert settings == Outer(tokens=100_000_000_000, inner=Inner(name="a", weight=0.0002))


def test_a_merged_block_may_be_overridden(tmp_path: Path) -> None:
    text = "items: [&a {name: a, weight: 2}, &b {<<: *a, name: b}, {<<: *b, name: c}]"
    names = [(item.name, item.weight) for item in load_settings(Outer, write(tmp_path, text)).items]
    assert names == [("a", 2.0), ("b", 2.0), ("c", 2.0)]


def test_overrides_reach_blocks_and_lists(tmp_path: Path) -> None:
    file = write(tmp_path, "items: [{name: a}, {name: b}]")
    settings = load_settings(Outer, file, ["items.1.weight=3", "inner.name=c", "tokens=7"])
    assert settings == Outer(tokens=7, inner=Inner(name="c"), items=[Inner(name="a"), Inner(name="b", weight=3.0)])


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("tokns: 1", [], "unknown key 'tokns'; did you mean 'tokens'?"),
        ("inner: {name: a, wieght: 1}", [], "unknown key 'inner.wieght'; did you mean 'inner.weight'?"),
        ("items: [{name: a}, {name: b, nam: 2}]", [], "unknown key 'items.1.nam'; did you mean 'items.1.name'?"),
        ("weight: 2", [], "unknown key 'weight'; did you mean 'inner.weight' or 'items.N.weight'?"),
        ("tokens: many", [], "tokens: input should be a valid integer"),
        ("inner: {weight: 1}", [], "inner.name is missing; add it"),
        ("items: [{weight: 1}, {}]", [], "items.0.name, items.1.name are missing; add them"),
        ("items: [{name: a}]", ["items[0].name=b"], "list items are numbered; write items.0.name=b"),
        ("[1, 2]", [], "expected a mapping of settings, found list"),
        ("a: [", [], "not valid YAML"),
        ("tokens: 2\nitems: []\ntokens: 1", [], "duplicate key 'tokens' on line 3; remove one"),
        ("items:\n- {name: a, name: b}", [], "duplicate key 'name' on line 2; remove one"),
        ('inner: {name: "a\\0b"}', [], r"a NUL character (\0) on line 1; remove it"),
        ("tokens: 1", ['inner.name="a\\0b"'], "a NUL character"),
        ("tokens: true", [], "tokens: expected a number, given True"),
        ("tokens: 1", ["inner.name=a", "inner.weight=off"], "inner.weight: expected a number, given False"),
        ("tokens: 1", ["tokens"], "override 'tokens': expected key.sub=value"),
        ("tokens: 1", ["tokens.a=1"], "tokens is 1, not a block with fields"),
        ("items: []", ["items.0.name=a"], "'0' is not an index of a list of 0"),
    ],
)
def test_each_mistake_is_one_line(tmp_path: Path, text: str, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings(Outer, write(tmp_path, text), overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_and_misencoded_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_settings(Outer, tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a directory; set the path of a YAML recipe"):
        load_settings(Outer, tmp_path)
    with pytest.raises(UserError, match="/dev/null: not a regular file"):
        load_settings(Outer, "/dev/null")
    (tmp_path / "latin.yaml").write_bytes(b"inner: {name: caf\xe9}")
    with pytest.raises(UserError, match="not UTF-8 at byte 17"):
        load_settings(Outer, tmp_path / "latin.yaml")


@given(st.integers(), st.text(), st.text())
def test_draws_depend_on_their_keys_alone(seed: int, one: str, other: str) -> None:
    assert draw(seed, one).random() == draw(seed, one).random()
    assert (draw(seed, one, other).random() == draw(seed, other, one).random()) == (one == other)
    assert 0.0 <= uniform(seed, one) < 1.0


def test_keys_are_not_joined() -> None:
    assert draw(0, "ab", "c").random() != draw(0, "a", "bc").random()


def test_digest_sees_meaning_not_order() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})


def test_figures_are_printed_as_people_read_them(capsys: pytest.CaptureFixture) -> None:
    result = {"tokens_per_second": 16530.4, "loss": 0.25, "rate": 2e-5, "texts": 1200, "hub": None, "dropped": {}}
    show({**result, "shares": {"got": None, "asked": 0.5}, "gone": []}, as_json=False)
    assert [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()] == [
        ["tokens per second", "16,530"],
        ["loss", "0.25"],
        ["rate", "2e-05"],
        ["texts", "1,200"],
        ["hub", "none"],
        ["dropped", "none"],
        ["shares", "got none, asked 0.5"],
        ["gone", "none"],
    ]
