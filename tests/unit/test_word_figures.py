"""Does a report show the words that changed most, split by what the image shows, and methods side by side?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dpa_ray.report.content import RunData, WordLosses
from dpa_ray.report.figures import Figure
from dpa_ray.report.page import Drawing, Section, Table
from dpa_ray.report.sweep_page import sweep_page
from dpa_ray.report.word_figures import OTHER_DATA, by_name_or_method, word_section
from tests.report_data import run_data, sweep, words_of


def figures(section: Section) -> dict[str, Figure]:
    return {block.figure.name: block.figure for block in section.blocks if isinstance(block, Drawing)}


def run_of(rows: list[dict[str, Any]], name: str = "one", method: str = "dpa") -> RunData:
    return replace(run_data(name, method=method), words={"instruct": WordLosses("training", "9", rows)})


def row(
    word: str, before: float, after: float, *, gain: float = 0.0, visual: float = 0.0, count: int = 5
) -> dict[str, Any]:
    return {
        "word": word,
        "count": count,
        "num_tokens": 1.0,
        "nll_before": before,
        "nll_after": after,
        "gain": gain,
        "visual": visual,
    }


def test_groups_are_means_over_all_places_where_their_words_stand() -> None:
    rows = [
        row("red", 4, 1, visual=1, count=3), row("blue", 2, 2, visual=0.6, count=1), row("the", 1, 0.5, count=10, gain=0.9),
    ]  # fmt: skip
    found = figures(word_section([("one", run_of(rows))]))["word-groups-instruct"]
    assert found.rows == [("visual words", 2, 4, 3.5, 1.25, -2.25), ("other words", 1, 10, 1, 0.5, -0.5)]
    assert "known to be shown" in found.note


def test_where_nobody_knows_them_visual_words_are_those_that_the_image_makes_likelier() -> None:
    rows = [row("red", 4, 1, gain=0.06), row("the", 1, 0.5, gain=0.05)]
    found = figures(word_section([("one", run_of(rows))]))["word-groups-instruct"]
    assert [r[0] for r in found.rows] == ["visual words", "other words"]
    assert "p − q above 0.05 on average" in found.note
    others = [row("red", 4, 1, gain=0.2), row("the", 1, 0.5, gain=0.08)]
    both = figures(word_section([("one", run_of(rows)), ("two", run_of(others))]))["words-instruct"]
    assert {r[0]: r[1] for r in both.rows} == {"red": "visual", "the": "visual"}, "on average over both"


def test_the_words_of_one_run_are_those_that_fell_most_and_least() -> None:
    rows = [row(f"w{n:02}", 5, 5 - n / 10) for n in range(40)] + [
        row("rare", 9, 0, count=2),
        row("nan", 1, float("nan")),
    ]
    section = word_section([("one", run_of(rows))])
    found = figures(section)["words-instruct"]
    assert [r[0] for r in found.rows] == [f"w{n:02}" for n in (*range(39, 29, -1), *range(9, -1, -1))]
    assert found.rows[0][3:6] == (5, 1.1, -3.9)
    (table,) = (block for block in section.blocks if isinstance(block, Table))
    assert len(table.rows) == 41, "rare ones too, but none without a number"
    few = figures(word_section([("one", run_of([row("a", 2, 1, count=1), row("b", 1, 2, count=1)]))]))["words-instruct"]
    assert [r[0] for r in few.rows] == ["a", "b"], "each once, where there are few"


def test_methods_stand_side_by_side_by_what_they_learn_more_than_vanilla() -> None:
    vanilla = [row(f"w{n}", 5, 3) for n in range(30)]
    dpa = [row(f"w{n}", 5, 3 - n / 100) for n in range(30)]
    found = figures(word_section([("dpa", run_of(dpa)), ("vanilla", run_of(vanilla))]))["words-instruct"]
    assert [r[0] for r in found.rows] == [f"w{n}" for n in (*range(29, 19, -1), *range(9, -1, -1))]
    assert found.columns[2:] == ("vanilla: nll before", "vanilla: nll after", "dpa: nll before", "dpa: nll after")
    assert found.rows[0][2:] == (5, 3, 5, 2.71)
    points = found.spec["layer"][1]["data"]["values"]
    assert {p["x"] for p in points if p["series"] == "vanilla"} == {-2}
    assert "learn more of than vanilla" in found.note


def test_runs_of_a_series_are_shown_as_their_mean_over_the_words_that_all_have() -> None:
    first, second = [row("a", 4, 2), row("b", 1, 1)], [row("a", 6, 3), row("c", 1, 1)]
    found = figures(word_section([("x", run_of(first)), ("x", run_of(second)), ("y", run_of(first))]))
    assert [(r[0], *r[2:4]) for r in found["words-instruct"].rows] == [("a", 5, 2.5)]
    assert figures(word_section([("x", run_of([row("a", 1, 1)])), ("x", run_of([row("b", 1, 1)]))])) == {}


def test_runs_whose_samples_are_not_the_same_are_told_apart() -> None:
    """A stage is reused whatever it was looked at with, so that its words may be of another held-out set."""
    runs = [
        (name, replace(run_data(name), words={"instruct": WordLosses("held-out", "9", [row("a", 4, 2)], digest)}))
        for name, digest in (("x", "1"), ("y", "1"), ("z", "2"))
    ]
    notes = [figures(word_section(some))["word-groups-instruct"].note for some in (runs[:2], runs)]
    assert [OTHER_DATA in note for note in notes] == [False, True]


def test_many_runs_are_shown_by_method() -> None:
    runs = [run_data(f"run-{n}", method="cmo" if n % 2 else "dpa") for n in range(9)]
    assert {name for name, _ in by_name_or_method(runs)[0]} == {"cmo", "dpa"}
    assert [name for name, _ in by_name_or_method(runs[:8])[0]] == [f"run-{n}" for n in range(8)]


def test_without_losses_of_words_the_section_says_so() -> None:
    section = word_section([("one", replace(run_data(), words={}))])
    assert section.blocks == []
    assert "No stage of these runs left the losses of words." in section.note


@pytest.mark.parametrize(
    ("variants", "expected"), [(("vanilla", "dpa"), "vanilla: nll before"), ((None, None), "Of the trial")]
)
def test_a_sweep_shows_its_variants_or_else_its_best_trial(variants: tuple[str | None, ...], expected: str) -> None:
    values = sweep()
    values["trials"] = [{**trial, "variant": variants[n % 2]} for n, trial in enumerate(values["trials"])]
    words = {t["name"]: {"instruct": words_of(n / 10)} for n, t in enumerate(values["trials"])}
    assert expected in sweep_page("ranks", "/store/sweeps/ranks", values, words)


def test_a_sweep_says_of_how_many_trials_its_words_are() -> None:
    """A page of many trials has not the words of all."""
    values = sweep()
    values["trials"] = [{**trial, "variant": "ab"[n % 2]} for n, trial in enumerate(values["trials"])]
    done = [trial["name"] for trial in values["trials"] if trial["status"] == "done"]
    words = {name: {"instruct": words_of()} for name in done}
    assert "trials that are done" not in sweep_page("ranks", "/store", values, words)
    del words[done[0]]
    assert f"Of {len(done) - 1} of the {len(done)} trials that are done." in sweep_page(
        "ranks", "/store", values, words
    )
