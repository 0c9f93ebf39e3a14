"""What does a person see who opens a report? In a real Chromium: every figure with its data, tables that sort, both colour
schemes, both widths, the keyboard alone; nothing in the console, nothing asked of any network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpa_ray.engine import words
from dpa_ray.report.runs_page import runs_page
from dpa_ray.report.sweep_page import sweep_page
from tests.browser import Browser, browser  # noqa: F401 (fixture)
from tests.integration.runs import Run
from tests.report_data import EDGES, HOSTILE, run_data, sweep, words_of

pytestmark = pytest.mark.ci

CONTRAST = """
const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(channel); return 0.2126*r + 0.7152*g + 0.0722*b; };
const paper = light(getComputedStyle(document.body).backgroundColor);
const ratio = (c) => { const l = light(c); return (Math.max(l, paper) + 0.05) / (Math.min(l, paper) + 0.05); };
const of = (selector, key) => [...document.querySelectorAll(selector)].map((e) => ratio(getComputedStyle(e)[key]));
return { text: of("p, dt, dd, th, td, summary, a, h1, h2, h3", "color"), labels: of("figure svg .role-axis-label text", "fill"),
         lines: of("figure svg .mark-line path", "stroke"), paper };
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of two made-up runs and one of a sweep."""
    folder = tmp_path_factory.mktemp("reports")
    compared = sweep()
    methods = ("vanilla", "cmo", "dpa")
    compared["trials"] = [{**t, "variant": methods[n % 3]} for n, t in enumerate(compared["trials"])]
    by_trial = {t["name"]: {"instruct": words_of(n % 3 / 4)} for n, t in enumerate(compared["trials"])}
    texts = {
        "runs": runs_page([run_data("one"), run_data("two", method="cmo", shift=0.4)], EDGES),
        "sweep": sweep_page("ranks", "/store/sweeps/ranks", compared, by_trial),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


def check_quiet(browser: Browser, file: Path) -> None:  # noqa: F811
    assert browser.console() == []
    assert [url.split("#")[0] for url in browser.requests()] == [file.as_uri()]


def drawn(browser: Browser, figure: str, mark: str) -> list[Any]:  # noqa: F811
    return browser.find_all(f"#figure-{figure} svg .mark-{mark}.role-mark > *")


def test_a_real_run(browser: Browser, measured: Run) -> None:  # noqa: F811
    file = measured.folder / "report.html"
    assert file.stat().st_size < 5e6
    browser.open(file)
    for stage in ("proxy_llm", "proxy_mllm", "instruct"):
        metrics = measured.metrics(stage)
        cells = browser.texts(f"#data-loss-{stage} tbody tr > *:nth-child(-n + 2)")
        steps, losses = cells[::2], cells[1::2]
        assert steps == [str(line["step"]) for line in metrics]
        assert [float(loss) for loss in losses] == pytest.approx([line["nll_mean"] for line in metrics], rel=1e-3)
        assert drawn(browser, f"loss-{stage}", "line")
    for stage in ("proxy_mllm", "instruct"):
        counts = next(line["gain_histogram"] for line in measured.metrics(stage) if "gain_histogram" in line)
        assert len(drawn(browser, f"gain-{stage}", "rect")) >= sum(count > 0 for count in counts)
        assert len(drawn(browser, f"gain-{stage}", "rule")) == 2, "both bounds"
        labels = browser.texts(f"#figure-gain-{stage} svg .mark-text.role-mark text")
        assert {"lower 0.05", "upper 0.5"} <= set(labels)
        about, rows = words.read(measured.artifact(stage) / words.FILE)
        assert len(browser.texts(f"#word-table-{stage} tbody tr")) == min(len(rows), 200)
        assert (
            len(drawn(browser, f"words-{stage}", "symbol")) == len(browser.texts(f"#data-words-{stage} tbody tr")) > 0
        )
        told = dict(
            zip(*(browser.texts(f"#word-table-{stage} tbody tr > :nth-child({n})") for n in (1, 5)), strict=True)
        )
        assert float(told[rows[0]["word"]]) == pytest.approx(rows[0]["nll_after"], rel=1e-3)
        assert f"{about['num_samples']} training samples" in browser.texts(f"#figure-word-groups-{stage} p")[0]
    spans = measured.info()["goodput"]["timeline"]["spans"]
    assert {stage or "outside of stages" for stage, *_ in spans} <= set(
        browser.texts("#data-timeline tbody td:nth-child(3)")
    )
    assert len(drawn(browser, "timeline", "rect")) >= len({stage for stage, *_ in spans})
    assert browser.run("return [...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    examples = [
        json.loads(line) for line in (measured.artifact("proxy_mllm") / "examples.jsonl").read_text().splitlines()
    ]
    shown = browser.texts(".tokens")
    assert shown[0] == "".join(token[0] for token in examples[0]["tokens"])
    weights = [token[1] for token in examples[0]["tokens"] if token[1] is not None]
    assert [float(text) for text in browser.texts("article:first-of-type tbody td:nth-child(2)")] == weights
    check_quiet(browser, file)


def test_every_figure_of_several_runs_has_its_data(browser: Browser, made: dict[str, Path]) -> None:  # noqa: F811
    browser.open(made["runs"])
    charts = browser.run("return [...document.querySelectorAll('[data-spec]')].map((e) => e.dataset.spec)")
    assert len(charts) == 3 + 2 * 2 + 2 * (3 + 2 + 2)
    for name in charts:
        assert browser.texts(f"#data-{name} tbody tr"), name
        marks = browser.find_all(f"#figure-{name} svg .role-mark:is(.mark-line, .mark-rect, .mark-symbol) > path")
        assert marks, name
        assert all("NaN" not in (mark.get_attribute("d") or "NaN") for mark in marks), name
    assert len(drawn(browser, "losses-instruct", "line")) == 2
    for stage in ("proxy_mllm", "instruct"):
        assert len(drawn(browser, f"word-groups-{stage}", "symbol")) == 2 * 2, "visual words and others of two runs"
        assert len(drawn(browser, f"words-{stage}", "symbol")) == 2 * 20
        assert len(browser.texts(f"#data-words-{stage} tbody tr")) == 20
    assert browser.run("return window.broken") is None
    assert any(HOSTILE in text for text in browser.texts("td"))
    check_quiet(browser, made["runs"])


def test_a_table_sorts_by_mouse_and_keyboard(browser: Browser, made: dict[str, Path]) -> None:  # noqa: F811
    browser.open(made["sweep"])
    heads = browser.texts("#trials-table thead th")
    column = next(i for i, head in enumerate(heads, 1) if head.startswith("eval.heldout.accuracy"))
    head = browser.find(f"#trials-table thead th:nth-child({column})")

    def values() -> list[str]:
        return browser.texts(f"#trials-table tbody tr > :nth-child({column})")

    scores = sorted(t["metrics"]["eval.heldout.accuracy"] for t in sweep()["trials"] if t["status"] == "done")
    head.find_element("css selector", "button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(v) for v in values()[:-1]] == pytest.approx(scores, rel=1e-3)
    assert values()[-1] == "–", "what has no score comes last"
    browser.press(head.find_element("css selector", "button"), "\ue007")  # Enter
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(v) for v in values()[:-1]] == pytest.approx(scores[::-1], rel=1e-3)
    assert values()[-1] == "–"
    browser.press(browser.find("#trials-table thead th:nth-child(2) button"), " ")
    assert browser.texts("#trials-table tbody td:nth-child(2)")[-1] == "failed", "words by the alphabet"
    assert head.get_attribute("aria-sort") == "none"
    check_quiet(browser, made["sweep"])


def test_a_sweep_in_figures(browser: Browser, made: dict[str, Path]) -> None:  # noqa: F811
    """The heat map has a cell per setting that was scored and follows its selects; a line per trial; the intervals."""
    browser.open(made["sweep"])
    assert len(drawn(browser, "heat-map", "rect")) == 8
    before = browser.texts("#figure-heat-map svg .mark-text.role-mark text")
    best = max(t["metrics"].get("eval.heldout.accuracy", 0) for t in sweep()["trials"])
    assert f"{best:.3g}" in before
    select = browser.find("#figure-heat-map select[name=colour]")
    browser.run(
        "arguments[0].selectedIndex = 1; arguments[0].dispatchEvent(new Event('input', {bubbles: true}));"
        "arguments[0].dispatchEvent(new Event('change', {bubbles: true}))", select,
    )  # fmt: skip
    browser.wait(
        "return [...document.querySelectorAll('#figure-heat-map svg .mark-text.role-mark text')]"
        ".some((e) => e.textContent === '1.3')"
    )
    assert len(drawn(browser, "parallel", "line")) == 8
    assert len(drawn(browser, "words-instruct", "symbol")) == 3 * 20, "three methods"
    assert len(drawn(browser, "compare-0", "symbol")) == 2
    assert "no difference shown" in browser.texts("#compare-table-0 td")
    check_quiet(browser, made["sweep"])


@pytest.mark.parametrize("kind", ["runs", "sweep"])
def test_both_schemes_can_be_read_at_both_widths(kind: str, browser: Browser, made: dict[str, Path]) -> None:  # noqa: F811
    """Contrasts of WCAG 2.1: 4.5 of text, 3 of lines; the page is never wider than the window."""
    papers = []
    for scheme in ("light", "dark"):
        browser.open(made[kind], scheme=scheme)
        found = browser.run(CONTRAST)
        assert min(found["text"]) >= 4.5
        assert min(found["labels"]) >= 4.5
        if kind == "runs":
            assert min(found["lines"]) >= 3
        papers.append(found["paper"])
        browser.open(made[kind], width=400, scheme=scheme)
        assert browser.run("return document.documentElement.scrollWidth") <= 400
    assert papers[0] > 0.9 > 0.1 > papers[1]


def test_a_page_follows_the_scheme_while_it_is_open(browser: Browser, made: dict[str, Path]) -> None:  # noqa: F811
    browser.open(made["sweep"], scheme="light")
    label = "return getComputedStyle(document.querySelector('figure svg .role-axis-label text')).fill"
    before = browser.run(label)
    browser.show(1280, "dark")
    browser.wait(f"{label} !== '{before}'")
    check_quiet(browser, made["sweep"])


def test_what_a_screen_reader_is_told(browser: Browser, made: dict[str, Path]) -> None:  # noqa: F811
    browser.open(made["runs"])
    named = browser.run(
        "return [...document.querySelectorAll('[data-spec] svg')].map((e) => "
        "[e.getAttribute('role'), document.getElementById(e.getAttribute('aria-labelledby')).textContent])"
    )
    assert len(named) == 3 + 2 * 2 + 2 * (3 + 2 + 2)
    assert all(role == "img" and name for role, name in named)
    tables = "[...document.querySelectorAll('table')]"
    assert browser.run(f"return {tables}.every((t) => t.caption && t.caption.textContent && t.tHead)")
    assert browser.run("return [...document.querySelectorAll('thead th')].every((e) => e.scope === 'col')")
    scrolling = "[...document.querySelectorAll('.scroll, pre')].every((e) => e.tabIndex === 0)"
    assert browser.run(f"return {scrolling}"), "what scrolls can be scrolled by the keyboard"
    details = browser.find("details.data")
    browser.press(details.find_element("css selector", "summary"), "\ue007")  # Enter
    assert details.get_attribute("open") is not None
