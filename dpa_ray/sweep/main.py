"""A sweep from its recipe and space to its table: the checks before, the trials, and what is said at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpa_ray.data.retry import bridging, retried
from dpa_ray.engine import reporting
from dpa_ray.errors import NoAnswer, UserError
from dpa_ray.recipe import Recipe, RecipeError, parse
from dpa_ray.report import trackers
from dpa_ray.report.console import terminal
from dpa_ray.stages.pipeline import Pipeline, make_plan
from dpa_ray.stages.runs import Run, settle
from dpa_ray.store import lease
from dpa_ray.store.fs import Store
from dpa_ray.sweep import measures, screen
from dpa_ray.sweep.compare import compared, comparison
from dpa_ray.sweep.record import FILE, FINISHED, Record, one_line
from dpa_ray.sweep.search import Grid, Optuna, Random, Search
from dpa_ray.sweep.sharing import chain
from dpa_ray.sweep.space import (
    SETTINGS,
    SettingsSection,
    Space,
    describe,
    laid_over,
    load_space,
    metric_variants,
    parse_space,
)

COMPARED = (".accuracy", ".nll", ".visual_nll")
"""Held-out numbers that --compare tells of besides its metric."""


@dataclass(frozen=True)
class Options:
    """What the command was told; None: the space file's setting, else the default."""

    name: str | None = None
    space: Path | None = None
    compare: tuple[str, ...] = ()
    seeds: int = 5
    search: str | None = None
    trials: int | None = None
    time_budget_s: float | None = None
    max_concurrent: int | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Plan:
    """A sweep that was checked."""

    name: str
    space: Space
    search: Search
    settings: SettingsSection
    what: dict[str, Any]  # what sweep.json says of how it searches

    @property
    def asha_mode(self) -> str:
        asha = self.settings.asha
        return "" if asha is None else asha.mode or measures.default_mode(asha.metric)


def make_plan_of(recipe: Recipe, options: Options) -> Plan:
    """Check everything that can be known to be wrong before anything starts. Raises: RecipeError."""
    if options.space is not None and options.compare:
        raise RecipeError([("--space", "expected --space or --compare, found both")], "sweep")
    if options.compare:
        space, settings = comparison(options.compare, options.seeds, recipe.to_dict()), SettingsSection()
    elif options.space is not None:
        space, settings = load_space(options.space, recipe)
    else:
        space, settings = parse_space(_default_values(recipe), recipe, "the default space")
    told = {key: getattr(options, key) for key in ("search", "trials", "time_budget_s", "max_concurrent", "metric")}
    settings = settings.model_copy(update={key: value for key, value in told.items() if value is not None})
    metric = settings.metric or measures.default_metric(recipe)
    mode = settings.mode or measures.default_mode(metric)
    _check(space, settings, metric)
    kind = settings.search or ("grid" if space.is_grid else "random")
    if options.compare and kind != "grid":
        raise RecipeError([("--search", f"expected grid, as --compare tries all, found {kind}")], "sweep")
    search = _search(kind, space, settings, mode)
    domains = {key: {domain.kind: list(domain.values)} for key, domain in space.domains.items()}
    searched: dict[str, Any] = dict(domains) or {"compare": [*options.compare], "seeds": options.seeds}
    what = {"search": kind, "metric": metric, "mode": mode, "seed": settings.seed, "space": searched}
    return Plan(options.name or _default_name(recipe, options, kind), space, search, settings, what)


def _default_name(recipe: Recipe, options: Options, search: str) -> str:
    """RECIPE-SPACE, with the search where it is no grid; RECIPE-compare-DIGEST for a comparison, by its variants."""
    if options.compare:
        return f"{recipe.name}-compare-{hashlib.sha256(','.join(options.compare).encode()).hexdigest()[:6]}"
    of = options.space.stem if options.space else "rank-by-bound"
    return f"{recipe.name}-{of}" + ("" if search == "grid" else f"-{search}")


def _default_values(recipe: Recipe) -> dict[str, Any]:
    """`default_space`. Raises: RecipeError where it is empty."""
    values = default_space(recipe)
    if not values:
        why = f"without it LoRA rank and upper clamp bound are tried, and method {recipe.method} uses neither here"
        raise RecipeError([("--space", f"expected a space (or --compare), found none: {why}")], "sweep")
    return values


