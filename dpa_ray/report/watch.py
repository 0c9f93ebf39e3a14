"""Does a stage's training go wrong while its numbers are still finite? What the paper saw, told once a stage, calmly.

Stage 1: the loss bounces or rises, as when the proxy is trained in full instead of by a LoRA (arXiv 2509.14735). Stage 3:
the loss of the words that the image shows rises while that of the others falls: the LLM learns the answers' style. Any
stage: one step far above those before it. Stage 2's loss is not watched for rises: its captions are those that the proxy
was trained on, and the loss depends on which ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from dpa_ray.recipe import Recipe
from dpa_ray.report.trend import Rise, Trend

Record = Mapping[str, Any]
"""A line of metrics."""

Warned = dict[str, Any]
"""stage, step, kind, text: as it stands in run.json."""

KEPT = (
    "stage", "step", "updated", "loss", "grad_norm", "nll_mean", "weight_mean", "nll_mean_visual", "nll_mean_style",
)  # fmt: skip
"""Of each step's metrics: what a stage that goes on in the middle is looked at anew from."""

SPIKE_WINDOW = 50
"""Steps before a step that say what is usual."""

SPIKE_SPREADS, SPIKE_LEAST = 4.0, 0.5
"""A loss is a spike so many times as far above the median as any of the window, and by so much of the median."""

SPIKE_NORMS = 20.0
"""A gradient norm is one so many times the largest of the window."""


@dataclass
class _Stage:
    """What was seen of one stage."""

    records: list[Record] = field(default_factory=list)
    loss: Trend = field(default_factory=Trend)
    visual: Trend = field(default_factory=Trend)
    style: Trend = field(default_factory=Trend)


