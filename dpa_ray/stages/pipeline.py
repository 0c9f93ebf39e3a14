"""The order of the stages: what a recipe needs, what of it is there already, and what becomes of the rest.

Knows neither Ray nor how a task is run: it is given `launch`, and can be tested with another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpa_ray.data.bridged import BridgedStore
from dpa_ray.data.cursor import Cursor
from dpa_ray.data.prepare import Known, Prepared, find_prepared, prepare, source_digest
from dpa_ray.data.retry import bridging
from dpa_ray.data.skip import Skipped
from dpa_ray.errors import LeaseTaken
from dpa_ray.recipe import HELD_OUT, HELD_OUT_CAPTIONS, TRAINED_ON, Recipe, SourceSection
from dpa_ray.recipe_stages import PROXY_METHODS
from dpa_ray.report.metrics import FILE as METRICS
from dpa_ray.report.metrics import MetricsLog
from dpa_ray.stages import build, imports, keys, skips, supervision, weights
from dpa_ray.stages.preflight import Checked, preflight
from dpa_ray.stages.runs import Run
from dpa_ray.stages.spec import (
    BLIND,
    ArtifactRef,
    BaseLlm,
    BlindTask,
    Connector,
    EvalTask,
    FullProxy,
    InstructTask,
    MergedProxy,
    MergeTask,
    ProxyAdapter,
    ProxyLlmTask,
    ProxyMllmTask,
    Task,
    TrainTask,
    Weights,
)  # fmt: skip
from dpa_ray.store.artifacts import Artifact, content_key, find, verify
from dpa_ray.store.fs import Store

Report = Callable[[str], None]
Launch = Callable[[Sequence[Task]], None]
Claim = Callable[[Sequence[Task]], int]
"""Says how many of the leading tasks are this run's to do now; waits where another run does the first, and says 0 when
that one is done."""

BESIDE_THE_MODEL = ("metrics.jsonl", "examples.jsonl", "words.parquet")
"""In an artifact of `instruct`: what is told of it, and is no part of the model."""

STAGE_ARTIFACTS = {"proxy_llm": "proxy-llm", "proxy_mllm": "proxy-mllm", "instruct": "instruct"}


@dataclass
class Plan:
    """What a recipe needs. A stage is by name in the recipe; `refs` also has proxy_merged and eval."""

    recipe: Recipe
    llm: Weights
    tower: Weights
    data: dict[str, tuple[SourceSection, str]]  # pretrain, instruct and held-out sets: (source, digest)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    refs: dict[str, ArtifactRef] = field(default_factory=dict)
    found: dict[str, Artifact] = field(default_factory=dict)
    skipped: dict[str, tuple[Skipped, ...]] = field(default_factory=dict)  # by data: pretrain, instruct

    @property
    def commits(self) -> dict[str, str]:
        """Of models from the hub, by what the recipe calls them."""
        found = {self.recipe.model.llm: self.llm, self.recipe.model.vision: self.tower}
        return {name: w.ref.revision for name, w in found.items() if w.ref is not None and w.ref.revision is not None}

    @property
    def has_proxy(self) -> bool:
        return self.recipe.method in PROXY_METHODS

    @property
    def stages(self) -> tuple[str, ...]:
        """The training stages of this method, in order."""
        return ("proxy_llm", "proxy_mllm", "instruct") if self.has_proxy else ("proxy_mllm", "instruct")

    @property
    def shown(self) -> tuple[str, ...]:
        """What a person is told of, in order: the training stages, and q before the stage that takes it."""
        named = (name for stage in self.stages for name in (BLIND.get(stage, stage), stage))
        return tuple(dict.fromkeys(name for name in named if name in self.refs))

    @property
    def held_out(self) -> dict[str, tuple[SourceSection, str]]:
        """What the finished model is asked about."""
        others = (*TRAINED_ON, HELD_OUT_CAPTIONS)
        return {name: value for name, value in self.data.items() if name not in others}

    @property
    def needed(self) -> tuple[str, ...]:
        """What has to be made, in order: of what is absent, only what something absent needs."""
        wanted = {"instruct", *(["eval"] if "eval" in self.refs else [])}
        if "instruct" not in self.found:
            wanted |= {"proxy_mllm", *({"blind_instruct"} & self.refs.keys())}
        if "proxy_mllm" in wanted and "proxy_mllm" not in self.found:
            wanted |= {"blind"} & self.refs.keys()
            if self.has_proxy:
                wanted.add("proxy_merged")
                if "proxy_merged" not in self.found:
                    wanted.add("proxy_llm")
        order = ("proxy_llm", "proxy_merged", "blind", "proxy_mllm", "blind_instruct", "instruct", "eval")
        return tuple(name for name in order if name in wanted and name not in self.found)

    def add(self, name: str, stage: str, inputs: dict[str, Any], store: Store) -> ArtifactRef:
        ref = ArtifactRef(stage, content_key(inputs))
        return self.put(name, ref, inputs, store)

    def put(self, name: str, ref: ArtifactRef, inputs: dict[str, Any], store: Store) -> ArtifactRef:
        self.refs[name], self.inputs[name] = ref, inputs
        artifact = find(store, ref.stage, ref.key)
        if artifact is not None:
            self.found[name] = artifact
        return ref


def make_plan(
    recipe: Recipe, store: Store, *, make: bool, report: Report, commits: Mapping[str, str] | None = None
) -> Plan:
    """All keys of a recipe, and what of it is in the store.

    Args:
        commits: of models from the hub, as an earlier plan's `commits` says; others stand where the hub says now.
        make: also make built-in models, import `stages.X.from` and, where `data.skip_ids` is to be looked up in it, prepare
            data; without it nothing is written (a dry run).
    Raises: UserError where a model or a source of data is not there; RecipeError where an entry of `data.skip_ids` means
        no sample.
    """
    model, commits = recipe.model, commits or {}
    llm = weights.resolve(model.llm, "llm", store, make=make, report=report, commit=commits.get(model.llm))
    tower = weights.resolve(model.vision, "vision", store, make=make, report=report, commit=commits.get(model.vision))
    sections = {"pretrain": recipe.data.pretrain, "instruct": recipe.data.instruct, **recipe.data.eval_extra}
    if recipe.data.eval is not None:
        sections[HELD_OUT] = recipe.data.eval
    if (captions := recipe.held_out("proxy_mllm")) is not None:
        sections[HELD_OUT_CAPTIONS] = captions
    known = Known(BridgedStore(store), write=make)
    with bridging(recipe.data.retry_s):
        data = {name: (section, source_digest(section, known)) for name, section in sections.items()}
    plan = Plan(recipe, llm, tower, data, skipped=skips.find(recipe, store, data, make=make, report=report))
    _add_stages(plan, store, make=make)
    if plan.held_out:
        order = sorted(plan.held_out, key=lambda name: name != HELD_OUT)
        digests = {name: plan.data[name][1] for name in order}
        inputs = keys.eval_inputs(recipe, plan.refs["instruct"].key, digests)
        plan.add("eval", "eval", inputs, store)
    return plan


def _add_stages(plan: Plan, store: Store, *, make: bool) -> None:
    recipe, captions = plan.recipe, plan.data["pretrain"][1]
    skipped = {name: skips.in_key(recipe, plan.skipped, name) for name in ("pretrain", "instruct")}
    llm_key = plan.llm.digest
    if plan.has_proxy:
        source = recipe.stages.proxy_llm.from_
        if source is not None and make:
            plan.put("proxy_llm", imports.import_adapter(source, store), {}, store)
        elif source is not None:
            plan.add("proxy_llm", "proxy-llm", {"imported": source}, store)
        else:
            plan.add(
                "proxy_llm", "proxy-llm", keys.proxy_llm_inputs(recipe, plan.llm, captions, skipped["pretrain"]), store
            )
        inputs = keys.merged_inputs(recipe, plan.llm, plan.refs["proxy_llm"].key)
        llm_key = plan.add("proxy_merged", "proxy-merged", inputs, store).key
    if recipe.caches_blind("proxy_mllm"):
        num_image_tokens = weights.num_image_tokens(plan.tower, recipe.model.image_size, store)
        plan.add("blind", "blind", keys.blind_inputs(recipe, llm_key, num_image_tokens, captions), store)
    source = recipe.stages.proxy_mllm.from_
    if source is not None and make:
        plan.put("proxy_mllm", imports.import_connector(source, store), {}, store)
    elif source is not None:
        plan.add("proxy_mllm", "proxy-mllm", {"imported": source}, store)
    else:
        inputs = keys.proxy_mllm_inputs(recipe, llm_key, plan.tower, captions, skipped["pretrain"])
        plan.add("proxy_mllm", "proxy-mllm", inputs, store)
    connector, digest = plan.refs["proxy_mllm"].key, plan.data["instruct"][1]
    if recipe.caches_blind("instruct"):
        num_image_tokens = weights.num_image_tokens(plan.tower, recipe.model.image_size, store)
        inputs = keys.blind_inputs(recipe, plan.llm.digest, num_image_tokens, digest, "instruct")
        plan.add("blind_instruct", "blind-instruct", inputs, store)
    inputs = keys.instruct_inputs(recipe, plan.llm, plan.tower, connector, digest, skipped["instruct"])
    plan.add("instruct", "instruct", inputs, store)


def num_steps(recipe: Recipe, stage: str, prepared: Prepared) -> int:
    """Optimizer steps of a stage: whole epochs, or `max_steps` if that is less."""
    section = getattr(recipe.stages, stage)
    source = recipe.data.instruct if stage == "instruct" else recipe.data.pretrain
    groups = [n for _, group in prepared.shards for n in group]
    cursor = Cursor(
        groups, seed=recipe.seed, global_batch_size=section.global_batch_size, window=recipe.data.shuffle_window,
        fraction=source.fraction,
    )  # fmt: skip
    whole: int = section.epochs * cursor.steps_per_epoch
    return min(whole, section.max_steps or whole)


class Pipeline:
    """Carries out a plan."""

    def __init__(self, plan: Plan, store: Store, run: Run, report: Report):
        self.plan = plan
        self.store = store
        self.run = run
        self.report = report
        self.reused = tuple(name for name in plan.refs if name in plan.found)

    def carry_out(self, launch: Launch, start: Callable[[], None] = lambda: None, claim: Claim = len) -> None:
        """Prepare data, launch what is needed and nobody else makes, put the result in its place.

        `start` is called once before anything that may want workers (large sources are prepared on them), and not at
        all where everything is there already.
        """
        needed = self.plan.needed
        checked = None
        if needed:
            checked = preflight(
                self.plan.recipe, self.plan.llm.located(self.store), self.plan.tower.located(self.store)
            )
        self.run.write("running", artifacts=self._artifacts())
        for stage in self.plan.stages:
            if stage in self.plan.found:
                self._copy_metrics(stage)
        if needed:
            start()
            tasks = [self._task(name) for name in needed]
            if checked is not None and self.plan.recipe.data.check_supervision:
                self._check_supervision(checked, tasks)
            self._share_out(tasks, launch, claim)
        for name in needed:
            self.plan.found[name] = self.plan.refs[name].found(self.store)
        self._place_model()

    def prepare_data(self) -> None:
        """Prepare all data that is not there yet."""
        for name in self.plan.data:
            self._prepared(name)

    def _share_out(self, tasks: list[Task], launch: Launch, claim: Claim) -> None:
        """Launch the tasks, in as few groups as others leave; what others made meanwhile is reused."""
        while tasks:
            num_mine = claim(tasks)
            if num_mine:
                try:
                    launch(tasks[:num_mine])
                except LeaseTaken as err:  # another run was faster: wait for it
                    self.report(str(err))
                    continue
                # of a group whose workers were away for long, another run may have made a part, and they have its metrics
                others = [task for task in tasks[:num_mine] if self._maker(task) not in (None, self.run.path)]
                self.reused += tuple(task.stage for task in others)  # type: ignore[attr-defined]
                tasks = tasks[num_mine:]
                continue
            task, tasks = tasks[0], tasks[1:]
            if self._maker(task) != self.run.path:
                self._reuse(task.stage)  # type: ignore[attr-defined]

    def _maker(self, task: Task) -> str | None:
        """Path of the run that made its result; None where that is not written down."""
        made_by: str | None = task.result.found(self.store).manifest["meta"].get("run")
        return made_by

    def _reuse(self, stage: str) -> None:
        """What another run has made since the plan was."""
        self.plan.found[stage] = self.plan.refs[stage].found(self.store)
        self.reused = (*self.reused, stage)
        if stage in self.plan.stages:
            self._copy_metrics(stage)
        self.run.write("running", artifacts=self._artifacts())

    def _check_supervision(self, checked: Checked, tasks: list[Task]) -> None:
        for task in tasks:
            if isinstance(task, TrainTask):
                encoder = build.encoder(
                    self.plan.recipe, task.stage, checked.vocabulary, checked.tower.num_image_tokens
                )
                source = self.plan.data["instruct" if task.stage == "instruct" else "pretrain"][0].label
                found = supervision.measure(
                    self.store, task.data, encoder, self.plan.recipe.data.retry_s, {s.row for s in task.skipped}
                )
                note = supervision.check(found, stage=task.stage, encoder=encoder, source=source)
                if note is not None:
                    self.report(note)

    def _task(self, name: str) -> Task:
        plan, recipe = self.plan, self.plan.recipe
        common: dict[str, Any] = dict(
            result=plan.refs[name], inputs=plan.inputs[name], recipe=recipe, run_path=self.run.path
        )
        base = BaseLlm(plan.llm)
        if name == "proxy_llm":
            data = self._prepared("pretrain")
            return ProxyLlmTask(
                **common, base=base, data=data, num_steps=num_steps(recipe, name, data),
                skipped=plan.skipped.get("pretrain", ()), held_out=self._held_out(name),
            )  # fmt: skip
        if name == "proxy_merged":
            kind = FullProxy if recipe.stages.proxy_llm.llm == "full" else ProxyAdapter
            return MergeTask(**common, base=base, adapter=kind(plan.refs["proxy_llm"]))
        if name in BLIND.values():
            reader = self._task("proxy_mllm" if name == "blind" else "instruct")
            assert isinstance(reader, ProxyMllmTask | InstructTask)
            return BlindTask(
                **common, reader=reader, num_image_tokens=plan.inputs[name]["num_image_tokens"], stage=name
            )
        if name == "proxy_mllm":
            data = self._prepared("pretrain")
            llm = MergedProxy(plan.refs["proxy_merged"]) if plan.has_proxy else base
            return ProxyMllmTask(
                **common, llm=llm, tokenizer=base, tower=plan.tower, data=data, blind=plan.refs.get("blind"),
                num_steps=num_steps(recipe, name, data), skipped=plan.skipped.get("pretrain", ()),
                held_out=self._held_out(name),
            )  # fmt: skip
        if name == "instruct":
            data, connector = self._prepared("instruct"), Connector(plan.refs["proxy_mllm"])
            return InstructTask(
                **common, base=base, connector=connector, tower=plan.tower, data=data,
                blind=plan.refs.get("blind_instruct"), num_steps=num_steps(recipe, name, data),
                skipped=plan.skipped.get("instruct", ()), held_out=self._held_out(name),
            )  # fmt: skip
        sets = {held_out: self._prepared(held_out) for held_out in plan.inputs["eval"]["sets"]}
        return EvalTask(**common, base=base, model=plan.refs["instruct"], sets=sets)

    def _held_out(self, stage: str) -> Prepared | None:
        """What `stage` is evaluated on while it runs, and the losses of words are of."""
        name = HELD_OUT if stage == "instruct" else HELD_OUT_CAPTIONS
        return self._prepared(name) if name in self.plan.data else None

    def _prepared(self, name: str) -> Prepared:
        section, digest = self.plan.data[name]
        with bridging(self.plan.recipe.data.retry_s):
            found = find_prepared(BridgedStore(self.store), digest)
        if found is not None:
            return found
        self.report(f"preparing data.{name}: {section.label}")
        return prepare(
            self.store, section, max_quarantined_fraction=self.plan.recipe.data.max_quarantined_fraction,
            report=self.report, retry_s=self.plan.recipe.data.retry_s,
        )  # fmt: skip

    def _copy_metrics(self, stage: str) -> None:
        """A reused stage's lines, from its artifact (an imported one has none)."""
        lines: list[str] = []
        if METRICS in self.plan.found[stage].files:
            lines = (self.plan.refs[stage].fetched(self.store, [METRICS]) / METRICS).read_text().splitlines()
        MetricsLog.copy_reused(self.store, self.run.path, stage, [json.loads(line) for line in lines])

    def _place_model(self) -> None:
        """runs/<name>/model: the instruct artifact's model files. Raises: UserError where they are not what was committed."""
        target = f"{self.run.path}/model"
        artifact = self.plan.found["instruct"]
        verify(self.store, artifact)
        self.store.delete(target)
        for name in artifact.files:
            if name not in BESIDE_THE_MODEL:
                self.store.copy(f"{artifact.path}/{name}", f"{target}/{name}")

    def _artifacts(self) -> dict[str, Any]:
        return {
            ref.stage: {"key": ref.key, "path": ref.path, "reused": name in self.reused}
            for name, ref in self.plan.refs.items()
        } | {
            weights.ARTIFACT["llm"]: {"name": self.plan.llm.name, "digest": self.plan.llm.digest},
            weights.ARTIFACT["vision"]: {"name": self.plan.tower.name, "digest": self.plan.tower.digest},
        }
