"""The plan itself: for each number of GPUs, what every part of a run takes, reads and writes, and what would be the limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from dpa_ray.data.ingest import batch_bytes, batches_per_task
from dpa_ray.doctor.plan import control, timing
from dpa_ray.doctor.plan.facts import Facts, gather
from dpa_ray.doctor.plan.options import PlanOptions
from dpa_ray.doctor.plan.reading import amplification
from dpa_ray.doctor.plan.timing import Layout, Speed
from dpa_ray.doctor.plan.work import Q_BYTES, Work
from dpa_ray.errors import UserError
from dpa_ray.recipe import Recipe
from dpa_ray.recipe_stages import PROXY_METHODS

TEXT_BYTES_PER_TOKEN = 5
"""Of UTF-8 text and its columns: the q job reads the shards without their images."""


@dataclass(frozen=True)
class Row:
    """One part of a run on so many GPUs. `time_s` is 0 where it is not estimated."""

    part: str
    num_steps: int = 0
    step_time_s: float = 0.0
    time_s: float = 0.0
    read: dict[str, float] = field(default_factory=dict)  # bytes by what they are
    written: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Whole:
    """A run on so many GPUs with the recipe's batches."""

    num_gpus: int
    num_workers: int
    rows: list[Row]

    @property
    def time_s(self) -> float:
        return sum(row.time_s for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        hours = self.time_s / 3600
        rows = [asdict(row) | {"gpu_hours": row.time_s / 3600 * self.num_gpus} for row in self.rows]
        total = {
            "time_s": self.time_s, "hours": hours, "gpu_hours": hours * self.num_gpus,
            "read_bytes": sum(sum(row.read.values()) for row in self.rows),
            "written_bytes": sum(sum(row.written.values()) for row in self.rows),
        }  # fmt: skip
        return {"num_gpus": self.num_gpus, "num_workers": self.num_workers, "parts": rows, "total": total}


@dataclass(frozen=True)
class Scaled:
    """A stage on so many GPUs, each with as many samples a step as in the recipe: the batch grows with the workers."""

    stage: str
    num_gpus: int
    batch: int
    step_time_s: float
    samples_per_s: float
    reads_of_a_byte: float
    data_bytes_per_s: float
    checkpoint_bytes_per_s: float
    store_share: float  # of what the store gives; above 1 it is the limit
    start_bytes: float  # all nodes fetch the models
    limits: list[control.Limit]


@dataclass(frozen=True)
class Plan:
    recipe: str
    assumptions: list[str]
    wholes: list[Whole]
    scaled: list[Scaled]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "recipe": self.recipe, "assumptions": self.assumptions, "gpus": [whole.to_dict() for whole in self.wholes],
            "scaling": [asdict(one) for one in self.scaled],
        }  # fmt: skip


def make_plan(recipe: Recipe, stages: tuple[str, ...], options: PlanOptions, costs: control.Costs) -> Plan:
    """Raises: UserError where something cannot be known, with the option that tells it."""
    facts = gather(recipe, stages, options)
    made = Planner(recipe, facts, options, costs)
    return Plan(
        recipe.name, made.assumptions(), [made.whole(n) for n in options.gpus],
        [made.scaled(stage, n) for stage in facts.works for n in options.gpus],
    )  # fmt: skip


def layout_of(recipe: Recipe, stage: str) -> Layout:
    """How `recipe` lays a stage out on its workers."""
    with_deepspeed = recipe.engine == "deepspeed"
    return Layout(
        zero_stage=recipe.deepspeed.zero_stage if with_deepspeed else None,
        item=2 if with_deepspeed and recipe.precision == "bf16" else 4,  # the plain engine sums in fp32
        micro_batch_size=getattr(recipe.stages, stage).micro_batch_size,
        gpus_per_worker=recipe.cluster.gpus_per_worker,
    )


