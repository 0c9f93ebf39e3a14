"""What does a person want to see of a run, or of several side by side?"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpa_ray.report.content import STAGES, RunData, Weighting, last_mean, mapping, number
from dpa_ray.report.figures import Cell
from dpa_ray.report.page import Asked, Block, Drawing, Facts, Section, Shaded, Table, Token, render
from dpa_ray.report.run_figures import (
    MOST_POINTS,
    gain_figures,
    loss_figures,
    overlaid_losses,
    resumed_from,
    time_figure,
)
from dpa_ray.report.timeline_figure import timeline_figure
from dpa_ray.report.word_figures import by_name_or_method, word_section

NUM_EXAMPLES = 6
"""Samples of a stage that are shown with the weights of their tokens, in a report of one run."""

NUM_ASKED, MOST_ASKED = 8, 48
"""Samples of a held-out set whose questions are shown, and of all sets together."""

MOST_ANSWERED = 400
"""Of a set, samples times runs that answered."""

MAX_TOKENS, MAX_PICTURES = 250, 4
"""Of a sample: with a table of the tokens beside it, more make the page too large to send around."""

MOST_IN_FULL = 6
"""Runs side by side that are shown with figures of their own, and with the weights of their tokens; for the same reason."""


def run_page(run: RunData, edges: Sequence[float]) -> str:
    """The report of one run. `edges`: of the bins of gain_histogram."""
    method, seed = _recipe(run, "method"), _recipe(run, "seed")
    sections = [
        Section("what", "What was run", [_facts(run)]),
        _scores([run]),
        _losses(run),
        _gains(run, edges),
        word_section([(run.name, run)]),
        _words([run]),
        _questions([run]),
        _time(run),
    ]
    return render(f"Run {run.name}", f"Method {method}, seed {seed}; {_status(run)}.", sections)


def runs_page(runs: Sequence[RunData], edges: Sequence[float]) -> str:
    """The report of several runs side by side; a single one is shown on its own."""
    if len(runs) == 1:
        return run_page(runs[0], edges)
    sections = [
        _scores(runs),
        Section("losses", "Loss curves", [Drawing(f) for f in overlaid_losses(runs)]),
        word_section(*by_name_or_method(runs)),
        _words(runs),
        _questions(runs),
    ]
    sections += [_of_one_among_several(run, place, edges, len(runs)) for place, run in enumerate(runs, 1)]
    return render(f"{len(runs)} runs", ", ".join(run.name for run in runs), sections)


# -- what was run


def _recipe(run: RunData, key: str) -> Any:
    return mapping(run.info.get("recipe")).get(key, "–")


def _status(run: RunData) -> str:
    return str(run.info.get("status", "of unknown status"))


def _facts(run: RunData) -> Facts:
    info, recipe = run.info, mapping(run.info.get("recipe"))
    model, data = mapping(recipe.get("model")), mapping(recipe.get("data"))
    rows = [("status", _status(run))]
    if info.get("error"):
        rows.append(("error", str(info["error"])))
    rows += [("left out", text) for text in run.unread]
    warnings = info.get("warnings")
    for warned in warnings if isinstance(warnings, list) else []:
        rows.append(("warning", str(mapping(warned).get("text", warned))))
    rows += [("method", str(info.get("method", "–"))), ("seed", str(recipe.get("seed", "–")))]
    rows += [(name, _weights_told(w)) for name, w in run.weightings.items()]
    rows += [("LLM", str(model.get("llm", "–"))), ("vision tower", str(model.get("vision", "–")))]
    rows += [
        (f"data.{name}", _source(data[name]))
        for name in ("pretrain", "instruct", "eval")
        if isinstance(data.get(name), dict)
    ]
    if (started := number(info.get("started"))) is not None:
        rows.append(("started", f"{datetime.datetime.fromtimestamp(started, datetime.UTC):%Y-%m-%d %H:%M} UTC"))
    if (wall_s := number(info.get("wall_time_s"))) is not None:
        rows.append(("wall time of the last attempt", f"{wall_s:,.0f} s"))
    rows.append(("folder", run.url))
    return Facts(rows, [("The resolved recipe", run.recipe_text)] if run.recipe_text else [])


def _weights_told(weighting: Weighting) -> str:
    kinds = {
        "uniform": "all tokens count the same",
        "prob": "weights p − q",
        "logit": "weights by the logits' difference",
    }
    told = kinds.get(weighting.kind, weighting.kind)
    return told if weighting.kind == "uniform" else f"{told}, in {weighting.lower:g} to {weighting.upper:g}"


def _source(section: Mapping[str, Any]) -> str:
    source, options = section.get("source"), mapping(section.get("options"))
    told = [str(source if not isinstance(source, list) else f"a mixture of {len(source)} sources")]
    return ", ".join(told + [f"{k} {v}" for k, v in options.items() if v is not None])


# -- scores


NLL = {
    "nll": "nll", "nll_blind": "nll, no image", "visual_nll": "visual words: nll",
    "visual_nll_blind": "visual words: nll, no image",
}  # fmt: skip
"""Of a held-out set, in run.json's `eval`."""


