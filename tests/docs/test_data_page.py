"""The worked example of docs/reference/data.md, recomputed: its numbers and its rows."""

import re
from pathlib import Path

import pytest
from extras import ROOT
from token_shards import random_documents, row_pieces, write_tokens

from ipt_jax.corpus.records import Parent
from ipt_jax.data.mixture import DataSettings
from ipt_jax.data.plan import Plan, build_plan

PAGE = (ROOT / "docs" / "reference" / "data.md").read_text(encoding="utf-8")
RAW, AUGMENTED, TASKS = [12, 7, 10, 20, 9, 14], [16, 11], [9]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    root = tmp_path_factory.mktemp("page")
    write_tokens(root / "raw", random_documents(RAW), ids=list("abcdef"))
    parents = [[Parent("b", 0, 10)], [Parent("d", 0, 16)]]  # b whole; d up to its eighth word of two characters
    write_tokens(root / "augmented", random_documents(AUGMENTED, 1), kind="augmented", parents=parents)
    write_tokens(root / "tasks", random_documents(TASKS, 2), kind="task")
    sources = [
        {"name": "raw", "path": str(root / "raw"), "exclude_converted": "augmented"},
        {"name": "augmented", "path": str(root / "augmented"), "epochs": 1},
        {"name": "tasks", "path": str(root / "tasks"), "epochs": 2},
    ]
    data = DataSettings.model_validate({"seq_len": 16, "tokens": 90, "sources": sources})
    return build_plan(data, rows_per_step=2)


def summary_lines(plan: Plan) -> list[str]:
    summary = plan.summary()
    lines = [
        "{name:<10} {documents:>2} documents {tokens:>3} of {available_tokens:>3} tokens".format(**source)
        + "  share {share:>5.1%}  epochs {epochs:.3f}".format(**source)
        for source in summary["sources"]
    ]
    totals = (
        "{rows} rows, {steps} steps, {tokens} tokens, padding {padding_fraction:.2%}, {truncated_tokens} tokens cut"
    )
    return [*lines, totals.format(**summary)]


def row_lines(plan: Plan) -> list[str]:
    """Each row as source, record and token range of its pieces."""
    names = [source.settings.name for source in plan.sources]
    return [
        f"row {row}  "
        + ", ".join(f"{names[p.source]} {p.record} [{p.start}, {p.start + p.length})" for p in row_pieces(plan, row))
        for row in range(plan.rows)
    ]


def test_the_worked_example_is_what_the_plan_gives(plan: Plan) -> None:
    (block,) = re.findall(r"```plan\n(.*?)```", PAGE, flags=re.DOTALL)
    assert block.splitlines() == [*summary_lines(plan), *row_lines(plan)]


def test_the_page_names_files_that_exist() -> None:
    for name in re.findall(r"`((?:ipt_jax|benchmarks|tests)/[\w/]+\.py)`", PAGE):
        assert (ROOT / Path(name)).is_file(), name
