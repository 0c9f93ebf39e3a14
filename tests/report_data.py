"""Made-up runs and sweeps for the tests of reports, with words in them that would like to be markup."""

from __future__ import annotations

import io
import math
from base64 import b64encode
from typing import Any

from PIL import Image

from dpa_ray.report.content import RunData, Weighting, WordLosses

HOSTILE = "</script><img src=x onerror=\"window.broken=1\"><b>'bold'</b> {{ 7*7 }}"
EDGES = [(-1.0 if i < 4 else 1.0) * ((i - 4) / 4) ** 2 for i in range(9)]


def picture(colour: tuple[int, int, int] = (200, 60, 40)) -> str:
    """A PNG as a data URI."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(file, "PNG")
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def record(stage: str, step: int, shift: float = 0.0) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    loss = shift + 4 * math.exp(-step / 20)
    found: dict[str, Any] = {
        "stage": stage, "step": step, "epoch": 0, "loss": loss, "nll_mean": loss + 0.5, "step_time_s": 0.5,
        "data_wait_s": 0.1,
    }  # fmt: skip
    if stage != "proxy_llm":
        found |= {"nll_mean_visual": loss + 1, "nll_mean_style": loss, "weight_at_lower_fraction": 0.5,
                  "weight_at_upper_fraction": 0.125}  # fmt: skip
        if step % 25 == 1:
            found["gain_histogram"] = [0, 1, 2, 40, 60, 20, 10 + step, 3]
    return found


def words_of(shift: float = 0.0, *, is_known: bool = True) -> WordLosses:
    """Twelve visual words and twenty-eight others, learnt the less the more the image helps; `shift` helps the visual. In an
    expression of Vega's "if" is a word of its own, as a text too."""
    names = [
        *(f"red-{n}" for n in range(12)),
        *(f"style-{n}" for n in range(18)),
        "if",
        *(f"style-{n}" for n in range(18, 26)),
        HOSTILE.lower(),
    ]
    rows = [
        {"word": name, "count": 40 - n, "num_tokens": 1.5, "nll_before": 5.0 - n / 20, "nll_after": 3.0 - n / 30 - shift * (n < 12),
         "gain": 0.3 - n / 100 if n < 12 else 0.01, "visual": float(is_known and n < 12)}
        for n, name in enumerate(names)
    ]  # fmt: skip
    return WordLosses("held-out", "200", rows)


def timeline(start_s: float = 1.8e9) -> dict[str, Any]:
    """130 s in two attempts, an hour apart; in the first, workers were lost."""
    parts = [
        ("", "preparing", 3.0), ("", "starting", 7.0), ("proxy_mllm", "training", 40.0), ("proxy_mllm", "saving", 5.0),
        ("proxy_mllm", "lost", 12.0), ("proxy_mllm", "training", 3.0), ("instruct", "training", 20.0), ("instruct", "data_wait", 4.0),
        ("instruct", "saving", 6.0), ("eval", "tasks", 30.0),
    ]  # fmt: skip
    spans, at_s = [], start_s
    for stage, kind, length_s in parts:
        if (stage, kind) == ("instruct", "training"):
            at_s += 3600
        spans.append([stage, kind, at_s, length_s])
        at_s += length_s
    second = start_s + 3670
    events = [[start_s, "attempt", "", None], [start_s + 50, "saved", "proxy_mllm", 40], [start_s + 55, "restart", "proxy_mllm", None],
              [second, "attempt", "", None], [second + 30, "saved", "instruct", 60]]  # fmt: skip
    return {"spans": spans, "events": events}