def _scores(runs: Sequence[RunData]) -> Section:
    sets = list(dict.fromkeys(name for run in runs for name in mapping(run.info.get("eval"))))
    columns = ["run", "method", "seed", "status"]
    for name in sets:
        columns += [f"{name}: exact match, %", f"{name}: majority, %", f"{name}: shuffled, %", f"{name}: lead, points"]
        columns += [f"{name}: {text}" for text in NLL.values()]
    columns += [f"{stage}: nll at the end" for stage in STAGES if any(stage in run.stages for run in runs)]
    rows: list[tuple[Cell, ...]] = []
    for run in runs:
        row: list[Cell] = [run.name, str(run.info.get("method", "–")), _cell(_recipe(run, "seed")), _status(run)]
        for name in sets:
            score = mapping(mapping(run.info.get("eval")).get(name))
            row += [*_accuracy(score), *(number(score.get(key)) for key in NLL)]
        row += [last_mean(run.of_stage(stage), "nll_mean") for stage in STAGES if any(stage in r.stages for r in runs)]
        rows.append(tuple(row))
    note = (
        "Without sight: majority is the most frequent answer to each question text as the other half of the set has it, "
        "shuffled the model shown another sample's image; the lead is over the better of them. " if sets else "No held-out set was evaluated. "
    )  # fmt: skip
    note += "The nll at the end is the mean over the last tenth of a stage's steps."
    return Section("scores", "Scores", [Table("scores-table", "Scores by run", tuple(columns), rows)], note)


def _accuracy(score: Mapping[str, Any]) -> list[Cell]:
    right, majority, shuffled = (number(score.get(key)) for key in ("accuracy", "majority", "shuffled"))
    lead = None if right is None or majority is None or shuffled is None else right - max(majority, shuffled)
    return [None if value is None else round(100 * value, 1) for value in (right, majority, shuffled, lead)]


def _cell(value: Any) -> Cell:
    return value if isinstance(value, str | int | float) or value is None else str(value)


# -- figures


def _losses(run: RunData) -> Section:
    drawings: list[Block] = [Drawing(figure) for figure in loss_figures(run)]
    return Section("losses", "Loss curves", drawings, "" if drawings else "There are no steps yet.")


def _gains(run: RunData, edges: Sequence[float]) -> Section:
    drawings: list[Block] = [Drawing(figure) for figure in gain_figures(run, edges)]
    note = "" if drawings else "No stage of this run measured p − q: none weighs its tokens, or none was made."
    return Section("gains", "What the image adds: p − q", drawings, note)


def _time(run: RunData) -> Section:
    figures = [figure for figure in (timeline_figure(run), time_figure(run)) if figure is not None]
    blocks: list[Block] = [*_faults(run, 0), *(Drawing(figure) for figure in figures)]
    return Section("time", "Where the time went", blocks, "" if blocks else "Nothing was measured yet.")


def _faults(run: RunData, place: int) -> list[Block]:
    """What became of each stage: made or reused, and where it was taken up again."""
    rows: list[tuple[Cell, ...]] = []
    for stage, told in mapping(run.info.get("timings")).items():
        timing = mapping(told)
        again = ", ".join(f"after step {step}" for step in resumed_from(run, stage)) or "–"
        how = "reused" if timing.get("reused") else "made"
        wall_s = None if timing.get("reused") else number(timing.get("wall_time_s"))
        rows.append((stage, how, _cell(timing.get("num_steps")), wall_s, again))
    blocks: list[Block] = []
    goodput = mapping(run.info.get("goodput"))
    if goodput:
        facts = [("goodput", f"{share:.1%}")] if (share := number(goodput.get("goodput"))) is not None else []
        names = {
            "wall_time_s": "wall time of all attempts, s",
            "num_attempts": "attempts",
            "num_restarts": "workers replaced",
        }
        facts += [(text, f"{v:,.0f}") for key, text in names.items() if (v := number(goodput.get(key))) is not None]
        blocks.append(Facts(facts))
    if rows:
        columns = ("stage", "made or reused", "steps", "wall time, s", "taken up again")
        blocks.append(Table(f"stages-{place}", f"Stages of {run.name}", columns, rows, is_sortable=False))
    return blocks


