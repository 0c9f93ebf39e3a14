"""In which order is a recipe looked at? Trackers, store, models, data, batches, memory, cluster, cost: each whatever became of the others."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpa_ray.data.encode import Encoder
from dpa_ray.data.pixels import Geometry
from dpa_ray.doctor import cluster, cost, data, fitting, memory, models
from dpa_ray.doctor.cost import StepTime
from dpa_ray.doctor.findings import Check, Findings, number
from dpa_ray.engine import placing
from dpa_ray.model.export import processor_for
from dpa_ray.model.tower import TowerSpec, tower_spec
from dpa_ray.model.vlm import ModelRef, load_llm_config, quiet_loading
from dpa_ray.recipe import Recipe, SourceSection
from dpa_ray.recipe_stages import PROXY_METHODS
from dpa_ray.report import trackers
from dpa_ray.report.console import duration
from dpa_ray.stages import arithmetic, build, preflight, supervision
from dpa_ray.stages.runs import Run
from dpa_ray.stages.spec import TRAINING_STAGES, precision_dtype
from dpa_ray.store import probe
from dpa_ray.store.fs import Store


@dataclass(frozen=True)
class Options:
    """What the command was told besides the recipe."""

    step_times: dict[str, StepTime] = field(default_factory=dict)
    gpu_bytes: int = 0  # of the GPUs that will be there; 0: as the cluster's are
    num_shown: int = 2  # samples of each stage


def training_stages(recipe: Recipe) -> tuple[str, ...]:
    """The stages that a run of the recipe trains, in order: nobody needs a proxy where the connector is imported."""
    stages = recipe.stages
    if stages.proxy_mllm.from_:
        return ("instruct",)
    has_stage_1 = recipe.method in PROXY_METHODS and not stages.proxy_llm.from_
    return TRAINING_STAGES if has_stage_1 else TRAINING_STAGES[1:]


def examine(recipe: Recipe, options: Options) -> Findings:
    """Make every check. Nothing is started, and nothing stays in the store.

    Raises: UserError where the recipe's store has an address, or AWS_ENDPOINT_URL names a server, that cannot be one.
    """
    findings = Findings()
    with ExitStack() as stack:
        stack.enter_context(quiet_loading())
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dpa_ray-")))
        examined = _Examined(recipe, options, Store(recipe.store), scratch, findings)
        with findings.check("recipe") as check:
            check.note(f"{recipe.name}: {recipe.method}, {recipe.precision}, {recipe.engine}, seed {recipe.seed}")
        with findings.check("trackers") as check:
            trackers.check(recipe.trackers)
            check.note(", ".join(name for name, section in recipe.trackers if section) or "none")
        examined.check_store()
        examined.check_llm()
        examined.check_vision()
        examined.check_imports()
        examined.check_data()
        examined.check_targets()
        examined.check_batches()
        examined.check_trained()
        with findings.check("cluster") as check, cluster.nodes(recipe.cluster) as nodes:
            examined.check_placing(nodes, check)
        examined.check_memory()
        examined.check_cost()
    return findings


class _Examined:
    """What is known so far of a recipe; what a failed check would have given is None or absent."""

    def __init__(self, recipe: Recipe, options: Options, store: Store, scratch: Path, findings: Findings):
        self.recipe, self.options, self.store, self.scratch, self.findings = recipe, options, store, scratch, findings
        self.stages = training_stages(recipe)
        self.is_store_there = False
        self.llm_ref: ModelRef | None = None
        self.max_positions: int | None = None  # of the LLM's config
        self.vision_ref: ModelRef | None = None
        self.vocabulary: build.Vocabulary | None = None
        self.tower: TowerSpec | None = None
        self.looked: dict[str, data.Looked] = {}  # by name of the set: pretrain, instruct, ...
        self.longest: dict[str, int] = {}  # by stage, tokens of the longest sample looked at
        self.models: dict[str, Any] = {}
        self.counts: dict[str, memory.Counts] = {}
        self.nodes = cluster.Nodes("unknown", False)
        for stage in self.stages:
            findings.stage(stage)

    def check_store(self) -> None:
        with self.findings.check("store") as check:
            tried = probe.probe(self.store)
            for each in tried:
                if not each.is_ok:
                    check.fail(f"{each.operation}: {each.detail}")
                elif each.is_risk:
                    check.warn(f"{each.operation}: {each.detail}")
            done = [each.operation for each in tried if each.is_ok]
            self.is_store_there = "reach" in done
            check.note(
                f"{self.store.uri}: {', '.join(done) or 'nothing'}"
                + (": nothing is left there" if "delete" in done else "")
            )
        if not self.is_store_there:
            self.findings.skip("name", "the store does not answer")
            return
        with self.findings.check("name") as check:
            Run(self.store, self.recipe).check_name()
            check.note(f"runs/{self.recipe.name} is free, or this recipe's own")

    def check_llm(self) -> None:
        with self.findings.check("LLM") as check:
            ref = models.locate(self.recipe.model.llm, "llm", self.store, self.scratch, check)
            config = load_llm_config(ref)
            self.llm_ref, self.max_positions = ref, getattr(config, "max_position_embeddings", None)
            check.note(f"{config.model_type}, {config.num_hidden_layers} layers x {config.hidden_size}")
            preflight.check_attention(self.recipe, ref)
        if self.llm_ref is None:
            self.findings.skip("tokenizer", "there is no LLM")
            return
        with self.findings.check("tokenizer") as check:
            vocabulary = build.vocabulary(self.llm_ref, self.recipe)
            self.vocabulary, row = vocabulary, vocabulary.row
            where = f"the reserved {row.reserved}" if row.reserved else "a row that is appended"
            check.note(f"{len(vocabulary.tokenizer):,} tokens; <image> is token {row.token_id}, {where}")

    def check_vision(self) -> None:
        with self.findings.check("vision tower") as check:
            model = self.recipe.model
            ref = models.locate(model.vision, "vision", self.store, self.scratch, check)
            spec = tower_spec(ref, model.vision_layer, model.image_size)
            for stage in ("proxy_mllm", "instruct"):
                build.stage_image_processor(self.recipe, stage, ref, spec)
            self.vision_ref, self.tower = ref, spec
            check.note(f"{spec.config.model_type}, hidden state {spec.layer} of {spec.config.num_hidden_layers} layers")
        if self.tower is None:
            self.findings.skip("image tokens", "there is no tower")
            return
        with self.findings.check("image tokens") as check:
            found, expected = models.num_features(self.tower), self.tower.num_image_tokens
            if found != expected:
                check.fail(
                    f"model.vision: expected {expected} features of an image of {self.tower.image_size} pixels, one for each "
                    f"image token, found {found}; set model.image_size to what the tower takes"
                )
            else:
                check.note(f"{found} features of {self.tower.image_size} pixels a side, and as many image tokens")

    def check_imports(self) -> None:
        stages = self.recipe.stages
        sources = {"proxy_llm": stages.proxy_llm.from_, "proxy_mllm": stages.proxy_mllm.from_}
        if self.recipe.method not in PROXY_METHODS or stages.proxy_mllm.from_:
            del sources["proxy_llm"]  # nobody needs it
        for stage, source in sources.items():
            if source is not None:
                with self.findings.check(f"stages.{stage}.from") as check:
                    models.check_import(stage, source, check)

    def check_data(self) -> None:
        section = self.recipe.data
        sets: dict[str, SourceSection] = {"pretrain": section.pretrain, "instruct": section.instruct}
        if section.eval is not None:
            sets["eval"] = section.eval
        sets |= {f"eval_extra.{name}": extra for name, extra in section.eval_extra.items()}
        if (captions := self.recipe.held_out("proxy_mllm")) is not None:
            sets["eval_captions"] = captions
        for name, source in sets.items():
            with self.findings.check(f"data.{name}") as check:
                looked = data.look(self.store if self.is_store_there else None, source, section.skip_ids)
                self.looked[name] = looked
                state = "prepared" if looked.is_prepared else "not prepared yet; read from the source"
                check.note(
                    f"{source.label}: {number(looked.num_rows, 'sample')}, {state}, {looked.num_looked_at} looked at"
                )
                check.values["num_samples"] = looked.num_rows
                data.judge_unusable(looked, section.max_quarantined_fraction, check)
        if section.skip_ids:
            with self.findings.check("data.skip_ids") as check:
                data.look_up_skipped(self.recipe, self.store if self.is_store_there else None, self.looked, check)

    def check_targets(self) -> None:
        for stage in self.stages:
            name = f"targets of {stage}"
            if self.vocabulary is None or (self.tower is None and stage != "proxy_llm"):
                self.findings.skip(name, "there is no tokenizer, or no tower")
                continue
            with self.findings.check(name) as check:
                if stage == "instruct":
                    check.note(f"chat template of {self.recipe.model.llm}")
                num = 0 if stage == "proxy_llm" or self.tower is None else self.tower.num_image_tokens
                encoder = preflight.check_template(self.recipe, stage, self.vocabulary, num)
                if stage == "instruct" and self.vision_ref is not None and self.tower is not None:
                    images = build.stage_image_processor(self.recipe, stage, self.vision_ref, self.tower)
                    processor_for(self.vocabulary.tokenizer, images, self.tower)
                looked = self.looked.get(self._set_of(stage))
                if looked is None or not looked.samples:
                    check.note(
                        f"the {encoder.template} template gives targets; no sample of the data could be looked at"
                    )
                    continue
                self._supervision(stage, encoder, looked, check)

    def _set_of(self, stage: str) -> str:
        return "instruct" if stage == "instruct" else "pretrain"

    def _supervision(self, stage: str, encoder: Encoder, looked: data.Looked, check: Check) -> None:
        encoder.check(system=any(t.role == "system" for sample in looked.samples for t in sample.turns))
        pairs = [(sample, encoder(sample)) for sample in looked.samples]
        geometry = None
        if stage != "proxy_llm" and self.vision_ref is not None and self.tower is not None:
            geometry = Geometry.of(build.stage_image_processor(self.recipe, stage, self.vision_ref, self.tower))
            for sample, encoded in pairs:
                data.check_images(sample, encoded, encoder, geometry, self.tower.image_size)
        self.longest[stage] = max(len(encoded.input_ids) for _, encoded in pairs)
        found = supervision.of_samples(pairs, encoder)
        assert self.vocabulary is not None
        tokenizer = self.vocabulary.tokenizer
        values = self.findings.stage(stage)
        values["supervised_fraction"], values["longest_sample_tokens"] = found.fraction, self.longest[stage]
        # with images first, where there are any: they say most
        shown = sorted(pairs, key=lambda pair: not pair[1].num_images)[: self.options.num_shown]
        values["samples"] = [
            {"place": sample.place, "spans": [list(span) for span in data.marked(encoded, encoder, tokenizer)]}
            for sample, encoded in shown
        ]
        check.note(
            f"{found.fraction:.1%} of {found.num_text_tokens:,} text tokens in {found.num_samples} samples are targets; the "
            f"longest sample has {self.longest[stage]:,} tokens of at most {encoder.max_length:,}"
        )
        if self.max_positions is not None and self.longest[stage] > self.max_positions:
            check.warn(
                f"expected samples of at most {self.max_positions:,} tokens (max_position_embeddings of the LLM), found one of "
                f"{self.longest[stage]:,}; lower stages.{stage}.max_length={encoder.max_length}"
            )
        num_cut = sum(encoded.truncated for _, encoded in pairs)
        if num_cut:
            check.note(f"{num_cut} of {len(pairs)} are cut at stages.{stage}.max_length={encoder.max_length}")
        source = getattr(self.recipe.data, self._set_of(stage)).label
        if not self.recipe.data.check_supervision:
            return
        note = supervision.check(found, stage=stage, encoder=encoder, source=source)
        if note is not None:
            check.warn(note)

    def check_batches(self) -> None:
        with self.findings.check("batches") as check:
            for stage in self.stages:
                for num_workers in sorted({self.recipe.cluster.min_workers, self.recipe.cluster.max_workers}):
                    layout = arithmetic.batch_layout(self.recipe, stage, num_workers, self._num_samples(stage))
                    for text in arithmetic.risks(layout):
                        check.warn(text)
                    check.note(_layout_text(layout))
                    self.findings.stage(stage).setdefault("layouts", []).append(vars(layout) | {"stage": stage})
                self.findings.stage(stage)["num_steps"] = layout.num_steps

    def _num_samples(self, stage: str) -> int | None:
        looked = self.looked.get(self._set_of(stage))
        fraction = getattr(self.recipe.data, self._set_of(stage)).fraction
        return None if looked is None else max(1, round(fraction * looked.num_rows))

    def check_trained(self) -> None:
        if self.llm_ref is None or self.vocabulary is None or self.tower is None:
            self.findings.skip("trained parameters", "there is no LLM, no tokenizer or no tower")
            return
        checked = preflight.Checked(self.vocabulary, self.tower)
        with self.findings.check("trained parameters") as check:
            for stage in self.stages:
                model, trained = preflight.config_only(self.recipe, self.llm_ref, checked, stage)
                head = models.head_of(model)
                self.models[stage], self.counts[stage] = model, memory.count(model, head)
                counts = self.counts[stage]
                check.note(f"{stage}: {trained.description}, {counts.trained:,} of {counts.whole:,} parameters")
                self.findings.stage(stage).update(
                    trained=trained.description, num_trained=counts.trained, num_parameters=counts.whole
                )
        if "instruct" in self.models and self.vision_ref is not None:
            with self.findings.check("weights") as check:
                expected = models.num_parameters(self.models["instruct"])
                models.check_weights(self.llm_ref, "llm", expected["llm"], check)
                models.check_weights(self.vision_ref, "vision", expected["tower"], check)

    def check_placing(self, nodes: cluster.Nodes, check: Check) -> None:
        self.nodes = nodes
        section = self.recipe.cluster
        found = placing.place(nodes.resources, section, self.recipe.data.workers, nodes.labels)
        if self.options.gpu_bytes and section.gpus_per_worker and not (nodes.is_cluster or found.is_possible):
            check.skip(f"not looked at: --gpu-memory is about other GPUs than those of {nodes.where}")
            return
        for text in placing.problems(found, nodes.resources, section):
            (check.warn if found.is_possible or nodes.is_cluster else check.fail)(text)
        if nodes.is_cluster and not found.is_possible:
            check.note("an autoscaler may bring nodes; a run waits for them for cluster.start_timeout_s")
        if nodes.is_cluster and len(nodes.nodes) > 1 and self.store.is_local:
            check.fail(
                f"expected a store that all {len(nodes.nodes)} nodes reach, found the folder {self.store.uri}; take s3://"
            )
        check.note(
            f"{nodes.where}: room for {found.num_placed} of {number(found.num_wanted, 'worker')}, and for "
            f"{number(found.num_tasks_placed, 'data task')} at once beside them"
        )
        check.values["workers_by_node"] = list(found.workers_by_node)

    def check_memory(self) -> None:
        if not self.counts:
            self.findings.skip("memory", "there is no model to count")
            return
        with self.findings.check("memory") as check:
            on = fitting.device(self.recipe, self.nodes, self.options.gpu_bytes)
            fits = [
                fitting.fit(
                    self.recipe, stage, model, self.counts[stage], self.tower, self.longest.get(stage), on.is_gpu
                )
                for stage, model in self.models.items()
            ]
            fitting.judge(fits, self.recipe, on, check, self.findings)
            if on.is_gpu:
                fitting.judge_loading(self.counts, self.recipe, self.nodes, check)
                fitting.judge_attention(self.models, self.recipe, check)
            cached = [stage for stage in self.models if self.recipe.caches_blind(stage)]
            if cached and on.is_gpu and on.num_bytes:
                llm = self.num_llm * precision_dtype(self.recipe).itemsize
                if llm + memory.CUDA_BYTES > fitting.NEARLY_FULL * on.num_bytes:
                    check.fail(
                        f"q of {' and '.join(cached)}: expected room for the whole LLM on each {on.what}, whatever deepspeed.zero_stage; found "
                        f"{fitting.gib(on.num_bytes)} for weights of {fitting.gib(llm)}; set cmo.blind=live"
                    )

    def check_cost(self) -> None:
        with self.findings.check("steps and time") as check:
            known = dict(cost.earlier_step_times(self.store, self.recipe, self.stages)) if self.is_store_there else {}
            known |= self.options.step_times
            total_s = 0.0
            for stage in self.stages:
                values = self.findings.stage(stage)
                num_steps, step = values.get("num_steps"), known.get(stage)
                if num_steps is None:
                    check.note(f"{stage}: steps unknown, as the data could not be counted")
                elif step is None:
                    check.note(
                        f"{stage}: {number(num_steps, 'step')}, time unknown (--step-time SECONDS, or an earlier run's metrics)"
                    )
                else:
                    time_s = num_steps * step.time_s
                    total_s += time_s
                    values.update(step_time_s=step.time_s, step_time_origin=step.origin, estimated_time_s=time_s)
                    check.note(
                        f"{stage}: {number(num_steps, 'step')} of {step.time_s:.3g} s ({step.origin}): {duration(time_s)}"
                    )
            if total_s:
                gpus = self.recipe.cluster.gpus_per_worker * self.recipe.cluster.max_workers
                check.note(f"together (what is known) {duration(total_s)}" + (f", {total_s / 3600 * gpus:,.1f} GPU hours" if gpus else "")
                           + "; without starting, preparing data, q, the merge and held-out questions")  # fmt: skip
                check.values["estimated_time_s"] = total_s
        with self.findings.check("bytes written") as check:
            sets = self.looked.values()
            data_bytes = sum(looked.size_bytes for looked in sets if not looked.is_prepared)
            written = cost.written_bytes(self.recipe, self.counts, self.num_llm, data_bytes)
            total = sum(written.values())
            check.values["bytes"] = written
            check.note(
                f"about {fitting.gib(total)}: " + ", ".join(f"{k} {fitting.gib(v)}" for k, v in written.items() if v)
            )
            check.note("if nothing is reused; data as large as the samples looked at; q, metrics and logs left out")
            free = cost.free_bytes(self.store)
            if free is not None and total > free:
                # what is there already needs no room: how much of it this run would reuse is not asked
                (check.warn if cost.may_reuse(self.store) else check.fail)(
                    f"{self.store.uri}: expected room for about {fitting.gib(total)}, found {fitting.gib(free)} free; free some "
                    "space, name another store, or lower checkpoint.keep"
                )

    @property
    def num_llm(self) -> int:
        """Parameters of the LLM, without a LoRA; 0 where it is not known."""
        return models.num_parameters(self.models["instruct"])["llm"] if "instruct" in self.models else 0


def _layout_text(layout: arithmetic.BatchLayout) -> str:
    """One stage's step in words."""
    workers, passes = number(layout.num_workers, "worker"), number(layout.num_passes, "pass")
    text = f"{layout.stage}: {number(layout.num_samples, 'sample')} a step on {workers} in {passes} of {layout.micro_batch_size} at most"
    if layout.num_filler_passes:
        text += f", {layout.num_filler_passes} of all {layout.num_workers * layout.num_passes} passes filler"
    if layout.num_steps is None or layout.steps_per_epoch is None:
        return f"{text}; steps unknown"
    text += f"; {number(layout.num_steps, 'step')}, {layout.steps_per_epoch:,} an epoch"
    if layout.last_batch_size != layout.num_samples:
        text += f", the last of {number(layout.last_batch_size or 0, 'sample')}"
    return text