class Watch:
    """Looks at each step's metrics as they come. Steps that are made again take the place of what they were."""

    def __init__(
        self,
        recipe: Recipe,
        told: Sequence[Warned] = (),
        history: Callable[[str], Sequence[Record]] = lambda stage: (),
    ):
        """
        Args:
            told: warnings of an earlier attempt at the run.
            history: the steps of a stage that an earlier attempt made, for one that goes on in the middle.
        """
        self.recipe = recipe
        self.warnings: list[Warned] = [dict(warned) for warned in told]
        self._history = history
        self._stages: dict[str, _Stage] = {}

    def step(self, record: Record) -> list[Warned]:
        """Take a step's metrics; what is to be told now, if anything."""
        stage, step = record["stage"], record["step"]
        seen = self._stages.setdefault(stage, _Stage())
        if step == 1:  # the stage begins, or begins anew
            self.warnings = [warned for warned in self.warnings if warned["stage"] != stage]
        if step != len(seen.records) + 1:
            before = seen.records or self._history(stage)
            seen = self._stages[stage] = _Stage()
            for earlier in before[: step - 1]:
                if earlier["step"] == len(seen.records) + 1:
                    self._look(seen, earlier)
        new = []
        for kind, text in self._look(seen, record):
            if all((warned["stage"], warned["kind"]) != (stage, kind) for warned in self.warnings):
                new.append({"stage": stage, "step": step, "kind": kind, "text": f"{stage}, step {step}: {text}"})
                self.warnings.append(new[-1])
        return new

    def _look(self, seen: _Stage, record: Record) -> list[tuple[str, str]]:
        """(kind, text) of what this step shows."""
        found = []
        if (spike := _spike(seen.records, record)) is not None:
            found.append(("spike", f"{spike}. {self._advice_on_spikes(record['stage'])}"))
        seen.records.append({key: record[key] for key in KEPT if key in record})
        loss = record.get("loss")
        if not record.get("updated", True):  # without any weight there is no loss
            return found
        if record["stage"] == "proxy_llm" and loss is not None:
            rise = seen.loss.add(loss)
            if rise is not None:
                found.append(("rise", self._of_stage_1(rise)))
        if record["stage"] == "instruct" and (parts := self._parts(record)) is not None:
            of_style = seen.style.add(parts[1])
            rise = seen.visual.add(parts[0])
            fell = seen.style.fell(rise) if rise is not None else None
            if rise is not None and fell is not None and of_style is None:
                found.append(("style", self._of_stage_3(rise, fell, "nll_mean_visual" in record)))
        return found

    def _parts(self, record: Record) -> tuple[float, float] | None:
        """The mean loss of what the image shows, and of the rest: of the words themselves where they are known; else
        of all tokens, weighted by what the image helps with each, and by what it does not."""
        known = record.get("nll_mean_visual"), record.get("nll_mean_style")
        if known[0] is not None and known[1] is not None:
            return known[0], known[1]
        upper, weight = self.recipe.bounds("instruct")[1], record.get("weight_mean")
        loss, nll = record.get("loss"), record.get("nll_mean")
        if self.recipe.weights("instruct") == "uniform" or not weight or loss is None or nll is None or upper <= weight:
            return None
        return loss, (upper * nll - weight * loss) / (upper - weight)

    def _of_stage_1(self, rise: Rise) -> str:
        section = self.recipe.stages.proxy_llm
        other = f"stages.proxy_llm.lora.rank ({section.lora.rank})" if section.llm == "lora" else "train a LoRA instead"
        return (
            f"the loss {_course(rise)}. A proxy whose loss does that is no good stand-in for the captions' language; it is "
            f"what training in full does instead of a LoRA. The run goes on; if it stays so, lower stages.proxy_llm.lr "
            f"({section.lr:.3g}) or {other}"
        )

    def _of_stage_3(self, rise: Rise, fell: tuple[float, float], known: bool) -> str:
        what, others = ("words that the image shows", "others")
        if not known:
            what, others = "tokens, weighted by what the image helps with them,", "rest"
        if self.recipe.weights("instruct") == "uniform":
            do = "set stages.instruct.weights=prob, so that tokens count by what the image helps with them"
        else:
            do = f"lower cmo.lower ({self.recipe.bounds('instruct')[0]:g}) or stages.instruct.lr ({self.recipe.stages.instruct.lr:.3g})"
        return (
            f"the loss of the {what} {_course(rise)}, while that of the {others} falls ({fell[0]:.3g} to {fell[1]:.3g}): the "
            f"LLM learns how answers are said, not what is seen. The run goes on; if it stays so, {do}"
        )

    def _advice_on_spikes(self, stage: str) -> str:
        section = getattr(self.recipe.stages, stage)
        clip = f"gradients are clipped to {section.grad_clip:g}" if section.grad_clip else "gradients are not clipped"
        return f"The run goes on ({clip}); where it comes again and again, lower stages.{stage}.lr ({section.lr:.3g})"


def _course(rise: Rise) -> str:
    return (
        f"{'bounces' if rise.bounces else 'rises'}: about {rise.before:.3g} around step {rise.step_before}, "
        f"{rise.after:.3g} around step {rise.step_after} (means of {rise.length} steps; a single step's noise is "
        f"{rise.noise:.2g})"
    )


def _spike(before: Sequence[Record], record: Record) -> str | None:
    """Is this step far above the ones before it?"""
    window = before[-SPIKE_WINDOW:]
    if len(window) < SPIKE_WINDOW:
        return None
    found = []
    losses = [r["loss"] for r in window if r.get("loss") is not None]
    loss = record.get("loss")
    if loss is not None and losses:
        usual, highest = median(losses), max(losses)
        if loss - usual > max(SPIKE_SPREADS * (highest - usual), SPIKE_LEAST * abs(usual)):
            found.append(f"the loss is {loss:.3g}, after {highest:.3g} at most in {len(window)} steps")
    norms = [r["grad_norm"] for r in window if r.get("grad_norm")]
    norm = record.get("grad_norm")
    if norm is not None and math.isfinite(norm) and norms and norm > SPIKE_NORMS * max(norms):
        found.append(f"the gradient's norm is {norm:.3g}, after {max(norms):.3g} at most in {len(window)} steps")
    return " and ".join(found) or None