class Planner:
    """One recipe with what is known of it."""

    def __init__(self, recipe: Recipe, facts: Facts, options: PlanOptions, costs: control.Costs):
        self.recipe, self.facts, self.options, self.costs = recipe, facts, options, costs
        self.item = 2 if recipe.precision == "bf16" else 4
        self.speeds = {stage: self._speed(stage) for stage in facts.works}
        self.reads: Callable[[str, int, int], float] = cache(self._reads)

    def layout(self, stage: str) -> Layout:
        return layout_of(self.recipe, stage)

    def _speed(self, stage: str) -> Speed:
        work, options = self.facts.works[stage], self.options
        layout = layout_of(self.recipe, stage)
        if given := options.step_times.get(stage):
            origin = f"{given.time_s:g} s a step on {given.num_gpus} GPUs (given)"
            return timing.from_measured(work, layout, given, work.global_batch_size, options, origin)
        run, run_as = self.facts.measured.get(stage), self.facts.measured_as
        if run is not None and run_as is not None:
            origin = f"{run.step.time_s:.3g} s a step of {run.batch} samples on {run.step.num_gpus} GPUs ({options.from_run})"
            return timing.from_measured(work, layout_of(run_as, stage), run.step, run.batch, options, origin)
        if options.peak_flops:
            return timing.from_flops(work, layout, options)
        raise UserError(
            f"{stage}: expected a step time, found none; give --step-time {stage}=SECONDS@GPUS, --from RUN_URI, or --gpu TYPE (with "
            "--mfu) to estimate it from FLOPs"
        )

    # -- with the recipe's batch

    def whole(self, num_gpus: int) -> Whole:
        """Every part of a run on `num_gpus`."""
        nodes = -(-num_gpus // self.options.gpus_per_node)
        rows = []
        if self.facts.shards_to_make:
            moved = {"data": self.facts.shards_to_make}
            rows.append(Row("prepare", read=moved, written=moved))
        first = True
        for stage, work in self.facts.works.items():
            if stage == "proxy_mllm" and self.recipe.method in PROXY_METHODS:
                llm = {"proxy-merged": float(work.model.llm * self.item)}
                rows.append(Row("merge", read={"adapter": float(self._adapter())}, written=llm))
            rows += self._blind(work, num_gpus)
            rows.append(self._stage(work, num_gpus, nodes, first))
            first = False
        return Whole(num_gpus, self.layout(next(iter(self.facts.works))).num_workers(num_gpus), rows)

    def _adapter(self) -> int:
        work = self.facts.works.get("proxy_llm")
        return work.trained * self.item if work else 0

    def _blind(self, work: Work, num_gpus: int) -> list[Row]:
        if work.blind != "cached":
            return []
        once = min(work.num_taken, work.num_samples)
        time_s = timing.blind_s(work, self.speeds[work.stage], self.layout(work.stage).num_workers(num_gpus))
        text, scores = once * work.text_tokens * TEXT_BYTES_PER_TOKEN, once * work.text_tokens * Q_BYTES
        return [Row(f"q of {work.stage}", time_s=time_s, read={"text": text}, written={"q": scores})]

    def _stage(self, work: Work, num_gpus: int, nodes: int, first: bool) -> Row:
        stage, layout = work.stage, self.layout(work.stage)
        workers = layout.num_workers(num_gpus)
        step = timing.step_s(work, layout, self.speeds[stage], work.global_batch_size, workers, self.options)
        time_s = work.num_steps * step
        read = {"data": work.num_taken * work.bytes_per_sample * self.reads(stage, workers, work.global_batch_size)}
        if work.blind == "cached":
            read["q"] = work.num_taken * work.text_tokens * Q_BYTES
        if first:  # fetched once a node
            read["base weights"] = float(nodes * (work.model.llm + work.model.tower) * self.item)
        if stage == "proxy_mllm" and self.recipe.method in PROXY_METHODS:
            read["proxy-merged"] = float(nodes * work.model.llm * self.item)
        if stage == "instruct":
            read["connector"] = float(nodes * work.model.connector * self.item)
        written = {"checkpoints": float(self._num_checkpoints(work.num_steps, time_s) * work.checkpoint_bytes)}
        if stage == "instruct":
            model = float((work.model.llm + work.model.tower + work.model.connector) * self.item)
            written["artifact"] = model
            if self.recipe.store.startswith(("s3://", "gs://")):  # on a disk, runs/<name>/model is links
                written["model"] = model
        else:
            written["artifact"] = float(work.trained * self.item)
        return Row(stage, work.num_steps, step, time_s, read, written)

    def _num_checkpoints(self, num_steps: int, time_s: float) -> int:
        section = self.recipe.checkpoint
        by_time = int(time_s // section.every_s) if section.every_s else 0
        return max(by_time, num_steps // section.every_steps if section.every_steps else 0)

    def _reads(self, stage: str, num_workers: int, batch: int) -> float:
        work = self.facts.works[stage]
        return amplification(
            work.num_samples, work.bytes_per_sample, window=self.recipe.data.shuffle_window, batch=batch,
            micro_batch_size=self.layout(stage).micro_batch_size, num_workers=num_workers, tasks_per_worker=self.recipe.data.workers,
        )  # fmt: skip

    # -- with a batch that grows

    def _batch(self, work: Work, num_workers: int) -> int:
        """As many samples on each worker as the recipe's own number of workers has."""
        return num_workers * timing.load(work.global_batch_size, self.recipe.cluster.max_workers)

    def _step_of(self, work: Work, num_workers: int) -> float:
        batch = self._batch(work, num_workers)
        return timing.step_s(work, self.layout(work.stage), self.speeds[work.stage], batch, num_workers, self.options)

    def scaled(self, stage: str, num_gpus: int) -> Scaled:
        """Weak scaling of one stage."""
        work, layout, options, every = self.facts.works[stage], self.layout(stage), self.options, self.recipe.checkpoint
        workers = layout.num_workers(num_gpus)
        step, batch = self._step_of(work, workers), self._batch(work, workers)
        rate, reads = batch / step, self.reads(stage, workers, batch)
        data = rate * (work.bytes_per_sample * reads + (work.text_tokens * Q_BYTES if work.blind == "cached" else 0))
        between = min(every.every_s or float("inf"), step * every.every_steps if every.every_steps else float("inf"))
        saved = work.checkpoint_bytes / between
        nodes = -(-num_gpus // options.gpus_per_node)

        def load_at(num: int) -> control.Load:
            step_s = self._step_of(work, num)
            each = batch // workers
            return control.Load(
                1 / step_s, each / step_s / self._samples_per_task(work, each),
                self.recipe.cluster.collective_timeout_s, between, options.store_latency_s,
            )  # fmt: skip

        return Scaled(
            stage, num_gpus, batch, step, rate, reads, data, saved, (data + saved) / options.store_bytes_per_s,
            float(nodes * (work.model.llm + work.model.tower) * self.item),
            control.limits(load_at, self.costs, workers),
        )  # fmt: skip

    def _samples_per_task(self, work: Work, each: int) -> int:
        section = getattr(self.recipe.stages, work.stage)
        rows = min(section.micro_batch_size, each)
        image = 3 * self.facts.image_side**2 if work.with_images else 0
        return rows * batches_per_task(batch_bytes(rows, image, section.max_length))

    def assumptions(self) -> list[str]:
        """All that the figures rest on, in words."""
        options, recipe = self.options, self.recipe
        told = [
            *self.facts.notes,
            *(f"{stage}: {speed.origin}" for stage, speed in self.speeds.items()),
            f"a step takes as long as its worker with most samples computes, then {options.network_bytes_per_s / 1e9:g} GB/s a GPU for "
            f"gradients, none of it hidden; nothing inside a node of {options.gpus_per_node} GPUs",
            f"checkpoints of 12 bytes a trained parameter every {_every(recipe)}; steps stand for none of it",
            f"shards are read in the product's own order through {recipe.data.workers} decode processes a worker with 128 MiB each",
            f"the store gives {options.store_bytes_per_s / 1e9:g} GB/s and answers a small call in {options.store_latency_s * 1e3:g} ms",
            f"driver and head: {self.costs.board_call_s * 1e6:.0f} us an event, {self.costs.poll_s * 1e6:.0f} us to ask one worker, "
            f"{self.costs.gcs_task_s * 1e6:.0f} us of the GCS a task ({self.costs.origin})",
            "left out: starting, preparing data and merging (their bytes are in), held-out questions, faults",
        ]
        if not recipe.cluster.gpus_per_worker:
            told.append("the recipe trains on CPUs: each worker counts as one GPU")
        return told


def _every(recipe: Recipe) -> str:
    section = recipe.checkpoint
    parts = [
        f"{section.every_s:g} s" if section.every_s else "",
        f"{section.every_steps} steps" if section.every_steps else "",
    ]
    return " and ".join(part for part in parts if part) or "never"