def _of_one_among_several(run: RunData, place: int, edges: Sequence[float], num_runs: int) -> Section:
    """What only this run has, with names of its own in the page."""
    if num_runs > MOST_IN_FULL:
        note = f"Its own figures are left out, as there are more than {MOST_IN_FULL} runs; its own report has them."
        return Section(
            f"run-{place}", f"Run {run.name}", [_facts(replace(run, recipe_text="")), *_faults(run, place)], note
        )
    figures = [*loss_figures(run, MOST_POINTS // num_runs), *gain_figures(run, edges)]
    figures += [figure for figure in (timeline_figure(run), time_figure(run)) if figure is not None]
    drawings = [Drawing(replace(figure, name=f"run-{place}-{figure.name}")) for figure in figures]
    return Section(f"run-{place}", f"Run {run.name}", [_facts(run), *_faults(run, place), *drawings])


# -- samples


def _words(runs: Sequence[RunData]) -> Section:
    blocks: list[Block] = []
    for stage in STAGES:
        blocks += _of_stage(runs, stage, max(2, NUM_EXAMPLES // len(runs)))
    if not blocks:
        return Section("words", "Which words the image explains", [],
                       "No stage of these runs left samples with the weights of their tokens.")  # fmt: skip
    note = (
        "The more a token weighs in the loss of the stage, by the model that the stage ended with, the stronger its colour; "
        "where all weigh the same, its p − q. Grey text is given, not learnt. Words that the image is known to show are "
        "underlined. Samples are taken evenly from the training data."
    )
    if len(runs) > MOST_IN_FULL:
        note += f" Of each sample, the first {MOST_IN_FULL} runs that have it."
    return Section("words", "Which words the image explains", blocks, note)


def _of_stage(runs: Sequence[RunData], stage: str, most: int) -> Iterator[Block]:
    by_place: dict[str, list[tuple[RunData, Mapping[str, Any]]]] = {}
    for run in runs:
        for example in run.examples.get(stage, ()):
            by_place.setdefault(str(example["place"]), []).append((run, example))
    for place, found in list(by_place.items())[:most]:
        texts = [
            (run.name, _tokens(example["tokens"], run.weightings.get(stage))) for run, example in found[:MOST_IN_FULL]
        ]
        pictures, num_more = _few(found[0][1]["images"])
        yield Shaded(f"{stage}: {place}", pictures, texts, num_more)


def _few(pictures: Sequence[str]) -> tuple[Sequence[str], int]:
    """Those that are shown, and how many are not."""
    return pictures[:MAX_PICTURES], max(0, len(pictures) - MAX_PICTURES)


def _tokens(tokens: Sequence[Sequence[Any]], weighting: Weighting | None) -> list[Token]:
    """Tokens with their shade: the weight as a share of the upper bound, or p - q where all weigh the same."""
    by_gain = weighting is None or weighting.kind == "uniform"
    made = []
    for text, weight, gain, is_visual in tokens[:MAX_TOKENS]:
        if weight is None:
            made.append(Token(str(text), None, None, None, bool(is_visual)))
            continue
        assert by_gain or weighting is not None
        low, high = (0.0, 1.0) if weighting is None or by_gain else (weighting.lower, weighting.upper)
        share = ((gain if by_gain else weight) - low) / (high - low) if high > low else 1.0
        made.append(Token(str(text), round(min(1.0, max(0.0, share)), 3), weight, gain, bool(is_visual)))
    if len(tokens) > MAX_TOKENS:
        made.append(Token(" …", None, None, None, False))
    return made


def _questions(runs: Sequence[RunData]) -> Section:
    found: dict[tuple[str, int], dict[tuple[str, str], dict[str, tuple[str, bool]]]] = {}
    for run in runs:
        for answer in run.answers:
            asked = found.setdefault((str(answer["set"]), int(answer["sample"])), {})
            key = str(answer["question"]), str(answer["expected"])
            asked.setdefault(key, {})[run.name] = str(answer["answer"]), bool(answer["right"])
    names = tuple(run.name for run in runs if run.answers)
    blocks: list[Block] = []
    sets = list(dict.fromkeys(name for name, _ in found))
    most = min(NUM_ASKED, max(1, MOST_ASKED // max(1, len(sets))), max(1, MOST_ANSWERED // len(runs)))
    for held_out in sets:
        for sample in [sample for name, sample in found if name == held_out][:most]:
            pictures, num_more = _few(
                next((r.pictures[held_out, sample] for r in runs if (held_out, sample) in r.pictures), ())
            )
            rows = [
                (question, truth, [answers.get(name, ("–", False)) for name in names])
                for (question, truth), answers in found[held_out, sample].items()
            ]
            blocks.append(Asked(f"{held_out}, sample {sample}", pictures, names, rows, num_more))
    note = f"The first {most} samples of each held-out set." if blocks else "No held-out questions were answered."
    return Section("questions", "Held-out questions", blocks, note)