def default_space(recipe: Recipe) -> dict[str, Any]:
    """The paper's two ablations around the recipe: the proxy's LoRA rank, and how much one token may weigh.

    Only values that give a right recipe and other artifacts than those before them: the method may use but one, or none.
    """
    rank = recipe.stages.proxy_llm.lora.rank
    weighted = next((stage for stage in ("instruct", "proxy_mllm") if recipe.weights(stage) != "uniform"), "instruct")
    lower, upper = recipe.bounds(weighted)
    tried: dict[str, list[Any]] = {
        "stages.proxy_llm.lora.rank": [max(1, rank // 2), rank, 2 * rank],
        "cmo.upper": [max(lower, factor * upper) for factor in (0.5, 1.0, 2.0)],
    }
    plain = recipe.to_dict()
    space: dict[str, Any] = {}
    for key, values in tried.items():
        different: dict[tuple[str, ...], Any] = {}
        for value in values:
            with suppress(RecipeError):
                different.setdefault(chain(parse(laid_over(plain, {key: value}))), value)
        if len(different) > 1:
            space[key] = [*different.values()]
    return space


def _check(space: Space, settings: SettingsSection, metric: str) -> None:
    """Raises: RecipeError where a metric is one that a trial of this space would never tell."""
    asked = {"metric": metric} | ({} if settings.asha is None else {"asha.metric": settings.asha.metric})
    errors = []
    for setting, name in asked.items():
        for point, recipe in metric_variants(space):
            problem = measures.problem(name, recipe)
            if problem is None and setting == "asha.metric" and not measures.comes_while_running(name):
                problem = (
                    "expected a metric that is told while a stage runs, as instruct.nll_mean, or instruct.eval_nll with "
                    f"eval.every_steps, found {name}"
                )
            if problem is not None:
                at = f" (at {describe(point)})" if point else ""
                errors.append((f"{SETTINGS}.{setting}", f"{problem}{at}"))
                break
    if errors:
        raise RecipeError(errors, "sweep")


def _search(kind: str, space: Space, settings: SettingsSection, mode: str) -> Search:
    if kind == "grid":
        return Grid(space, settings.trials)
    if settings.trials is None:
        raise RecipeError(
            [("--trials", f"expected a number of trials, as {kind} search has no end, found none")], "sweep"
        )
    if kind == "optuna":
        return Optuna(space, settings.trials, settings.seed, mode)  # type: ignore[arg-type]
    return Random(space, settings.trials, settings.seed)


def run(recipe: Recipe, options: Options) -> int:
    """Run a sweep to its end, or from where an earlier attempt left it. Returns the command's exit code.

    Raises: RecipeError for wrong input; LeaseTaken where another process is at work on it; UserError for what a user can
        mend; KeyboardInterrupt. What is finished is kept in every case.
    """
    plan = make_plan_of(recipe, options)
    store = Store(recipe.store, through=retried)
    store.check()
    record = Record(store, plan.name, recipe, plan.what)
    record.take_up()
    trackers.check(recipe.trackers)
    with (
        bridging(recipe.data.retry_s, _print),
        lease.held(store, f"{record.path}/lease", report=_print, lost=record.taken.set) as held,
    ):
        record.confirm = held.confirm
        is_new = not record.take_up()  # again: another process may have had the lease meanwhile
        where = store.url(f"{record.path}/{FILE}")
        if is_new:
            record.check_names(plan.search.num_trials)
        record.values["left_out"] = getattr(plan.search, "left_out", [])
        record.write("running", error=None)
        screen.header(record.values, where)
        if not is_new:
            wanted = record.trials[: plan.search.num_trials]
            done = sum(trial["status"] in FINISHED for trial in wanted)
            _print(f"goes on: {done} of {plan.search.num_trials} trials are finished")
        try:
            budget_is_over = _carry_out(recipe, plan, store, record)
        except BaseException as err:
            _interrupted(plan, record, err)
            raise
        finally:
            _settle(record)
        return _close(plan, record, where, budget_is_over)


def _interrupted(plan: Plan, record: Record, err: BaseException) -> None:
    """Write down what can be of a sweep that ends with `err`, which matters more than that something cannot be."""
    for trial in record.trials:
        if trial["status"] == "running":
            trial["status"] = "interrupted"
    try:
        record.write("interrupted", record.store.brief(), error=one_line(err), **_of_variants(plan, record))
    except (UserError, OSError) as also:
        _print(f"not everything about this sweep's end could be written: {also}")


def _carry_out(recipe: Recipe, plan: Plan, store: Store, record: Record) -> bool:
    """Run what is to do. Returns whether the time budget ended it."""
    from dpa_ray.engine import launch  # Ray takes seconds to import, and a finished sweep needs none
    from dpa_ray.sweep import tuner
    from dpa_ray.sweep.state import Sweep

    sweep = Sweep(record, plan.search, plan.space.recipe, label=plan.space.label, tell=_print)
    if plan.what["search"] != "optuna":
        sweep.propose_all()
    record.write()
    if sweep.is_over:
        return False
    at_most = plan.settings.max_concurrent
    _print(tuner.connect(recipe.cluster, at_most))
    launch.check_reach(store)
    _prepare(plan.space.recipe, [trial["overrides"] for trial in record.trials], store, record)
    claims = tuner.start_claims()
    limit = min(at_most or plan.search.num_trials, plan.search.num_trials)
    sweep.max_running = lambda: tuner.room(recipe.cluster, launch.node_resources(recipe.cluster.label_selector), limit)
    sweep.release = claims.release.remote
    with tuner.nodes_asked_for(recipe.cluster, limit if at_most else 1):
        tuner.carry_out(
            sweep, claims, max_failures=recipe.cluster.max_failures, asha=plan.settings.asha, asha_mode=plan.asha_mode,
            time_budget_s=plan.settings.time_budget_s,
        )  # fmt: skip
    return sweep.budget_is_over


def _prepare(base: Mapping[str, Any], points: Sequence[dict[str, Any]], store: Store, record: Record) -> None:
    """Built-in models, commits of hub models (in sweep.json from then on) and data, once for all trials; what cannot be prepared is told by the trials that need it."""
    different: dict[str, Recipe] = {}
    for point in points or [{}]:
        with suppress(RecipeError):
            recipe = parse(laid_over(base, point))
            plain = recipe.to_dict()
            different.setdefault(json.dumps([plain["model"], plain["data"]], sort_keys=True), recipe)
    for recipe in different.values():
        with suppress(UserError, RecipeError):
            plan = make_plan(recipe, store, make=True, report=_print, commits=record.commits)
            record.commits.update(plan.commits)
            record.keep()  # data may take long
            Pipeline(plan, store, Run(store, recipe), _print).prepare_data()
    record.write()


def _settle(record: Record) -> None:
    """What trials that were ended could not do themselves; a sweep that was taken over is another's to settle."""
    store = record.store.brief()  # who interrupts does not want to wait
    for trial in record.trials:
        if trial["status"] in ("stopped", "interrupted") and not record.taken.is_set():
            path = f"runs/{trial['name']}"
            what = "stopped" if trial["status"] == "stopped" else "failed"
            try:
                settle(store, path, what, trial["reason"] or "interrupted")
            except NoAnswer:
                return
            except (UserError, OSError) as err:
                _print(f"{trial['name']}: its end could not be written: {err}")


def _close(plan: Plan, record: Record, where: str, budget_is_over: bool) -> int:
    """The table at the end, and the exit code."""
    trials = record.trials
    wanted = trials[: plan.search.num_trials]  # an earlier command may have wanted more
    is_whole = len(wanted) == plan.search.num_trials and all(
        trial["status"] in (*FINISHED, "failed") for trial in wanted
    )
    has_failed = bool(trials) and all(trial["status"] == "failed" for trial in trials)
    status = "failed" if has_failed else "done" if is_whole else "interrupted"
    record.write(status, **_of_variants(plan, record))
    screen.closing(record.values, where)
    _write_report(record)
    if not is_whole:
        why = "the time budget is over" if budget_is_over else "not every trial is finished"
        _print(f"{why}; the same command goes on from here")
    return 1 if has_failed or not is_whole else 0


def _of_variants(plan: Plan, record: Record) -> dict[str, Any]:
    """Of a comparison: what its finished trials say, as `compare`."""
    if not plan.space.labels:
        return {}
    named = {name for trial in record.trials for name in trial["metrics"]}
    held_out = {name for name in named if name.startswith("eval.") and name.endswith(COMPARED)}
    metrics = [record.values["metric"], *sorted(held_out - _other_for_each(record) - {record.values["metric"]})]
    return {"compare": compared(record.trials, metrics)}


def _other_for_each(record: Record) -> set[str]:
    """Metrics that are means over other targets in each trial, as each model has its own visual ones: differences of them
    say nothing."""
    known: dict[str, bool] = {}
    for metrics in (trial["metrics"] for trial in record.trials):
        for name in metrics:
            base, _, key = name.rpartition(".")
            if key == "visual_nll":
                known[name] = known.get(name, True) and metrics.get(f"{base}.num_visual_known", 0) > 0
    return {name for name, is_known in known.items() if not is_known}


def _write_report(record: Record) -> None:
    """sweeps/<name>/report.html. What a sweep found does not depend on it: one that cannot be made is told, no more."""
    place = reporting.Place(record.store, "sweeps", record.name)
    try:
        _print(f"  report  {reporting.write_report(place)}")
    except Exception as err:
        _print(f"no report was made ({type(err).__name__}: {err}); python jobs/report.py {place.url} tries again")


def _print(text: str) -> None:
    terminal().print(text, soft_wrap=True)
