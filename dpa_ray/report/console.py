"""What does a person see of a run? A header, live progress per stage, and at the end what came of it.

At a terminal the progress is a live line per stage; elsewhere (a log file, a job on a cluster) a plain line now and
then. Paths and keys are never cut or broken: they are there to be copied. Plain data only; nothing here knows Ray.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table

from dpa_ray.recipe import Recipe

PLAIN_FRACTION = 0.1
PLAIN_EVERY_S = 10.0
PLAIN_ELAPSED_FRACTION = 0.01
"""Without a terminal a line comes after 10 % of a stage's steps or 10 s; of a long stage, after 1 % of its time."""

WINDOW = 20
"""Steps that the shown speed is the mean of."""


@dataclass(frozen=True)
class StageRow:
    """One stage of the closing table."""

    stage: str
    trained: str  # what was trained, e.g. "connector"
    num_steps: int
    loss_first: float | None
    loss_last: float | None
    time_s: float  # of making it, also where it is reused
    reused: bool
    artifact: str  # where it is: a whole path or URI
    is_trained: bool = True  # else it has neither steps nor losses


@dataclass(frozen=True)
class PlanRow:
    """One stage of a plan."""

    stage: str
    key: str  # content key
    reused: bool | None  # None: not known, for the store cannot be asked
    num_steps: int | None  # None: not known before the data is prepared
    trainable: Mapping[str, int] | None = field(default_factory=dict)  # what is trained -> number of parameters
    is_trained: bool = True  # else it has no steps


@dataclass(frozen=True)
class AccuracyRow:
    """Exact match on one held-out split, 0..1, beside what answers without sight reach."""

    split: str
    num_questions: int
    exact_match: float
    majority: float  # the most frequent answer to each question text, as the other half of the set has it
    shuffled: float  # the trained model, each question with another's image


def terminal(file: IO[str] | None = None, width: int | None = None) -> Console:
    """`file` (default: standard output as it is now); words in brackets and file names are printed as they are."""
    return Console(file=file, width=width, markup=False, highlight=False, emoji=False)


def header(recipe: Recipe, *, device: str, store: str, to: Console | None = None) -> None:
    """What runs, on what, and where its results go."""
    engine = f"deepspeed ZeRO-{recipe.deepspeed.zero_stage}" if recipe.engine == "deepspeed" else recipe.engine
    fewest, most = recipe.cluster.min_workers, recipe.cluster.max_workers
    workers = _count(most, "worker") if fewest == most else f"{fewest} to {_count(most, 'worker')}"
    model = f"{recipe.model.llm} + {recipe.model.vision} (layer {recipe.model.vision_layer})"
    console = to or terminal()
    console.print(f"dpa_ray: {recipe.name}", style="bold", soft_wrap=True)
    _paths(
        {
            "method": f"{recipe.method}, seed {recipe.seed}",
            "model": model,
            "device": f"{device}, {workers}, {engine}, {recipe.precision}",
            "store": store,
        },
        console,
    )
    console.print()


def plan(
    rows: Sequence[PlanRow], *, recipe: Recipe | None = None, ignored: Sequence[str] = (), to: Console | None = None
) -> None:
    """What a run would do: the resolved recipe, each stage with its key, and the sections that nobody reads."""
    console = to or terminal()
    if recipe is not None:
        text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True, width=1000)
        console.print(text, soft_wrap=True)
    table = plain_table("stage", "key", "will be", ">steps", "trained", ">parameters")
    for row in rows:
        names, counts = "?", "?"
        if row.trainable is not None:
            names = "\n".join(row.trainable) or "nothing"
            counts = "\n".join(f"{count:,}" for count in row.trainable.values())
        steps = "-" if not row.is_trained else "?" if row.num_steps is None else str(row.num_steps)
        fate = "?" if row.reused is None else "reused" if row.reused else "made"
        table.add_row(row.stage, row.key, fate, steps, names, counts)
    console.print(table)
    if ignored:
        console.print(f"ignored by this method: {', '.join(ignored)}", soft_wrap=True)


def closing_table(
    rows: Sequence[StageRow], *, paths: Mapping[str, str] | None = None, to: Console | None = None
) -> None:
    """What each stage came to, and where everything is; `paths`: further places by name (model, metrics, ...)."""
    console = to or terminal()
    table = plain_table("stage", "trained", ">steps", ">loss first", ">last", ">time", "")
    for row in rows:
        table.add_row(
            row.stage,
            row.trained,
            str(row.num_steps) if row.is_trained else "-",
            _loss(row.loss_first),
            _loss(row.loss_last),
            duration(row.time_s),
            "reused" if row.reused else "made",
        )
    console.print()
    console.print(table)
    console.print()
    num_reused = sum(row.reused for row in rows)
    console.print(f"stages: {num_reused} reused, {len(rows) - num_reused} made")
    _paths({**{row.stage: row.artifact for row in rows}, **(paths or {})}, console)


