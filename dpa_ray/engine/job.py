"""The main job as a driver runs it: recipe -> plan -> pipeline on Ray -> what a person sees."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from dpa_ray.credentials import without_credentials
from dpa_ray.data.retry import bridging, retried
from dpa_ray.engine import placing, prometheus, reporting, stopping
from dpa_ray.engine.evaluate import RESULT
from dpa_ray.engine.messages import FAILED, PROGRESS
from dpa_ray.engine.node_logs import NodeLogs
from dpa_ray.errors import LeaseTaken, UserError
from dpa_ray.recipe import HELD_OUT, Recipe
from dpa_ray.report import console, trackers
from dpa_ray.report.goodput import CLAIMED, LAUNCHED, WAITING, Ledger
from dpa_ray.report.metrics import FILE as METRICS
from dpa_ray.report.metrics import read
from dpa_ray.report.watch import Watch
from dpa_ray.stages import arithmetic
from dpa_ray.stages.pipeline import Claim, Pipeline, Plan, make_plan
from dpa_ray.stages.runs import RUN_FILE, Run, identity
from dpa_ray.stages.spec import BLIND, ArtifactRef, Task
from dpa_ray.store import lease, probe
from dpa_ray.store.artifacts import find
from dpa_ray.store.fs import Store

KEEP_GOODPUT_EVERY_S = 10.0
"""So often at most, when something is saved (and always, when workers failed), run.json says how time was spent."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Company:
    """What a run among others, in a sweep, is told; a run alone has none."""

    group: str  # the sweep's name
    observe: Callable[[str, dict[str, Any]], None]  # is told of every event, and of "planned" with artifacts by stage
    claim: Callable[[Sequence[Task], Claim], int]  # as Claim; the second is what a run alone would be told
    commits: Mapping[str, str] = field(
        default_factory=dict
    )  # of models from the hub, by name, for all runs of the sweep


def run(recipe: Recipe, company: Company | None = None) -> dict[str, Any]:
    """Run `recipe` to its end, or from where an earlier attempt left it; returns what run.json says.

    What another job is making, it waits for, without holding workers.
    Raises: RecipeError where the run's name is taken; LeaseTaken where another process is at work on it; UserError for
        whatever the user can mend. Finished stages and checkpoints are kept in every case.
    """
    store = Store(recipe.store, through=retried)
    store.check()
    run_record = Run(store, recipe)
    run_record.check_name()
    trackers.check(recipe.trackers)
    device = "GPU" if recipe.cluster.gpus_per_worker else "CPU"
    console.header(recipe, device=device, store=store.uri)
    with (
        bridging(recipe.data.retry_s, _print),
        lease.held(store, f"{run_record.path}/lease", report=_print, lost=lambda: None) as held,
    ):
        run_record.check_name()  # again: another run may have had the lease meanwhile
        run_record.confirm = held.confirm

        def check() -> None:
            if held.taken:
                raise LeaseTaken(f"{store.url(held.path)}, the lease of this run: {held.why}")

        ledger = Ledger(run_record.started, run_record.earlier_goodput())
        run_record.goodput = lambda: ledger.entries(time.time())

        brief = store.brief()  # who watches the workers must not wait for the store

        def keep_run() -> None:
            if held.taken:
                return
            try:
                run_record.write("running", brief)
            except (UserError, OSError) as err:  # the next time, perhaps; training does not need it
                _log.warning("run.json is not written for now: %s", err)

        with console.Progress() as progress:
            shared = {} if company is None else company.commits
            commits = {**shared, **run_record.commits}
            plan = make_plan(recipe, store, make=True, report=progress.note, commits=commits)
            run_record.commits = plan.commits
            pipeline = Pipeline(plan, store, run_record, progress.note)
            view = View(progress, recipe, run_record, ledger, keep_run, company)
            if company is not None:
                company.observe("planned", {"artifacts": {name: ref.path for name, ref in plan.refs.items()}})

            def claim(tasks: Sequence[Task]) -> int:
                check()
                alone = partial(unhindered, store=store, report=progress.note)
                ledger.saw(WAITING, {}, time.time())
                num_mine = alone(tasks) if company is None else company.claim(tasks, alone)
                ledger.saw(CLAIMED, {}, time.time())
                return num_mine

            try:
                if plan.needed:
                    _look_ahead(plan, store, progress.note)
                pipeline.carry_out(
                    lambda tasks: _launch(tasks, store, recipe, view, check),
                    start=lambda: _start(recipe, view),
                    claim=claim,
                )
            except BaseException as err:
                _failed(err, run_record, view, Store(recipe.store))
                raise
            _close(view, store)
            view.logs.ended()
        check()
        return _closing(plan, pipeline, store, run_record, ledger)


