"""Does a report say what the runs and sweeps say, whatever is missing, and nothing that a caption would like it to do?"""

from __future__ import annotations

import json
import os
import re
from base64 import b64encode
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from dpa_ray.report.content import RunData, Weighting, last_mean
from dpa_ray.report.figures import Curve, Figure, short, thinned
from dpa_ray.report.page import as_json, number_columns, shown
from dpa_ray.report.run_figures import gain_figures, loss_figures, overlaid_losses, time_figure
from dpa_ray.report.runs_page import run_page, runs_page
from dpa_ray.report.sweep_page import sweep_page
from tests.report_data import EDGES, HOSTILE, run_data, sweep


class Page(HTMLParser):
    """A page as a browser would take it: its elements, their attributes and its texts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self.inside == "script" else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def pages() -> dict[str, str]:
    return {
        "run": run_page(run_data(), EDGES),
        "runs": runs_page([run_data("one"), run_data("two", method="cmo", shift=0.4)], EDGES),
        "sweep": sweep_page("ranks", "/store/sweeps/ranks", sweep()),
    }


@pytest.mark.parametrize("kind", ["run", "runs", "sweep"])
def test_no_word_of_the_data_becomes_markup(kind: str) -> None:
    text = pages()[kind]
    page = Page(text)
    names = [name for name, _ in page.elements]
    assert not {"b", "iframe", "object"} & set(names)
    assert names.count("script") == 5, "the figures' data, the three libraries and the page's own"
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    sources = [a["src"] for _, a in page.elements if "src" in a]
    assert all(source is not None and source.startswith("data:image/") for source in sources)
    links = [a["href"] for _, a in page.elements if a.get("href", "").startswith("http")]  # type: ignore[union-attr]
    assert links == ["https://vega.github.io/vega-lite/"]
    assert " ".join(HOSTILE.split()) in page.text, "but it can be read"


@pytest.mark.parametrize("kind", ["run", "runs", "sweep"])
def test_nothing_is_loaded_and_only_own_scripts_run(kind: str) -> None:
    page = Page(pages()[kind])
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert policy.count("'sha256-") == 4
    assert "unsafe" not in policy.split("script-src")[1]


@pytest.mark.parametrize("kind", ["run", "runs", "sweep"])
def test_every_figure_has_a_name_and_its_data_as_text(kind: str) -> None:
    page = Page(pages()[kind])
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    charts = [a["data-spec"] for _, a in page.elements if "data-spec" in a]
    specs = json.loads(next(s for s in page.scripts if s.startswith("{")))
    assert sorted(specs) == sorted(charts)
    assert charts
    links = {(a.get("href") or "").removeprefix("#") for _, a in page.elements}
    for name in charts:
        assert f"title-{name}" in ids
        assert f"data-{name}" in ids or (kind == "sweep" and "trials-table" in ids and "trials-table" in links)
    images = [a for tag, a in page.elements if tag == "img"]
    assert all(image["alt"] for image in images)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(below <= above + 1 for above, below in zip(levels, levels[1:], strict=False)), "no level is left out"


def test_curves_are_the_metrics() -> None:
    first, second, third = loss_figures(run_data(num_steps=4))
    assert first.columns == ("step", "all targets"), "uniform weights: the loss is the mean"
    assert second.columns == ("step", "all targets", "visual words", "other words", "weighted loss")
    expected = run_data(num_steps=4).of_stage("proxy_mllm")
    keys = ("step", "nll_mean", "nll_mean_visual", "nll_mean_style", "loss")
    assert second.rows == [tuple(record[key] for key in keys) for record in expected]
    assert "resumed after 20" in json.dumps(third.spec)


def test_held_out_numbers_are_curves_of_the_steps_that_have_them() -> None:
    run = run_data(num_steps=6)
    for record in run.of_stage("proxy_llm"):
        if record["step"] % 3 == 0:
            record["eval_nll"] = 10.0 - record["step"]
    figure = loss_figures(run)[0]
    assert figure.columns == ("step", "all targets", "held out")
    assert [(row[0], row[2]) for row in figure.rows if row[2] is not None] == [(3, 7.0), (6, 4.0)]


def test_thinning_takes_means_and_keeps_gaps() -> None:
    line = Curve("a", [(1, 1.0), (2, 3.0), (3, None), (4, 5.0), (5, None), (6, None), (7, 8.0)])
    assert thinned(line, 4).points == [(1.5, 1.0), (3.5, 5.0), (5.5, None), (7.0, 8.0)]
    assert thinned(line, 7) == line
    line = Curve("b", [(n, 9.0 if n == 1 else 0.5 if n == 8 else 1.0 + n / 9) for n in range(1, 9)])
    assert thinned(line, 2).points == [(2.5, 9.0), (6.5, 0.5)]
    line = Curve("c", [(1, 9.0), (2, 1.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, 6.0)])
    assert thinned(line, 3).points[-2:] == [(3.5, 3.5), (5.5, 5.5)], "means elsewhere"


@pytest.mark.parametrize("step", [1, 777, 4000, 5999, 6000])
def test_a_spike_of_one_step_is_seen_however_many_runs_there_are(step: int) -> None:
    runs = [run_data(f"run-{n}", num_steps=6000) for n in range(2)] + [run_data(f"run-{n}") for n in range(2, 100)]
    spiked = [{**r, "nll_mean": 77.0 if r["step"] == step else r["nll_mean"]} for r in runs[0].of_stage("instruct")]
    (figure,) = overlaid_losses([replace(runs[0], metrics=spiked), *runs[1:]])[2:]
    first = [row[1] for row in figure.rows]
    assert max(y for y in first if y is not None) == 77
    assert min(y for y in first if y is not None) == pytest.approx(0.5, abs=1e-3)
    assert abs(next(row[0] for row in figure.rows if row[1] == 77) - step) <= 6000 / 24


def test_long_runs_stay_small() -> None:
    run = run_data(num_steps=20_000)
    text = run_page(run, EDGES)
    assert len(text.encode()) < 1.3e6
    many = runs_page([replace(run, name=f"run-{n}") for n in range(12)], EDGES)
    assert len(many.encode()) < 5e6


def photo() -> str:
    """As heavy as a thumbnail of a photo."""
    return "data:image/jpeg;base64," + b64encode(os.urandom(9000)).decode()


def heavy(name: str, num_images: int, num_steps: int = 400) -> RunData:
    """A run of long samples of many photos, with two held-out sets."""
    images = [photo() for _ in range(num_images)]
    tokens = [[" token", 0.1234, 0.5678, True]] * 400
    shown = [{"id": str(n), "place": f"a.json#{n}", "images": images, "tokens": tokens} for n in range(8)]
    run = run_data(name, num_steps=num_steps)
    samples = [(held_out, sample) for held_out in ("heldout", "unseen") for sample in range(8)]
    answers = [{**a, "set": s, "sample": n, "question": f"q{q}"} for s, n in samples for q, a in enumerate(run.answers)]
    return replace(run, examples=dict.fromkeys(run.stages, shown), answers=answers, pictures=dict.fromkeys(samples, images),
                   recipe_text="key: value\n" * 400)  # fmt: skip


def test_many_images_are_counted_and_few_shown() -> None:
    text = run_page(heavy("one", 32), EDGES)
    assert len(text.encode()) < 5e6
    page = Page(text)
    images = [a for tag, a in page.elements if tag == "img"]
    assert len(images) == 4 * (3 * 6 + 2 * 8)
    assert images[0]["alt"] == "What the text speaks of, image 1 of 32"
    assert page.text.count("and 28 more images") == 3 * 6 + 2 * 8


def test_a_hundred_runs_stay_small() -> None:
    """With long samples, many answers, losses of words and a timeline each, of lengths that all differ."""
    first = heavy("run-000", 16)
    runs = [
        first,
        *(replace(heavy(f"run-{n:03}", 0, 300 + n), examples=first.examples, pictures={}) for n in range(1, 100)),
    ]
    text = runs_page(runs, EDGES)
    assert len(text.encode()) < 5e6
    specs = json.loads(next(s for s in Page(text).scripts if s.startswith("{")))
    for stage in run_data().stages:
        shown = {value["series"] for value in specs[f"losses-{stage}"]["layer"][0]["data"]["values"]}
        assert shown == {run.name for run in runs}


def test_many_runs_stay_small() -> None:
    first = heavy("run-0", 16)
    runs = [
        first,
        *(replace(heavy(f"run-{n}", 0, 300 + n), examples=first.examples, pictures={}) for n in range(1, 25)),
    ]
    text = runs_page(runs, EDGES)
    assert len(text.encode()) < 5e6
    specs = json.loads(next(s for s in Page(text).scripts if s.startswith("{")))
    assert sorted(specs) == [
        *(f"losses-{stage}" for stage in ("instruct", "proxy_llm", "proxy_mllm")),
        *(f"{kind}-{stage}" for kind in ("word-groups", "words") for stage in ("instruct", "proxy_mllm")),
    ]
    assert {line["series"] for line in specs["losses-instruct"]["layer"][0]["data"]["values"]} == {
        run.name for run in runs
    }
    page = Page(text)
    assert page.text.count("Its own figures are left out, as there are more than 6 runs") == 25
    assert "Of each sample, the first 6 runs that have it." in page.text
    few = Page(runs_page(runs[:6], EDGES))
    specs = json.loads(next(s for s in few.scripts if s.startswith("{")))
    assert len(specs["run-6-loss-instruct"]["layer"][0]["data"]["values"]) <= 4 * 300 // 6
    assert "are left out" not in few.text


def test_curves_side_by_side_have_the_same_steps() -> None:
    (figure, *_) = overlaid_losses([run_data("long", num_steps=6000), run_data("short", num_steps=401)])
    assert len(figure.rows) == 750, "stretches of 8 steps"
    assert sum(short is not None for _, _, short in figure.rows) == 50, "what is left over is put to the last"
    lengths = [6000, 403, 405, 3, 9]
    (figure, *_) = overlaid_losses([run_data(f"run-{n}", num_steps=n) for n in lengths])
    xs = [row[0] for row in figure.rows]
    assert xs == [2.0, 5.0, *(10.5 + 20 * n for n in range(300))], "runs shorter than a stretch: their own middle"


def test_a_large_sweep_stays_small() -> None:
    def trial(number: int) -> dict[str, Any]:
        metrics = {f"instruct.metric_{n}": number / (n + 3) for n in range(33)}
        metrics |= {"eval.heldout.accuracy": number / 7000, "proxy_llm.nll_mean": number / 7}
        overrides = {f"stages.instruct.key_{n}": number % (n + 2) / 7 for n in range(6)}
        return {"name": f"large-{number:04}", "status": "done", "overrides": overrides, "metrics": metrics,
                "wall_time_s": 31.4159, "reason": "why " * 500}  # fmt: skip

    values = {"trials": [trial(number) for number in range(2000)], "metric": "proxy_llm.nll_mean", "mode": "min"}
    text = sweep_page("large", "/store/sweeps/large", values)
    assert len(text.encode()) < 5e6
    page = Page(text)
    assert "2 of 35 metrics; sweep.json has all." in page.text
    assert "key_5 proxy_llm.nll_mean eval.heldout.accuracy wall time, s" in page.text
    assert "large-1999 done" in page.text
    values["trials"] *= 2
    text = sweep_page("large", "/store/sweeps/large", values)
    assert len(text.encode()) < 5e6
    assert "The first 2,500 of 4,000 trials; sweep.json has all." in Page(text).text
    small = sweep_page("small", "/store/sweeps/small", {**values, "trials": values["trials"][:20]})
    assert "instruct.metric_32" in small, "where there is room, all is shown"


def test_timings_that_are_not_there_yet_are_none() -> None:
    run = run_data()
    for timings in (None, [], {"instruct": None}, {"instruct": {"resumed_from": None}}):
        text = run_page(replace(run, info={**run.info, "timings": timings}), EDGES)
        assert "Stage 3, instruct" in text
        assert "resumed after" not in text


def test_the_histogram_is_in_shares_with_the_clamp_where_it_can_be_drawn() -> None:
    (figure, _) = gain_figures(run_data(), EDGES)
    assert figure.columns == ("p − q", "step 1", "step 51")
    total = 0 + 1 + 2 + 40 + 60 + 20 + 11 + 3
    assert figure.rows[0] == ("-0.562 to -0.250", round(1 / total, 5), round(1 / (total + 50), 5))
    assert {"lower 0.05", "upper 0.5"} <= texts_of(figure)
    logit = replace(run_data(), weightings={"proxy_mllm": Weighting("logit", 1, 5)})
    (figure, _) = gain_figures(logit, EDGES)
    assert not {"lower 1", "upper 5"} & texts_of(figure)
    assert "1 to 5" in figure.note


def texts_of(figure: Figure) -> set[str]:
    return set(re.findall(r'"text": "([^"]*)"', json.dumps(figure.spec)))


def test_time_is_the_ledgers_or_else_what_the_stages_measured() -> None:
    figure = time_figure(run_data())
    assert figure is not None
    assert "Goodput 70.0%" in figure.note
    parts = ("training", "waiting for data", "saving", "starting", "lost to failures", "in all")
    assert figure.columns == ("stage", *(f"{part}, s" for part in parts))
    assert figure.rows[-1] == ("outside of stages", 0.0, 0.0, 0.0, 7.0, 0.0, 7.0)
    run = run_data()
    figure = time_figure(replace(run, info={**run.info, "goodput": None}))
    assert figure is not None
    assert figure.columns == ("stage", "training, s", "waiting for data, s", "saving, s", "other, s", "in all, s")
    assert figure.rows[:2] == [("proxy_llm", 0.0, 0.0, 0.0, 0.0, 0), ("proxy_mllm", 24.0, 6.0, 1.0, 9.0, 40.0)]
    figure = time_figure(replace(run, info={"status": "failed"}))
    assert figure is not None
    assert figure.rows[0] == ("proxy_llm", 24.0, 6.0, 30.0)


def test_runs_stand_side_by_side() -> None:
    figures = overlaid_losses([run_data("one"), run_data("two", shift=0.4)])
    assert [figure.columns for figure in figures] == [("step", "one", "two")] * 3
    page = Page(runs_page([run_data("one"), run_data("two", shift=0.4)], EDGES))
    assert "one dpa 3 done 50 30 20 20" in page.text
    assert "two dpa 3 done 54 30 20 24" in page.text
    headings = "question truth one two"
    assert headings in page.text


def test_a_run_that_failed_early_says_why() -> None:
    warned = [{"stage": "instruct", "step": 7, "kind": "spike", "text": "instruct: a spike at step 7"}]
    run = RunData("early", "/store/runs/early", {"status": "failed", "error": HOSTILE, "warnings": warned})
    page = Page(run_page(run, EDGES))
    assert "warning instruct: a spike at step 7" in page.text
    assert f"error {HOSTILE}" in page.text
    for reason in (
        "There are no steps yet.",
        "No stage of this run measured",
        "No held-out questions",
        "Nothing was measured",
    ):
        assert reason in page.text


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"trials": []},
        {"trials": [{"status": "running"}], "stages": {"instruct": {}}, "gpu_s": {"spent": 3}},
        {"trials": [{"overrides": {"a": [1, 2]}, "metrics": {"b": None}}, 7, {"overrides": None}], "compare": {"metrics": {"b": [{}], "c": 3}}},
        {"trials": [{"status": "done", "overrides": {"a": a}, "metrics": {"b": float("nan")}} for a in (1, float("inf"))]},
        {"trials": "none", "stages": [], "gpu_s": 3, "compare": "later", "metric": 4},
    ],
)  # fmt: skip
def test_a_sweep_that_has_only_begun_is_shown(values: dict[str, Any]) -> None:
    assert "What sharing saved" in Page(sweep_page("s", "/store/sweeps/s", values)).text


def test_a_sweep_shows_its_best_trial_its_cost_and_its_intervals() -> None:
    page = Page(sweep_page("ranks", "/store/sweeps/ranks", sweep()))
    assert "best trial ranks-0007, stages.proxy_llm.lora.rank 512, cmo.upper 0.5, method dpa: 0.7" in page.text
    assert "the better is the larger" in page.text
    assert "9 trials: 8 done, 1 failed." in page.text
    assert "proxy_llm 9 3 6" in page.text
    assert "spent, worker seconds 410" in page.text
    assert "saved 54%" in page.text
    assert "vanilla 5 0 0.7 0.02 – – – –" in page.text
    assert "cmo 5 0 0.71 0.02 0.01 -0.02 0.04 no difference shown" in page.text
    assert "dpa 5 0 0.74 0.02 0.04 0.01 0.07 higher" in page.text


def test_figures_are_of_finished_trials_alone() -> None:
    """What a stopped trial told last is not what it would have come to."""
    page = Page(sweep_page("ranks", "/store/sweeps/ranks", sweep()))
    specs = json.loads(next(s for s in page.scripts if s.startswith("{")))
    assert len(specs["heat-map"]["data"]["values"]) == 8
    assert {value["trial"] for value in specs["parallel"]["layer"][0]["data"]["values"]} == {
        f"ranks-{n:04}" for n in range(9) if n != 4
    }
    assert "ranks-0004 failed" in page.text, "the table has it"


def test_numbers_as_they_are_read() -> None:
    assert [shown(v) for v in (None, 0.123456, 12345.6, 1234567, "a")] == ["–", "0.1235", "12,346", "1,234,567", "a"]
    assert number_columns([("a", 1, None), ("b", None, None)]) == [1]
    assert number_columns([]) == []
    assert json.loads(as_json({"a": "</script>&\u2028"})) == {"a": "</script>&\u2028"}
    assert "<" not in as_json("</script>")


def test_keys_are_shortened_no_further_than_they_differ() -> None:
    assert short(["stages.a.lora.rank", "cmo.upper", "seed"]) == ["lora.rank", "cmo.upper", "seed"]
    assert short(["stages.a.lora.rank", "stages.b.lora.rank"]) == ["a.lora.rank", "b.lora.rank"]
    assert short(["lr", "lr"]) == ["lr", "lr"]


def test_the_end_of_a_stage_is_its_last_tenth() -> None:
    assert last_mean([{"nll": float(n)} for n in range(20)], "nll") == 18.5
    assert last_mean([{"nll": None}], "nll") is None
    assert last_mean([], "nll") is None