def accuracy_table(rows: Sequence[AccuracyRow], to: Console | None = None) -> None:
    """Exact match beside the two baselines without sight, in percent, and the points above the better of them."""
    table = plain_table("held-out split", ">questions", ">exact match", ">majority", ">shuffled", ">gain")
    for row in rows:
        gain = row.exact_match - max(row.majority, row.shuffled)
        shares = [f"{100 * share:.1f} %" for share in (row.exact_match, row.majority, row.shuffled)]
        table.add_row(row.split, str(row.num_questions), *shares, f"{100 * gain:+.1f}")
    console = to or terminal()
    console.print()
    console.print(table)


def nll_table(scores: Mapping[str, Mapping[str, Any]], to: Console | None = None) -> None:
    """Held-out nll by split (`HeldOutNll` as a mapping), with the image and without: of all targets, of the visual ones."""
    table = plain_table(
        "held-out split", ">targets", ">nll", ">no image", ">visual", ">nll", ">no image"
    )  # fmt: skip
    for split, score in scores.items():
        row = [split]
        for names in (("num_targets", "nll", "nll_blind"), ("num_visual", "visual_nll", "visual_nll_blind")):
            count, *means = (score.get(name) for name in names)
            row += ["-" if count is None else f"{count:,}", *("-" if mean is None else f"{mean:.3f}" for mean in means)]
        table.add_row(*row)
    console = to or terminal()
    console.print()
    console.print(table)


def held_out_line(record: Mapping[str, Any]) -> str | None:
    """What a step's metrics say of held-out data, for people; None where the step was not evaluated."""
    if record.get("eval_nll") is None:
        return None
    told = []
    for what, key in (("nll", "eval_nll"), ("visual words", "eval_visual_nll")):
        seen, blind = record.get(key), record.get(f"{key}_blind")
        if seen is not None:
            told.append(f"{what} {seen:.3f}" + ("" if blind is None else f" (without the image {blind:.3f})"))
    return f"{record['stage']} step {record['step']}, held out: {', '.join(told)}"


_PART_HEADS = {
    "training": "train", "data_wait": "data", "saving": "save", "starting": "start", "lost": "lost", "tasks": "tasks",
    "preparing": "prep.", "other": "other",
}  # fmt: skip
"""What a column of wall time is called: all of them fit beside each other in 80 characters."""


def goodput_table(entries: Mapping[str, Any], to: Console | None = None) -> None:
    """Where the wall time went (`Ledger.entries`): a row a stage, a row for what belongs to none, and the whole.

    Parts that nothing was spent on have no column.
    """
    stages = {**entries["stages"], "outside": entries["outside_stages"], "in all": entries}
    columns = {f"{part}_s": head for part, head in _PART_HEADS.items() if entries[f"{part}_s"] > 0}
    table = plain_table("wall, s", *(f">{head}" for head in columns.values()), ">sum")
    table.columns[0].no_wrap = True
    for name, parts in stages.items():
        times = [parts[key] for key in columns]
        if sum(times) > 0:
            table.add_row(name, *map(_seconds, times), _seconds(sum(times)))
    console = to or terminal()
    console.print()
    console.print(table)
    restarts = entries["num_restarts"]
    told = f", workers replaced {restarts} time{'' if restarts == 1 else 's'}" if restarts else ""
    attempts = f" over {_count(entries['num_attempts'], 'attempt')}" if entries["num_attempts"] > 1 else ""
    console.print(f"goodput: {100 * entries['goodput']:.1f} % of {duration(entries['wall_time_s'])}{attempts}{told}")