def run_data(name: str = "one", *, method: str = "dpa", shift: float = 0.0, num_steps: int = 60) -> RunData:
    """A finished run of three stages with everything that a report can show."""
    stages = ("proxy_llm", "proxy_mllm", "instruct")
    tokens = [["Describe", None, None, False], [" a", 0.05, -0.01, False], [f" {HOSTILE}", 0.31, 0.3, True],
              [" square", 0.5, 0.9, True], [".\n", 0.05, 0.0, False]]  # fmt: skip
    example = {"id": "7", "place": f"captions.json#7 {HOSTILE}", "images": [picture()], "tokens": tokens}
    answers = [
        {"set": "heldout", "sample": s, "question": q, "expected": e, "answer": a, "shuffled": a, "right": a == e}
        for s in range(3)
        for q, e, a in (("What colour?", "red", "red"), (f"Which {HOSTILE}?", HOSTILE, "blue"))
    ]
    recipe = {
        "method": method, "seed": 3, "model": {"llm": HOSTILE, "vision": "builtin:tiny-vit"},
        "data": {"pretrain": {"source": "captions.json", "options": None}},
    }  # fmt: skip
    parts = {"training_s": 30.0, "data_wait_s": 5.0, "saving_s": 2.0, "lost_s": 4.0}
    return RunData(
        name=name,
        url=f"/store/runs/{name}",
        info={
            "name": name, "status": "done", "method": method, "started": 1.8e9, "wall_time_s": 130.0, "recipe": recipe,
            "timings": {
                s: {"reused": s == "proxy_llm", "num_steps": num_steps, "wall_time_s": 40.0, "saving_s": 1.0,
                    "resumed_from": [20] if s == "instruct" else []}
                for s in stages
            },
            "eval": {"heldout": {"num_questions": 6, "accuracy": 0.5 + shift / 10, "shuffled": 0.2, "majority": 0.3}},
            "goodput": {
                "goodput": 0.7, "wall_time_s": 130.0, "num_attempts": 2, "num_restarts": 1,
                "stages": dict.fromkeys(stages, parts), "outside_stages": {"starting_s": 7.0}, "timeline": timeline(),
            },
            "artifacts": {"proxy-llm": {"key": "0", "reused": True}, "instruct": {"key": "1", "reused": False}},
        },
        metrics=[record(stage, step, shift) for stage in stages for step in range(1, num_steps + 1)],
        recipe_text=f"model:\n  llm: {HOSTILE}\n",
        weightings={
            "proxy_llm": Weighting("uniform", 1, 1),
            "proxy_mllm": Weighting("prob", 0.05, 0.5),
            "instruct": Weighting("prob", 0.05, 0.5),
        },
        examples={"proxy_mllm": [example], "instruct": [example]},
        words={"proxy_mllm": words_of(shift), "instruct": words_of(shift, is_known=False)},
        answers=answers,
        pictures={("heldout", s): [picture((40, 60, 80 * s))] for s in range(3)},
    )  # fmt: skip


def sweep() -> dict[str, Any]:
    """A sweep.json of 3 ranks x 3 bounds, one trial failed, and a comparison of methods."""
    trials: list[dict[str, Any]] = []
    for number, (rank, upper) in enumerate((r, u) for r in (128, 256, 512) for u in (0.3, 0.5, 1.0)):
        score = 0.5 + 0.1 * math.log2(rank / 128) - 0.2 * (upper - 0.5) ** 2
        trials.append(
            {
                "number": number, "name": f"ranks-{number:04}", "status": "done",
                "overrides": {"stages.proxy_llm.lora.rank": rank, "cmo.upper": upper, "method": "dpa"},
                "metrics": {"eval.heldout.accuracy": score, "instruct.nll_mean": 2 - score},
                "wall_time_s": 30.0,
            }
        )  # fmt: skip
    trials[4] |= {"status": "failed", "metrics": {"instruct.nll_mean": 9.0}, "reason": f"loss is not finite {HOSTILE}"}

    def row(name: str, mean: float, low: float | None, verdict: str) -> dict[str, Any]:
        difference = None if low is None else {
            "num_pairs": 5, "mean": round(mean - 0.7, 3), "low": low, "high": round(2 * (mean - 0.7) - low, 3),
            "verdict": verdict,
        }  # fmt: skip
        return {"variant": name, "num_seeds": 5, "num_failed": 0, "mean": mean, "std": 0.02, "difference": difference}

    rows = [
        row("vanilla", 0.7, None, ""),
        row("cmo", 0.71, -0.02, "no difference shown"),
        row("dpa", 0.74, 0.01, "higher"),
    ]
    return {
        "name": "ranks", "status": "done", "search": "grid", "metric": "eval.heldout.accuracy", "mode": "max",
        "trials": trials, "best": "ranks-0007", "left_out": [{"cmo.upper": 0.01}], "device": "cpu", "wall_time_s": 300.5,
        "stages": {s: {"asked": 9, "made": m, "reused": 9 - m} for s, m in
                   (("proxy_llm", 3), ("blind", 3), ("proxy_mllm", 9), ("instruct", 9))},
        "gpu_s": {"spent": 410.0, "naive": 900.0},
        "compare": {"baseline": "vanilla", "level": 0.95, "metrics": {"eval.heldout.accuracy": rows}},
    }  # fmt: skip
