"""When did what happen in a run? Spans of time by what went on, and events, over all attempts; small whatever the run's length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_SPANS = 300
"""That are kept; where there would be twice as many, short ones are put together with their neighbours."""

MOST_EVENTS = 200
SHORTEST_S = 0.05
"""What is shorter never stands alone."""

ATTEMPT, RESTART, SAVED = "attempt", "restart", "saved"
"""Kinds of events: a job begins, its workers are gone or were replaced, a checkpoint is there."""


@dataclass
class Span:
    """What went on in a stage (or outside of any, "") from `start_s` on; times as by time.time."""

    stage: str
    kind: str
    start_s: float
    length_s: float

    @property
    def end_s(self) -> float:
        return self.start_s + self.length_s


@dataclass
class Event:
    """Something that happened; `step` where it is of a step."""

    at_s: float
    kind: str
    stage: str
    step: int | None = None


class Timeline:
    """Collects; see `entries`. Kinds in `apart` are never put together with others, however short."""

    def __init__(self, before: Mapping[str, Any] | None = None, apart: tuple[str, ...] = ()):
        """`before`: the `entries` of earlier attempts at the same run."""
        before = before or {}
        self.apart = apart
        self.spans = [Span(*values) for values in before.get("spans", [])]
        self.events = [Event(*values) for values in before.get("events", [])]

    def add(self, stage: str, kind: str, start_s: float, end_s: float) -> None:
        """Time from `start_s` to `end_s` was of this kind; spans come in the order of time."""
        if end_s <= start_s:
            return
        _append(self.spans, Span(stage, kind, start_s, end_s - start_s))
        if len(self.spans) > 2 * MOST_SPANS:
            shortest_s = SHORTEST_S
            while len(self.spans) > MOST_SPANS and shortest_s < self.spans[-1].end_s - self.spans[0].start_s:
                self.spans = together(self.spans, shortest_s, self.apart)
                shortest_s *= 2

    def happened(self, at_s: float, kind: str, stage: str, step: int | None = None) -> None:
        self.events.append(Event(at_s, kind, stage, step))
        while len(self.events) > MOST_EVENTS:
            saved = [event for event in self.events if event.kind == SAVED]
            # every second checkpoint, and of what is left the oldest
            gone = saved[1::2] or self.events[: len(self.events) - MOST_EVENTS]
            self.events = [event for event in self.events if not any(event is other for other in gone)]

    def entries(self, under_way: Span | None = None) -> dict[str, Any]:
        """What run.json keeps: `spans`, [stage, kind, start_s, length_s] each, and `events`, [at_s, kind, stage, step].

        `under_way`: what goes on now, which is not added.
        """
        spans = together(self.spans, SHORTEST_S, self.apart)
        if under_way is not None and under_way.length_s > 0:
            spans.append(under_way)
        return {
            "spans": [[s.stage, s.kind, round(s.start_s, 2), round(s.length_s, 2)] for s in spans],
            "events": [[round(e.at_s, 2), e.kind, e.stage, e.step] for e in self.events],
        }


def together(spans: list[Span], shortest_s: float, apart: tuple[str, ...] = ()) -> list[Span]:
    """The same time in fewer spans: those shorter than `shortest_s` that follow each other in a stage become one, of the
    kind that most of its time is of; where they are short even so, they are put to the span before them."""
    found: list[Span] = []
    group: list[Span] = []

    def close() -> None:
        if group:
            spent: dict[str, float] = {}
            for span in group:
                spent[span.kind] = spent.get(span.kind, 0.0) + span.length_s
            first, kind = group[0], max(spent, key=lambda kind: spent[kind])
            whole = Span(first.stage, kind, first.start_s, group[-1].end_s - first.start_s)
            last = found[-1] if found else None
            if last and whole.length_s < shortest_s and last.kind not in apart and _follows(last, whole):
                whole.kind = last.kind
            _append(found, whole)
            group.clear()

    for span in spans:
        is_short = span.length_s < shortest_s and span.kind not in apart
        if group and (not is_short or not _follows(group[-1], span)):
            close()
        if not is_short:
            _append(found, span)
            continue
        group.append(span)
        if sum(s.length_s for s in group) >= shortest_s:
            close()
    close()
    return found


def _follows(last: Span, span: Span) -> bool:
    """Is it of the same stage, and no time between them?"""
    return last.stage == span.stage and span.start_s - last.end_s < SHORTEST_S


def _append(spans: list[Span], span: Span) -> None:
    last = spans[-1] if spans else None
    if last and last.kind == span.kind and _follows(last, span):
        spans[-1] = Span(last.stage, last.kind, last.start_s, span.end_s - last.start_s)
    else:
        spans.append(span)