class Progress:
    """Live progress of the stages, one after the other; use it as a context.

    `clock` gives seconds, for tests.
    """

    def __init__(self, to: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.console = to or terminal()
        self.clock = clock
        self.heard: Callable[[str], None] = lambda text: None  # is told every note
        self.stage = ""
        self.num_steps = 0
        self._pace = _Pace()
        self._loss = ""
        self._begun_s = self._printed_s = 0.0
        self._printed_step = 0
        self._num_done = self._num_samples = 0
        self._task: TaskID | None = None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
        )
        self._bars = Bars(*columns, console=self.console, disable=not self.console.is_terminal)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def stage_started(self, stage: str, num_steps: int, trainable: str, first_step: int = 1) -> None:
        """A stage begins (or goes on at `first_step`); `trainable` describes what is trained."""
        self.stage, self.num_steps, self._pace, self._loss = stage, num_steps, _Pace(), ""
        self._begun_s = self._printed_s = self.clock()
        self._printed_step = first_step - 1
        resumed = f", goes on at step {first_step}" if first_step > 1 else ""
        self.note(f"{stage}: trains {trainable}; {_count(num_steps, 'step')}{resumed}")
        self._task = self._bars.add_task(stage, total=num_steps, completed=first_step - 1, state="starts")

    def step(self, record: Mapping[str, Any]) -> None:
        """One line of metrics came: `step`, `loss`, `num_samples`, `step_time_s`."""
        step, now_s = record["step"], self.clock()
        self._pace.add(record)
        self._loss = f"loss {_loss(record.get('loss'))}  "
        state = self._loss + self._pace.shown(self.num_steps - step)
        if self.console.is_terminal:
            assert self._task is not None, "stage_started comes first"
            self._bars.update(self._task, completed=step, state=state)
        elif self._is_due(step, now_s):
            self._printed_step, self._printed_s = step, now_s
            self.console.print(f"{self.stage}  step {step}/{self.num_steps}  {state}", soft_wrap=True)

    def stage_finished(self, text: str = "done") -> None:
        """The stage under way is done."""
        elapsed = duration(self.clock() - self._begun_s)
        if self._task is not None:
            self._bars.update(self._task, state=f"{self._loss}{text} in {elapsed}", refresh=True)
        if not self.console.is_terminal:
            self.console.print(f"{self.stage}: {text} in {elapsed}", soft_wrap=True)
        self._task = None

    def shards_started(self, name: str, num_shards: int, num_done: int) -> None:
        """A job over shards begins, or goes on."""
        self.stage, self.num_steps, self._loss = name, num_shards, ""
        self._num_done, self._num_samples = num_done, 0
        self._begun_s = self._printed_s = self.clock()
        self._printed_step = num_done
        there = f", {num_done:,} of them are there already" if num_done else ""
        self.note(f"{name}: {_count(num_shards, 'shard')}{there}")
        self._task = self._bars.add_task(name, total=num_shards, completed=num_done, state="starts")

    def shard(self, num_samples: int) -> None:
        """One more shard is done."""
        now_s = self.clock()
        self._num_done += 1
        self._num_samples += num_samples
        rate = self._num_samples / max(1e-9, now_s - self._begun_s)
        state = f"{rate:,.0f} samples/s"
        if self.console.is_terminal:
            assert self._task is not None, "shards_started comes first"
            self._bars.update(self._task, completed=self._num_done, state=state)
        elif self._is_due(self._num_done, now_s):
            self._printed_step, self._printed_s = self._num_done, now_s
            self.console.print(f"{self.stage}: {self._num_done}/{self.num_steps} shards, {state}", soft_wrap=True)

    def note(self, text: str) -> None:
        """A line of its own, above the live ones."""
        self.heard(text)
        self.console.print(text, soft_wrap=True)

    def _is_due(self, step: int, now_s: float) -> bool:
        """Is a plain line worth its place in a log?"""
        if self._printed_step == 0 or step == self.num_steps:
            return True
        interval_s = max(PLAIN_EVERY_S, PLAIN_ELAPSED_FRACTION * (now_s - self._begun_s))
        return step - self._printed_step >= PLAIN_FRACTION * self.num_steps or now_s - self._printed_s >= interval_s


class _Pace:
    """How fast it goes, from the last steps' own times."""

    def __init__(self) -> None:
        self.steps: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def add(self, record: Mapping[str, Any]) -> None:
        samples, time_s = record.get("num_samples"), record.get("step_time_s")
        if samples is not None and time_s:
            self.steps.append((samples, time_s))

    def shown(self, num_left: int) -> str:
        """`S samples/s  T left`, as far as it is known."""
        time_s = sum(t for _, t in self.steps)
        if not time_s:
            return ""
        rate = sum(n for n, _ in self.steps) / time_s
        return f"{rate:,.{0 if rate >= 10 else 2}f} samples/s  {duration(num_left * time_s / len(self.steps))} left"


def duration(time_s: float) -> str:
    """Seconds as a person says them: 0.4 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if time_s < 9.95:
        return f"{time_s:.1f} s"
    minutes, seconds = divmod(round(time_s), 60)
    if minutes == 0:
        return f"{seconds} s"
    if minutes < 60:
        return f"{minutes} min {seconds:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _seconds(time_s: float) -> str:
    """At most five characters up to 999 hours: 0.4, 27, 4321, 3.4 h."""
    if time_s >= 9999.5:
        return f"{time_s / 3600:.1f} h" if time_s < 359_820 else f"{time_s / 3600:.0f} h"
    return f"{time_s:.1f}" if time_s < 9.95 else f"{time_s:.0f}"


def plain_table(*columns: str) -> Table:
    """A plain table; a column's `>` aligns it to the right. What does not fit is folded, never cut."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return table


def _paths(places: Mapping[str, str], console: Console) -> None:
    width = max(map(len, places), default=0)
    for name, place in places.items():
        console.print(f"  {name:<{width}}  {place}", soft_wrap=True)


def _loss(loss: float | None) -> str:
    return "-" if loss is None or not math.isfinite(loss) else f"{loss:.3f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
