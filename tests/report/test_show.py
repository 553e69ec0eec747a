"""`ipt show`: rows as they stand, to the space; what the loss counts; text that cannot act on page or terminal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from extras import ROOT
from token_shards import save_tokenizer

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.tokenizer import load_tokenizer
from ipt_jax.data.mixture import DataSettings
from ipt_jax.data.plan import Plan, build_plan
from ipt_jax.data.tokenize import TokenizeSettings, run_tokenize
from ipt_jax.report.viewer import TokenSpan, html_page, passage_text, read_rows

EVIL = "a <script>alert(1)</script> & [bold red]x[/] \x1b[31m <s>"


def corpus(folder: Path, name: str, rows: list[dict], **source: object) -> Path:
    tokenizer = save_tokenizer(folder / "tokenizer")
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = [{"path": str(folder / f"{name}.jsonl"), **source}]
    fields = {"inputs": inputs, "tokenizer": str(tokenizer), "output": str(folder / name), "workers": 1}
    run_tokenize(TokenizeSettings.model_validate(fields))
    return folder / name


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("show")
    asked = [{"q": "What is small?", "a": "a world"}, {"q": "Who?", "a": "words"}]
    sources = [
        {"name": "raw", "path": str(corpus(folder, "raw", [{"text": EVIL}])), "epochs": 1},
        {
            "name": "instructions",
            "path": str(corpus(folder, "ins", asked, kind="instruction", template="{q} {a}", loss=["a"])),
            "epochs": 1,
        },
    ]
    settings = DataSettings.model_validate({"seq_len": 64, "packing": "best_fit", "sources": sources})
    return build_plan(settings, rows_per_step=2)


def test_stretches_hold_the_text_and_what_the_loss_counts(plan: Plan) -> None:
    tokenizer = load_tokenizer(plan.tokenizer_dir)
    rows = read_rows(plan, tokenizer, step=0, rows=9)
    assert [(row.row, row.step, row.slot) for row in rows] == [(n, n // 2, n % 2) for n in range(plan.rows)]
    passages = [passage for row in rows for passage in row.passages]
    texts = {"".join(one.text for one in passage.spans if not one.control) for passage in passages}
    assert {"What is small? a world", "Who? words"} <= texts
    assert sum(row.tokens for row in rows) == plan.tokens
    (who,) = [passage for passage in passages if passage.spans[1].text == "Who?"]
    size = len(tokenizer.encode(" words", continuing=True))
    assert who.spans == [
        TokenSpan("<s>", 1, False, control=True),
        TokenSpan("Who?", len(tokenizer.encode("Who?")), False),
        TokenSpan(" words", size, True),
        TokenSpan("</s>", 1, True, control=True),
    ]
    assert who.targets == size + 1 and who.kind == "instruction"


def test_text_cannot_act_on_the_page_or_the_terminal(plan: Plan) -> None:
    rows = read_rows(plan, load_tokenizer(plan.tokenizer_dir), step=0, rows=9)
    page = html_page(plan.summary(), rows)
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&lt;s&gt;" in page
    assert "\x1b" not in page and "default-src 'none'" in page and "src=" not in page.split("<body>")[1]
    shown = "".join(passage_text(passage).plain for row in rows for passage in row.passages)
    assert "\x1b" not in shown and "[bold red]x[/]" in shown


def test_a_step_beyond_the_end_is_one_line(plan: Plan) -> None:
    with pytest.raises(UserError, match=rf"--step 99: the plan has {plan.steps} steps, 0 to {plan.steps - 1}"):
        read_rows(plan, load_tokenizer(plan.tokenizer_dir), step=99, rows=1)


def test_the_command(tmp_path: Path) -> None:
    raw = corpus(tmp_path, "raw", [{"text": "a small world of words " * 9}] * 4)
    recipe = {
        "model": {"preset": "tiny"},
        "data": {"seq_len": 32, "sources": [{"name": "raw", "path": str(raw), "epochs": 1}]},
        "train": {"batch_tokens": 64},
        "run_dir": str(tmp_path / "run"),
    }
    (tmp_path / "train.yaml").write_text(json.dumps(recipe))  # JSON is YAML

    def run(*arguments: str, stage: str = "show") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from ipt_jax.cli import main; main()", stage, str(tmp_path / "train.yaml")]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT)

    shown = run("--rows", "2", "--step", "1", "--json")
    figures = json.loads(shown.stdout)
    assert (figures["rows"], figures["first_row"], figures["step"], figures["tokens"]) == (2, 2, 1, 64)
    assert figures["tokens_by_kind"] == {"raw": 64} and figures["output"] is None
    assert "row 0 · step 0, slot 0" in run("--rows", "1").stdout
    page = tmp_path / "deep" / "page.html"
    assert run("-o", str(page)).returncode == 0 and "Rows 0 to 3 of" in page.read_text()
    refused = run("-o", str(tmp_path))
    assert refused.returncode == 2 and "a directory; give the path of a file" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    refused = run("optimizer.warmup_steps=99", stage="plan")
    assert refused.returncode == 2 and "optimizer.warmup_steps is 99, but the plan has" in refused.stderr
