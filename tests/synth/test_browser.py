"""The page of `synth inspect` in a real browser: filters, the light on grounds, hostile strings, phones, no network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browserkit import Browser, browser
from extras import need_program
from renderkit import group
from test_inspect import write

from ipt_jax.corpus.records import Pair, SynthGroup, encode
from synth.format.parser import parse_completion, reject
from synth.format.wire import wire_pair
from synth.inspect.run import run_inspect

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'\"`\\${1}<!--]]>"
)
TEXT = "Ann built the hall in Rome. It took nine long winters of hard work."
HEBREW = "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c \u05e2\u05d5\u05dc\u05dd"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = need_program("chromium", how="apt-get install -y chromium")
    with browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def groups() -> list[SynthGroup]:
    pairs = [
        wire_pair("Who built the hall?", "Ann"),
        wire_pair("Where?", "Rome", ["Oslo", "Rome"]),
        wire_pair("How long did it take?", "many hard winters"),
        reject(Pair("Who built the hall?", "Ann"), "duplicate_question"),
        *parse_completion("<QUE> cut o", finished=False),
    ]
    pairs[0].scores = {"grounded": 0.75}
    odd = [
        wire_pair(HOSTILE, HOSTILE),
        wire_pair(HEBREW, "nul \0 bell \a"),
        reject(Pair(HOSTILE, ""), "leftover_text"),
    ]
    return [
        group("tale", [pairs, [wire_pair("Why?", "Rain fell", rationale="Clouds came.")]], [TEXT, "Rain fell."]),
        group(HOSTILE, [odd], [f"{HOSTILE}\0\r\nnext {HEBREW}"]),
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    path = write(folder / "groups", [encode(one) for one in groups()])
    run_inspect(path, folder / "page.html", 10, 10, True)
    return folder / "page.html"


VISIBLE = "[...document.querySelectorAll('li')].filter(li => li.checkVisibility())"


def visible(chromium: Browser) -> list[str]:
    return chromium.value(f"{VISIBLE}.map(li => li.dataset.number + ' ' + (li.dataset.reason || li.dataset.format))")


def test_everything_is_shown_and_nothing_is_asked_from_elsewhere(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    assert chromium.requests == [page.as_uri()]
    assert chromium.errors == []
    assert len(visible(chromium)) == 9
    assert chromium.value("document.querySelector('output').value") == "9 pairs"
    assert chromium.value("document.querySelectorAll('svg.chart').length") >= 6


@pytest.mark.parametrize(
    ("fragment", "shown", "in_groups"),
    [
        ("verdict=rejected", ["4 duplicate_question", "5 truncated", "3 leftover_text"], 2),
        ("verdict=accepted&format=choice", ["2 choice"], 1),
        ("format=free_cot", ["1 free_cot"], 1),
        ("reason=truncated", ["5 truncated"], 1),
        ("reason=leftover_text", ["3 leftover_text"], 1),
        ("q=CLOUDS", ["1 free_cot"], 1),
        ("q=nine%20long&verdict=accepted", ["1 free", "2 choice", "3 free"], 1),
        ("q=nowhere", [], 0),
    ],
)
def test_filters_by_address(chromium: Browser, page: Path, fragment: str, shown: list[str], in_groups: int) -> None:
    chromium.open(page, fragment)
    assert chromium.errors == []
    assert visible(chromium) == shown
    assert chromium.value("document.querySelector('output').value") == f"{len(shown)} of 9 pairs"
    assert chromium.value("[...document.querySelectorAll('.group')].filter(one => one.checkVisibility()).length") == (
        in_groups
    )


def test_an_address_that_names_nothing_filters_nothing(chromium: Browser, page: Path) -> None:
    chromium.open(page, "verdict=unknown&other=1&%E0%A4%A")
    assert chromium.errors == []
    assert len(visible(chromium)) == 9


def test_filters_by_hand_change_the_address_and_reset(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    chromium.value(
        "{ const field = document.querySelector('select[name=verdict]'); field.value = 'rejected';"
        " field.dispatchEvent(new Event('input', { bubbles: true })) }"
    )
    assert len(visible(chromium)) == 3
    assert chromium.value("location.hash") == "#verdict=rejected"
    chromium.value("document.querySelector('button[type=reset]').click()")
    chromium.send("Runtime.evaluate", expression="new Promise(done => setTimeout(done, 1))", awaitPromise=True)
    assert len(visible(chromium)) == 9
    chromium.value("document.querySelector('input[name=q]').focus()")
    chromium.send("Input.insertText", text="clouds")
    assert visible(chromium) == ["1 free_cot"]
    assert chromium.value("location.hash") == "#q=clouds"


def lit(chromium: Browser) -> list[str]:
    return chromium.value("[...document.querySelectorAll('mark.lit')].map(mark => mark.firstChild.textContent)")


def test_what_grounds_an_answer_lights_up(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    chromium.resize(1200, 900)
    assert lit(chromium) == []
    chromium.point("li[data-number='1'] .question")
    assert lit(chromium) == ["Ann"]
    chromium.point("li[data-number='3'] .question")
    assert lit(chromium) == ["It took nine long winters of hard work."]
    assert chromium.value("document.querySelector('mark.lit').classList.contains('near')")
    chromium.point("h1")
    assert lit(chromium) == []
    chromium.value("document.querySelector(\"li[data-number='1'] button\").focus()")
    assert lit(chromium) == ["Ann"]
    chromium.press("Tab")
    assert lit(chromium) == ["Rome"], "the keyboard goes from pair to pair"
    chromium.point("mark[data-pairs='1']")
    assert chromium.value("document.querySelectorAll('li.lit').length") == 1


def test_hostile_strings_stay_text(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    assert chromium.value("document.title") == "Synthesized pairs"
    assert chromium.value("document.scripts.length") == 1
    assert chromium.value("document.querySelectorAll('img, main script, main style, main link, iframe').length") == 0
    last = "[...document.querySelectorAll('.group')].at(-1)"
    assert chromium.value(f"{last}.querySelector('.passage').textContent") == f"{HOSTILE}\ufffd\nnext {HEBREW}"
    assert chromium.value(f"{last}.querySelector('h3').textContent") == f"Group {HOSTILE}"
    assert chromium.value(f"{last}.querySelector('.question').textContent") == HOSTILE
    assert chromium.value(f"[...{last}.querySelectorAll('.answer')][1].textContent") == "nul \ufffd bell \ufffd"
    direction = f"getComputedStyle([...{last}.querySelectorAll('.question')][1]).direction"
    assert chromium.value(direction) == "rtl"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_runs_over_the_edge_and_letters_can_be_read(
    chromium: Browser, page: Path, width: int, dark: bool, tmp_path: Path
) -> None:
    chromium.resize(width, 800, dark=dark)
    chromium.open(page)
    assert chromium.value("document.documentElement.scrollWidth") <= width
    for selector in (".answer", ".rejected .question", ".note", ".facts", "mark", ".tag", "output"):
        assert contrast(chromium, selector) >= 4.5, selector
    chromium.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def contrast(chromium: Browser, selector: str) -> float:
    """WCAG contrast of the first element's letters against the nearest background that is not clear."""
    return chromium.value(
        """(() => {
          const light = (colour) => {
            const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
              .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const found = document.querySelector(SELECTOR);
          let behind = found;
          while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
          const pair = [light(getComputedStyle(found).color), light(getComputedStyle(behind).backgroundColor)];
          return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
        })()""".replace("SELECTOR", repr(selector))
    )


def test_names_for_everything_that_can_be_used(chromium: Browser, page: Path) -> None:
    """Each control and picture has a name that a screen reader can say."""
    chromium.open(page)
    nodes = chromium.send("Accessibility.getFullAXTree")["nodes"]
    used = [node for node in nodes if node.get("role", {}).get("value") in ("button", "combobox", "searchbox", "image")]
    assert len(used) >= 15
    assert [node for node in used if not node["name"]["value"]] == []