def _close(view: View, store: Store) -> None:
    """The end of a run's events. What it made does not depend on the trackers' files."""
    try:
        view.close(store, "done")
    except (UserError, OSError) as err:
        view.progress.note(f"the trackers' files could not be written: {err}")


def _failed(err: BaseException, run_record: Run, view: View, store: Store) -> None:
    """Write down what can be of a run that ends with `err`, which matters more than that something cannot be; `store`
    does not wait."""
    status: trackers.Status = "failed" if isinstance(err, Exception) else "stopped"
    try:
        if run_record.values:  # else nothing was begun
            run_record.write(status, store, error=without_credentials(str(err)) or type(err).__name__)
        view.close(store, status)
        if run_record.values and isinstance(err, Exception):  # who interrupts does not want to wait
            _write_report(store, run_record.recipe, view.progress.note)
    except (UserError, OSError) as also:
        view.progress.note(f"not everything about this run's end could be written: {also}")
    view.logs.ended(err, begun=bool(run_record.values))


def _write_report(store: Store, recipe: Recipe, note: Callable[[str], None]) -> bool:
    """runs/<name>/report.html. What a run made does not depend on it: a report that cannot be made is told, no more."""
    place = reporting.Place(store, "runs", recipe.name)
    try:
        reporting.write_report(place)
    except Exception as err:
        note(f"no report was made ({type(err).__name__}: {err}); python jobs/report.py {place.url} tries again")
        return False
    return True


def unhindered(tasks: Sequence[Task], store: Store, report: Callable[[str], None]) -> int:
    """How many of the leading tasks no other job is at work on; 0 where the first is done. Waits for who does the first."""
    first = tasks[0].result

    def is_made(result: ArtifactRef) -> bool:
        return find(store, result.stage, result.key) is not None

    def is_left(task: Task) -> bool:
        return not is_made(task.result) and not lease.looks_held(store, task.result.lease)

    note = partial(_note, report, first.stage)
    lease.wait(store, first.lease, until=lambda: is_made(first), report=note)
    return 0 if is_made(first) else 1 + len(list(takewhile(is_left, tasks[1:])))


def _note(report: Callable[[str], None], stage: str, text: str) -> None:
    report(f"{stage}: {text}")


def _print(text: str) -> None:
    console.terminal().print(text, soft_wrap=True)


def _look_ahead(plan: Plan, store: Store, note: Callable[[str], None]) -> None:
    """The cheap part of `jobs/doctor.py`. Raises: UserError where the store refuses what a run asks of it."""
    recipe = plan.recipe
    layouts = [arithmetic.batch_layout(recipe, s, recipe.cluster.max_workers) for s in plan.stages if s in plan.needed]
    for text in (*probe.check(store), *(text for layout in layouts for text in arithmetic.risks(layout))):
        note(text)


def _start(recipe: Recipe, view: View) -> None:
    from dpa_ray.engine import launch  # Ray takes seconds to import, and a run that reuses everything needs none

    view.open_trackers()
    if (job := stopping.submission_id()) is not None:
        view.progress.note(stopping.hint(job))
    start = time.perf_counter()
    where = launch.connect(recipe.cluster)
    launch.check_reach(view.run_record.store)
    view.exporter = prometheus.Exporter(recipe.name)
    view.logs.joined()
    view.progress.note(f"{where}, up in {time.perf_counter() - start:.0f} s")
    launch.check_resources(recipe.cluster)
    nodes = launch.node_resources()
    placed = placing.place(nodes, recipe.cluster, recipe.data.workers, launch.node_labels())
    for text in placing.problems(placed, nodes, recipe.cluster):
        view.progress.note(text)
    if not placed.is_possible:
        view.progress.note(f"waiting for nodes, {recipe.cluster.start_timeout_s:g} s at most (cluster.start_timeout_s)")


