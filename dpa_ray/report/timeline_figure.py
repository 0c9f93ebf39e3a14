"""What does a run's timeline look like? A row for each stage, with what went on in it, and the events over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpa_ray.report.content import RunData, mapping, number
from dpa_ray.report.figures import ROW, TICKS, Cell, Figure, Spec, whole
from dpa_ray.report.goodput import PARTS, WAITING
from dpa_ray.report.timeline import ATTEMPT, RESTART, SAVED, Event, Span, together

KINDS = {
    "training": "training",
    "data_wait": "waiting for data",
    "saving": "saving",
    "starting": "starting",
    "lost": "lost to failures",
    "tasks": "merging, q, eval",
    "preparing": "preparing",
    WAITING: "waiting for another job",
    "other": "other",
}
assert set(KINDS) == {*PARTS, WAITING}

EVENTS = {RESTART: "workers replaced", SAVED: "saved", "reused": "reused"}
SHAPES = {RESTART: "triangle-down", SAVED: "M0,-1L0,1", "reused": "diamond"}
OUTSIDE = "outside of stages"
ORDER = (OUTSIDE, "proxy_llm", "proxy_merged", "blind", "proxy_mllm", "blind_instruct", "instruct", "eval")

FINEST = 300
"""Parts of the whole that can be told apart in a drawing; what is shorter is drawn with its neighbours."""

MOST_ROWS = 400
UNITS = ((3 * 3600.0, 3600.0, "hours"), (300.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


def timeline_figure(run: RunData) -> Figure | None:
    """From the ledger in run.json; None where there is none, as in runs of older versions."""
    told = mapping(mapping(run.info.get("goodput")).get("timeline"))
    spans, events = _spans(told.get("spans")), _events(told.get("events"))
    if not spans:
        return None
    clock = _Clock([e.at_s for e in events if e.kind == ATTEMPT], spans)
    shown = together(spans, clock.length_s / FINEST, apart=("lost",))
    reused = [name for name, made in mapping(run.info.get("artifacts")).items() if mapping(made).get("reused")]
    events += [Event(clock.last_start_s, "reused", str(name).replace("-", "_")) for name in reused]
    scale, unit = next((scale, name) for least, scale, name in UNITS if clock.length_s >= least)
    bars: list[Spec] = [
        {
            "stage": _row(span.stage), "kind": KINDS.get(span.kind, span.kind), "x": _short(clock(span.start_s) / scale),
            "x2": _short((clock(span.start_s) + span.length_s) / scale), "seconds": _short(span.length_s),
        }
        for span in shown
    ]  # fmt: skip
    points: list[Spec] = [
        {
            "stage": _row(event.stage), "x": _short(clock(event.at_s) / scale), "event": EVENTS[event.kind],
            "step": event.step,
        }
        for event in events if event.kind in EVENTS
    ]  # fmt: skip
    starts = [{"x": clock(at_s) / scale, "attempt": n} for n, at_s in enumerate(clock.starts_s, 1)][1:]
    named = dict.fromkeys([*(bar["stage"] for bar in bars), *(point["stage"] for point in points)])
    stages = [*(stage for stage in ORDER if stage in named), *(stage for stage in named if stage not in ORDER)]
    note = "At a dashed line another attempt begins; the time between them is left out." if starts else ""
    if shown != spans:
        note += f" What took less than {clock.length_s / FINEST:.2g} s is drawn with what was beside it."
    rows = _rows(shown, events, clock)
    if len(rows) > MOST_ROWS:
        rows = sorted(sorted(rows, key=lambda row: -float(row[1] or 0))[:MOST_ROWS], key=lambda row: float(row[0] or 0))
        note += f" The table has the {MOST_ROWS} longest."
    spec = _spec(bars, points, starts, stages, f"{unit} since the run began")
    return Figure("timeline", "Timeline", spec, ("at, s", "for, s", "stage", "what"), rows, note.strip())


class _Clock:
    """Seconds since a run began, without the time between its attempts."""

    def __init__(self, starts_s: Sequence[float], spans: Sequence[Span]):
        self.starts_s = sorted(starts_s) or [spans[0].start_s]
        self.last_start_s = self.starts_s[-1]
        bounds = [*self.starts_s[1:], float("inf")]
        ends = [
            max([start, *(s.end_s for s in spans if start <= s.start_s < bound)])
            for start, bound in zip(self.starts_s, bounds, strict=True)
        ]
        self.before = [0.0]
        for start, end in zip(self.starts_s, ends, strict=True):
            self.before.append(self.before[-1] + end - start)
        self.length_s = max(self.before[-1], 1e-3)

    def __call__(self, at_s: float) -> float:
        attempt = max(0, sum(start <= at_s + 1e-6 for start in self.starts_s) - 1)
        return min(self.before[attempt] + max(0.0, at_s - self.starts_s[attempt]), self.before[attempt + 1])


def _spans(told: Any) -> list[Span]:
    found = []
    for values in told if isinstance(told, list) else []:
        if isinstance(values, list) and len(values) == 4:
            start_s, length_s = number(values[2]), number(values[3])
            if start_s is not None and length_s is not None:
                found.append(Span(str(values[0]), str(values[1]), start_s, length_s))
    return found


def _events(told: Any) -> list[Event]:
    found = []
    for values in told if isinstance(told, list) else []:
        if isinstance(values, list) and len(values) == 4 and (at_s := number(values[0])) is not None:
            step = values[3] if isinstance(values[3], int) else None
            found.append(Event(at_s, str(values[1]), str(values[2]), step))
    return found


def _row(stage: str) -> str:
    return stage or OUTSIDE


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _rows(spans: Sequence[Span], events: Sequence[Event], clock: _Clock) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = [
        (round(clock(span.start_s), 1), round(span.length_s, 1), _row(span.stage), KINDS.get(span.kind, span.kind))
        for span in spans
    ]
    starts = 0
    for event in sorted(events, key=lambda event: event.at_s):
        if event.kind == ATTEMPT:
            starts += 1
            what = f"attempt {starts} begins"
        else:
            what = EVENTS.get(event.kind, event.kind) + (f", step {event.step}" if event.step is not None else "")
        rows.append((round(clock(event.at_s), 1), None, _row(event.stage), what))
    return sorted(rows, key=lambda row: float(row[0] or 0))


def _spec(bars: list[Spec], points: list[Spec], starts: list[Spec], stages: Sequence[str], x: str) -> Spec:
    kinds = [name for name in KINDS.values() if any(bar["kind"] == name for bar in bars)]
    names = [EVENTS[kind] for kind in EVENTS if any(point["event"] == EVENTS[kind] for point in points)]
    row = {"field": "stage", "type": "nominal", "sort": list(stages), "title": None}
    layers: list[Spec] = [
        {
            "data": {"values": bars},
            "mark": {"type": "bar", "tooltip": True, "cornerRadius": 0, "height": {"band": 0.55}},
            "encoding": {
                "y": row,
                "x": {"field": "x", "type": "quantitative", "title": x, "axis": TICKS, "scale": {"nice": False}},
                "x2": {"field": "x2"},
                "color": {"field": "kind", "type": "nominal", "sort": kinds, "title": None},
            },
        }
    ]
    if points:
        shapes = [shape for kind, shape in SHAPES.items() if EVENTS[kind] in names]
        layers.append(
            {
                "data": {"values": points},
                "mark": {"type": "point", "filled": False, "size": 60, "strokeWidth": 2, "opacity": 1, "tooltip": True},
                "encoding": {
                    "y": row,
                    "yOffset": {"value": ROW * 0.1},  # above the bars
                    "x": {"field": "x", "type": "quantitative"},
                    "shape": {"field": "event", "type": "nominal", "title": None, "sort": names,
                              "scale": {"domain": names, "range": shapes}, "legend": {"orient": "top"}},
                },
            }
        )  # fmt: skip
    if starts:
        dashed = {"type": "rule", "strokeDash": [5, 3], "tooltip": True}
        layers.append(
            {"data": {"values": starts}, "mark": dashed, "encoding": {"x": {"field": "x", "type": "quantitative"}}}
        )
    return whole(layers, height=ROW * len(stages))
