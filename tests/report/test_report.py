"""The report: one page from run directories whole, partial and broken, with everything that is shown escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError

from ipt_jax.core.errors import UserError
from ipt_jax.core.html import environment, render_page, safe
from ipt_jax.core.stage import Output
from ipt_jax.core.svg import (
    POINTS,
    Bar,
    Line,
    line_chart,
    score_bars,
    share_bar,
    short,
    smooth_points,
    thin,
    tick_labels,
    ticks,
)
from ipt_jax.corpus.records import GroupText, Pair, SynthGroup, encode
from ipt_jax.report import run_report
from ipt_jax.report.results import fit_trend
from ipt_jax.report.runs import read_runs

EVIL = "<script>alert('1')</script>&\"\x07"
SOURCES = [
    {"name": "raw", "kind": "raw", "documents": 1200, "tokens": 60_000, "epochs": 1.0, "share": 0.75},
    {"name": "augmented", "kind": "augmented", "documents": 300, "tokens": 20_000, "epochs": 2.0, "share": 0.25},
]
PLAN = {"sources": SOURCES, "rows": 625, "seq_len": 128, "tokens": 80_000, "padding_fraction": 0.01, "steps": 40}


def step(number: int, loss: float = 2.0) -> dict[str, Any]:
    return {
        **{"step": number, "tokens": number * 2048, "loss": loss, "loss_by_kind": {"raw": loss, "augmented": loss / 2}},
        **{"grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 9000.0, "mfu": None, "step_seconds": 0.2},
    }


def make_run(path: Path, *, steps: int = 40, name: str = "tiny") -> Path:
    path.mkdir(parents=True)
    info = {"config": {"model": {"preset": name}}, "versions": {"jax": "0.10.2"}, "plan": PLAN, "parameters": 1_340_000}
    (path / "run.json").write_text(json.dumps(info))
    lines = [json.dumps(step(i, 8.0 / i + 1.5)) for i in range(1, steps + 1)]
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return path


def make_eval(path: Path, model: Path | str, right: int, prediction: str = "Velmoor") -> Path:
    value = right / 10
    scored = {"metric": "acc_norm", "value": value, "stderr": 0.1, "n": 10, "chance": 0.25}
    metrics = {"acc_norm": {"value": value, "stderr": 0.1}, "acc": {"value": 0.5, "stderr": None}}
    path.write_text(json.dumps({"model": str(model), "tasks": {"places": {**scored, "metrics": metrics}}}))
    shown = {"task": "places", "prompt": "Where?", "answer": "Issel", "prediction": prediction}
    rows = [{**shown, "id": str(i), "correct": i < right, "acc_norm": float(i < right)} for i in range(10)]
    path.with_suffix(".rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Page(HTMLParser):
    """Checks that tags nest, and collects the text and the attributes that could load something."""

    VOID = {"meta", "br", "hr"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for key, value in attributes if key in ("src", "href", "srcset", "action", "data")]
        assert name != "script" and not any(key.startswith("on") for key, _ in attributes)
        if name not in self.VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def write_page(tmp_path: Path, runs: list[Path], **more: Any) -> Page:
    output = tmp_path / "pages" / "report.html"
    result = run_report(runs, output, **more)
    html = output.read_text()
    assert result["bytes"] == len(html.encode())
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]
    page = Page(html)
    assert page.links == [] and "http:" not in html and "https:" not in html and "url(" not in html
    return page


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    vanilla, instruct = make_run(tmp_path / "runs/vanilla"), make_run(tmp_path / "runs/instruct", name="small")
    make_eval(instruct / "eval.json", instruct / "checkpoints" / "40", 8)
    other = make_eval(tmp_path / "vanilla.json", "out/hf/vanilla", 3)
    page = write_page(tmp_path, [vanilla, instruct], evals=[other], title="Two runs")
    for words in (
        *("Two runs", "1.34M", "40 of 40", "loss on raw text", "loss on instruction-augmented text", "9,000"),
        *("30.0 ± 10.0 %", "80.0 ± 10.0 %", "instruct − vanilla: +50.0 ± 16.7 points over the same 10 questions"),
        *("The mix", "75.0%", "625 rows of 128", "1.0% padding", "Learning rate", "Gradient norm", "Speed"),
        *("Where?", "Velmoor", "What differs", '"tiny"', '"small"', "0.10.2"),
    ):
        assert words in page.text, words
    assert "tuning tasks" not in page.text and "FLOP" not in page.text  # neither run has them


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    pages = []
    for name in ("a.html", "b.html"):
        run_report([run], tmp_path / name)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>run", name=EVIL)
    make_eval(run / "eval.json", run, 5, prediction=EVIL)
    text = GroupText(
        "r1",
        0,
        9,
        EVIL,
        "s",
        [Pair(EVIL, EVIL), Pair("q", "", verdict="rejected", reason="no_answer")],
        0,
        9,
        0,
        9,
        "stop",
    )
    with Output(tmp_path / "groups", stage="synth run", identity={}, shard_name="groups") as output:
        output.seal(0, 1, [encode(SynthGroup(EVIL, [text], "s", "w", {}, "f"))])
        output.finish()
    page = write_page(tmp_path, [run], groups=tmp_path / "groups", title=EVIL)
    assert page.text.count("<script>alert('1')</script>&\"\ufffd") >= 6
    assert "rejected: no_answer" in page.text


def test_a_run_without_metrics_yet_is_said_to_have_none(tmp_path: Path) -> None:
    started, empty = make_run(tmp_path / "started", steps=3), make_run(tmp_path / "empty", steps=0)
    (empty / "metrics.jsonl").unlink()
    page = write_page(tmp_path, [started, empty])
    assert "empty has logged no step yet." in page.text and "3 of 40" in page.text
    only_metrics = make_run(tmp_path / "only")
    (only_metrics / "run.json").unlink()
    page = write_page(tmp_path, [only_metrics])
    assert "no run.json in this run directory" in page.text and "The mix" not in page.text


def test_killed_and_resumed_runs_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    lines = [
        json.dumps(step(2, 9.0)),
        json.dumps(step(1, 7.0)),
        '{"step": 3, "tok',
        "[1]",
        json.dumps(step(4, math.nan)),
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n".join(lines))
    found = read_runs([run])[0]
    assert [(each["step"], each["loss"]) for each in found.steps[:2]] == [(1, 7.0), (2, 9.0)]
    assert found.damaged == 2
    page = write_page(tmp_path, [run])
    assert "2 unreadable lines in metrics.jsonl left out" in page.text
    assert "nan" not in page.text.lower()


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    run, output = make_run(tmp_path / "run"), tmp_path / "report.html"
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"tasks": {"a": {}}}')
    cases: list[tuple[list[Path], dict[str, Any], str]] = [
        ([], {}, "no run directories"),
        ([tmp_path / "absent"], {}, "no such directory"),
        ([tmp_path / "nothing"], {}, "neither run.json nor metrics.jsonl"),
        ([run, run], {}, "given twice"),
        ([run], {"evals": [tmp_path / "absent.json"]}, "no such file"),
        ([run], {"evals": [tmp_path / "broken.json"]}, "invalid JSON"),
        ([run], {"evals": [tmp_path / "other.json"]}, "no tasks with metric and value"),
        ([run], {"groups": tmp_path / "nothing"}, "no manifest.json"),
    ]
    for runs, more, message in cases:
        with pytest.raises(UserError, match=message) as error:
            run_report(runs, output, **more)
        assert "\n" not in str(error.value) and not output.exists()
    with pytest.raises(UserError, match="a directory"):
        run_report([run], tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        run_report([run], run / "run.json" / "report.html")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")]
    assert [run.name for run in read_runs(runs)] == ["a/run", "b/run"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 97, [0, 20, 40, 60, 80]),
        (2.013, 2.49, [2.1, 2.2, 2.3, 2.4]),
        (-3, 3, [-2, 0, 2]),
        (0, 3e-4, [0, 1e-4, 2e-4, 3e-4]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@given(st.floats(-1e3, 1e3), st.floats(1e-6, 1e9))
def test_ticks_lie_inside_and_are_few(low: float, span: float) -> None:
    values = ticks(low, low + span)
    assert 1 <= len(values) <= 11 and values == sorted(values)
    assert all(low - span * 1e-6 <= value <= low + span * (1 + 1e-6) for value in values)


def test_short_numbers() -> None:
    assert [short(v) for v in (0, 999.9, 1234, 2_500_000, 1e9, 0.25, 3e-4, -0.00025)] == [
        *("0", "1k", "1.23k", "2.5M", "1B", "0.25", "3e-4", "-2.5e-4"),
    ]


def test_labels_of_a_narrow_range_differ() -> None:
    assert tick_labels([2.0, 2.0005, 2.001]) == ["2", "2.0005", "2.001"]


def test_smoothing_keeps_length_ends_and_gaps() -> None:
    flat = [(float(i), 3.0) for i in range(500)]
    assert [y for _, y in smooth_points(flat)] == pytest.approx([3.0] * 500)
    steep = [(float(i), 500.0 - i) for i in range(500)]
    assert [y for _, y in smooth_points(steep)][:450] == pytest.approx([500.0 - i for i in range(450)])
    broken = [(0.0, 1.0), (1.0, math.nan), (2.0, 3.0)]
    assert smooth_points(broken)[0] == (0.0, 1.0) and math.isnan(smooth_points(broken)[1][1])


@given(st.integers(1, 3 * POINTS))
def test_thinning_keeps_the_ends_and_the_mean(count: int) -> None:
    points = [(float(i), float(i)) for i in range(count)]
    thinned = thin(points)
    assert len(thinned) == min(count, POINTS)
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])
    assert all(x == pytest.approx(y) for x, y in thinned)


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [0.0, 0.0], [1.0, math.nan, 3.0], [1e30, 1e-30]])
def test_any_line_makes_a_valid_chart(values: list[float]) -> None:
    lines = [Line("a & b", 0, [(float(i), y) for i, y in enumerate(values)]), Line("long name " * 9, 1, [(5.0, 2.0)])]
    svg = line_chart(lines, title="t", x_label="x", y_label="y", smooth=True)
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"].startswith("t: a & b goes from") and "nan" not in svg
    assert not re.search(r"(inf|NaN)", svg)


def test_bars_are_valid_and_described() -> None:
    root = ElementTree.fromstring(score_bars("t", [Bar("a", 0, 1.0, None, 1), Bar("b", 1, 0.0, 0.1, 9)], chance=0.25))
    assert root.attrib["aria-label"] == "t: a 100.0 %; b 0.0 ± 10.0 %"
    root = ElementTree.fromstring(share_bar("mix", [("k-raw", 0.9, "raw: 90%"), ("k-task", 0.1, "x")]))
    assert root.attrib["aria-label"] == "mix: raw: 90%; x"


def test_only_what_html_forbids_is_replaced() -> None:
    assert safe("a\u00a0b\u200dc\n\t") == "a\u00a0b\u200dc\n\t"
    assert safe("\0\x1b\x85\ud800") == "\ufffd\ufffd\ufffd\ufffd"


def test_a_page_runs_its_own_script_or_none(tmp_path: Path) -> None:
    template = tmp_path / "own.html.j2"
    template.write_text('{% extends "page.html.j2" %}\n{% block body %}\n  <p>{{ title }}</p>\n{% endblock %}\n')
    assert "script" not in render_page(template, title="t")
    template.with_name("own.js").write_text("1;\n")
    template.with_name("own.css").write_text("p { color: red; }\n")
    page = render_page(template, title="<t>")
    checksum = base64.b64encode(hashlib.sha256(b"1;\n").digest()).decode()
    assert f"script-src 'sha256-{checksum}'" in page and "<script>1;\n</script>" in page
    assert "<title>&lt;t&gt;</title>" in page and "<main>\n<p>&lt;t&gt;</p>\n</main>" in page
    assert "p { color: red; }\n</style>" in page


def test_templates_escape_all_but_markup() -> None:
    template = environment().from_string(
        '{% macro b(x) %}<b t="{{ x }}">{{ x }}</b>{% endmacro %}{{ b(v) }}{{ n }}{{ x }}'
    )
    assert template.render(v="<'\"&", n=None, x=7 / 3) == '<b t="&lt;&#x27;&quot;&amp;">&lt;&#x27;&quot;&amp;</b>2.3'
    with pytest.raises(UndefinedError):
        environment().from_string("{{ absent }}").render()


def test_held_out_losses_and_perplexities(tmp_path: Path) -> None:
    """Curves of the validated steps beside the training loss; texts have no chart of accuracies, and less is better."""
    run, plain = make_run(tmp_path / "validated"), make_run(tmp_path / "plain")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line, loss in ((lines[9], 3.5), (lines[19], 2.25), (lines[29], 2.75)):
        line["validation"] = {"loss": loss, "loss_by_kind": {"raw": loss + 1, "task": None}, "answer_loss": None}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    info = json.loads((run / "run.json").read_text()) | {"best": {"step": 20, "held_out_loss": 2.25}}
    (run / "run.json").write_text(json.dumps(info))
    found, _ = read_runs([run, plain])
    assert found.held_out("loss") == [(10 * 2048, 3.5), (20 * 2048, 2.25), (30 * 2048, 2.75)]
    assert [loss for _, loss in found.held_out("raw")] == [4.5, 3.25, 3.75]
    evals = []
    for name, value in (("validated", 1.25), ("plain", 1.5)):
        task = {"metric": "bits_per_byte", "value": value, "stderr": None, "n": 2, "chance": None}
        task["metrics"] = {"bits_per_byte": {"value": value, "stderr": None}}
        evals.append(tmp_path / f"{name}.json")
        evals[-1].write_text(json.dumps({"model": str(tmp_path / name), "tasks": {"wiki": task}}))
        evals[-1].with_suffix(".rows.jsonl").write_text(json.dumps({"task": "wiki", "id": "1", "tokens": 9}) + "\n")
    page = write_page(tmp_path, [run, plain], evals=evals)
    assert "Held-out loss on raw text" in page.text and "Held-out loss on answers" not in page.text
    assert "2.250 at step 20" in page.text and "2.750" in page.text
    assert "wiki: bits per byte" in page.text
    html = (tmp_path / "pages" / "report.html").read_text()
    assert re.findall(r'class="best"[^>]*>([^<]*)<', html) == ["1.2500"], "less is better, and it is no percentage"


# ---- scaling


def scaled_run(path: Path, augmented: float, right: int) -> Path:
    """A run of 81,920 tokens with a share of augmented text, and its evaluation."""
    make_run(path)
    info = json.loads((path / "run.json").read_text())
    shares = {"raw": 1 - augmented, "augmented": augmented}
    info["plan"]["sources"] = [{**source, "share": shares[source["kind"]]} for source in SOURCES]
    (path / "run.json").write_text(json.dumps(info))
    make_eval(path / "eval.json", path, right)
    return path


def test_scores_over_augmented_tokens_have_a_fit(tmp_path: Path) -> None:
    shares = {"none": (0.0, 1), "some": (0.01, 3), "more": (0.1, 5), "most": (1.0, 7)}
    page = write_page(tmp_path, [scaled_run(tmp_path / name, *values) for name, values in shares.items()])
    assert "+20.00 per tenfold, 95% interval [20.00, 20.00], 3 runs. Without augmented tokens: none." in page.text
    assert "some: 30 at 819 augmented tokens" in page.text and "100k" in page.text


def test_two_amounts_have_no_fit_and_one_has_no_chart(tmp_path: Path) -> None:
    two = [scaled_run(tmp_path / "a", 0.1, 3), scaled_run(tmp_path / "b", 1.0, 5)]
    assert "2 different amounts: a fit needs three." in write_page(tmp_path, two).text
    equal = [scaled_run(tmp_path / "c", 0.5, 3), scaled_run(tmp_path / "d", 0.5, 5)]
    assert "Scaling" not in write_page(tmp_path, equal).text


def test_the_interval_of_a_fit_is_that_of_the_textbook() -> None:
    """y = 1, 2, 2, 3 at x = 10, 100, 1,000, 10,000: slope 0.6, residuals -0.1, 0.3, -0.3, 0.1, t(2) = 4.303."""
    words, trend = fit_trend([(10, 1.0), (100, 2.0), (1000, 2.0), (10_000, 3.0)])
    assert words == "+0.60 per tenfold, 95% interval [-0.01, 1.21], 4 runs."
    at, middle, low, high = trend[10]
    assert (at, middle) == (pytest.approx(10**2.5), pytest.approx(2.0))
    assert high - middle == pytest.approx(middle - low) == pytest.approx(4.3027 * math.sqrt(0.1) / 2, abs=1e-3)
    assert fit_trend([(10, 1.0), (10, 2.0), (100, 2.0)])[1] == []