def _launch(tasks: Sequence[Task], store: Store, recipe: Recipe, view: View, check: Callable[[], None]) -> None:
    from dpa_ray.engine import launch

    view.ledger.saw(LAUNCHED, {}, time.time())
    view.keep_run()
    launch.launch(tasks, store, recipe.cluster, view.handle, check)


class View:
    """The workers' events: to the screen, the trackers and the ledger of the run's time."""

    def __init__(
        self,
        progress: console.Progress,
        recipe: Recipe,
        run_record: Run,
        ledger: Ledger,
        keep_run: Callable[[], None],
        company: Company | None = None,
    ):
        """`keep_run` writes run.json: what a job that is killed has spent, and what it warned of, is not forgotten."""
        self.progress = progress
        self.company = company
        self.recipe = recipe
        self.run_record = run_record
        self.watch = Watch(recipe, run_record.warnings, self._steps_before)
        self.folder = Path(tempfile.mkdtemp(prefix="dpa_ray-"))
        self.trackers: trackers.Trackers | None = None
        self.exporter: prometheus.Exporter | None = None  # from when Ray is there
        self.logs = NodeLogs(run_record.store, run_record.path)
        progress.heard = self.logs.tell
        self.ledger, self.keep_run = ledger, keep_run
        self.kept_at_s = 0.0

    def _identity(self) -> str:
        """Of the run, by which trackers know it again: what it is, and where."""
        place = f"{identity(self.recipe)} {self.run_record.store.uri}"
        return hashlib.sha256(place.encode()).hexdigest()[:12]

    def open_trackers(self) -> None:
        """Before anything starts: a tracking server that does not answer is told at once."""
        group = None if self.company is None else self.company.group
        self.trackers = trackers.Trackers(
            self.recipe.trackers, self.folder, self.recipe.name, self._identity(), self.recipe.to_dict(), group
        )

    def handle(self, kind: str, values: dict[str, Any], at_s: float) -> None:
        """One event of rank 0."""
        self.ledger.saw(kind, values, at_s)
        if self.exporter is not None:
            self.exporter.saw(kind, values, self.ledger.entries(at_s))
        self.logs.saw(kind, values)
        if kind == FAILED or (kind in PROGRESS and at_s - self.kept_at_s >= KEEP_GOODPUT_EVERY_S):
            self.kept_at_s = at_s
            self.keep_run()
        if self.company is not None:
            self.company.observe(kind, values)
        if kind == "stage_started":
            names = values.pop("names")
            self.progress.stage_started(values["stage"], values["num_steps"], values["trainable"])
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            self.progress.note(
                f"{values['stage']} trains {values['trainable']}: {values['num_parameters']:,} parameters in "
                f"{len(names)} tensors ({shown})"
            )
        elif kind == "step":
            values.pop("saving_s")
            self.progress.step(values)
            if (line := console.held_out_line(values)) is not None:
                self.progress.note(line)
            self._watch(values)
            if self.trackers is not None:
                self.trackers.log(values["stage"], values["step"], values)
        elif kind == "note":
            self.progress.note(values["text"])
        elif kind == "stage_finished":
            self.progress.stage_finished()
        elif kind == "blind_started":
            self.progress.shards_started("blind", values["num_shards"], values["num_done"])
        elif kind == "blind_shard":
            self.progress.shard(values["num_samples"])
        elif kind == "blind_finished":
            self.progress.stage_finished()
        elif kind == "task_started":
            texts = {"proxy_merged": "putting the proxy together", "eval": "answering and reading held-out questions"}
            if values["stage"] in texts:
                self.progress.note(texts[values["stage"]])

    def _watch(self, record: dict[str, Any]) -> None:
        """Tell what may be going wrong, and write it to run.json."""
        new = self.watch.step(record)
        if self.run_record.warnings == self.watch.warnings:
            return
        self.run_record.warnings = self.watch.warnings.copy()
        for warned in new:
            self.progress.note(f"warning: {warned['text']}")
        self.keep_run()

    def _steps_before(self, stage: str) -> list[dict[str, Any]]:
        """The stage's steps in the run's metrics so far, as far as they can be read: no warning is worth a run."""
        try:
            every = read(self.run_record.store.brief(), self.run_record.path)
        except (UserError, OSError):
            return []
        return [record for record in every if record["stage"] == stage]

    def close(self, store: Store, status: trackers.Status) -> None:
        """TensorBoard's files into the store: runs/<name>/tensorboard, and the sweep's folder."""
        if self.trackers is not None:
            self.trackers.close(status)
        files = [p for p in self.folder.rglob("*") if p.is_file() and not p.is_symlink()]
        events = self.folder / trackers.TENSORBOARD_FOLDER
        try:
            if files:
                names = [p.relative_to(self.folder).as_posix() for p in files]
                store.upload(self.folder, self.run_record.path, names)
            if self.company is not None and events.is_dir():  # all trials of a sweep under one folder
                place = f"sweeps/{self.company.group}/{trackers.TENSORBOARD_FOLDER}/{self.recipe.name}"
                store.upload(events, place)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def _closing(plan: Plan, pipeline: Pipeline, store: Store, run_record: Run, ledger: Ledger) -> dict[str, Any]:
    """The tables at the end, and the finished run.json."""
    rows, stages = [], {}
    for stage in plan.shown:
        artifact = plan.found.get(stage)
        if artifact is None:  # not needed: a later stage's artifact is there
            continue
        meta, reused = artifact.manifest["meta"], stage in pipeline.reused
        rows.append(
            console.StageRow(
                stage,
                meta.get("trainable", "imported")
                if stage not in BLIND.values()
                else f"q of {meta['num_samples']:,} samples",
                meta.get("num_steps", 0),
                meta.get("loss_first"),
                meta.get("loss_last"),
                meta.get("wall_time_s", 0.0),
                reused,
                store.url(artifact.path),
                is_trained=stage not in BLIND.values(),
            )  # fmt: skip
        )
        stages[stage] = {
            "reused": reused, "num_steps": meta.get("num_steps", 0), "wall_time_s": meta.get("wall_time_s", 0.0),
            "loss_first": meta.get("loss_first"), "loss_last": meta.get("loss_last"),
            "saving_s": meta.get("saving_s", 0.0), "resumed_from": meta.get("resumed_from", []),
        }  # fmt: skip
    scores = {}
    if "eval" in plan.found:
        scores = json.loads((plan.refs["eval"].fetched(store, [RESULT]) / RESULT).read_text())
    made = sum(s["wall_time_s"] for s in stages.values() if not s["reused"])
    ledger.ended(time.time())
    run_record.write("done", timings=stages, eval=scores, totals={"stages_wall_time_s": made})
    path = run_record.path
    places = {"model": f"{path}/model", "metrics": f"{path}/{METRICS}", "run": f"{path}/{RUN_FILE}"}
    if _write_report(store, plan.recipe, _print):
        places["report"] = f"{path}/{reporting.FILE}"
    console.closing_table(rows, paths={name: store.url(where) for name, where in places.items()})
    console.goodput_table(ledger.entries(time.time()))
    if scores:
        order = sorted(scores, key=lambda name: name != HELD_OUT)
        console.nll_table({name: scores[name] for name in order})
        console.accuracy_table(
            [
                console.AccuracyRow(
                    name,
                    scores[name]["num_questions"],
                    scores[name]["accuracy"],
                    scores[name]["majority"],
                    scores[name]["shuffled"],
                )  # fmt: skip
                for name in order
            ]
        )
    return run_record.values
