"""The recipe's words on how a run is done: cluster, engine, checkpoints, evaluation, trackers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from dpa_ray.recipe_sources import Section


class DeepspeedSection(Section):
    zero_stage: int = Field(
        2,
        ge=0,
        le=3,
        description="shared out among workers: 1 optimizer states, 2 gradients too, 3 parameters too; 0: none. In bf16 a "
        "step's micro-batches are summed in fp32 at 2 and 3, in bf16 (some tenths of a percent off) at 0 and 1",
    )


class ElasticSection(Section):
    """As many workers as the cluster has room for."""

    min: int = Field(gt=0, description="with fewer, training waits")
    max: int = Field(gt=0, description="so many at most")

    @model_validator(mode="after")
    def _ordered(self) -> ElasticSection:
        if self.min > self.max:
            raise ValueError(f"expected min <= max, found min {self.min} and max {self.max}")
        return self


_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
LabelKey = Annotated[str, Field(pattern=rf"^([a-zA-Z0-9.-]{{1,253}}/)?{_LABEL}$")]
LabelCondition = Annotated[str, Field(pattern=rf"^!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))$")]
"""Labels of Ray's nodes, and what is asked of one, as Ray 2.60 reads them."""


def _is_range(workers: Any) -> str:
    return "<range>" if isinstance(workers, dict | ElasticSection) else "<number>"


def _one_or_none(gpus: float) -> float:
    if gpus not in (0, 1):
        raise ValueError(f"expected 1, or 0 (training on CPUs), found {gpus:g}: one worker trains on one GPU")
    return gpus


class ClusterSection(Section):
    workers: Annotated[
        Annotated[int, Field(gt=0), Tag("<number>")] | Annotated[ElasticSection, Tag("<range>")],
        Discriminator(_is_range),
    ] = Field(
        8,
        description="a number, or {min, max}: as many as there is room for, fewer when nodes go and more when they come",
    )
    gpus_per_worker: Annotated[float, AfterValidator(_one_or_none)] = Field(
        1, description="1, or 0: workers train on CPUs", json_schema_extra={"enum": [0, 1]}
    )
    cpus_per_worker: float = Field(
        0.5, gt=0, description="CPUs that Ray sets aside for a worker; what is left of a node's is for data tasks"
    )
    label_selector: dict[LabelKey, LabelCondition] = Field(
        default_factory=dict,
        description="labels of the nodes that workers go to, e.g. {ray.io/accelerator-type: H100}; a value may be !v, in(v, w) or !in(v, w)",
    )
    fallback_label_selector: dict[LabelKey, LabelCondition] = Field(
        default_factory=dict,
        description="labels of other nodes that the autoscaler is asked for where no workers came for fallback_after_s, beside label_selector's, "
        "e.g. {ray.io/market-type: on-demand} where spot nodes cannot be had",
    )
    fallback_after_s: float = Field(
        300, gt=0, description="longer than a node takes to start, or more nodes are paid for than are needed"
    )
    start_timeout_s: float = Field(
        600,
        gt=0,
        description="how long to wait for these resources before giving up; a node that an autoscaler starts may take many minutes",
    )
    grow_every_s: float = Field(
        600,
        gt=0,
        description="of elastic workers: how long they work, their start included, before room for more is looked for, which begins "
        "them anew from a checkpoint",
    )
    max_failures: int = Field(
        3, ge=0, description="lost workers that a run gets over by itself, one after the other without a new checkpoint"
    )
    max_preemptions: int | None = Field(
        20,
        ge=0,
        description="the same of nodes that are taken away, which count apart; null: however many, as long as it takes",
    )
    collective_timeout_s: float = Field(
        600,
        ge=10,
        description="how long workers wait for one whose process does not answer before all are replaced; for one that "
        "answers but does not come to a collective, data.stall_timeout_s longer",
    )

    @model_validator(mode="after")
    def _falls_back_in_time(self) -> ClusterSection:
        if self.fallback_label_selector and self.fallback_after_s >= self.start_timeout_s:
            raise ValueError(
                f"expected fallback_after_s < start_timeout_s, found {self.fallback_after_s:g} and {self.start_timeout_s:g}"
            )
        return self

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.max


class CheckpointSection(Section):
    every_s: float | None = Field(300, gt=0, description="save so many seconds after the last time; null: not by time")
    every_steps: int | None = Field(None, gt=0, description="save after so many steps; null: not by steps")
    keep: int = Field(2, gt=0, description="the latest that stay; none of a finished stage does")


class EvalSection(Section):
    max_samples: int = Field(500, gt=0, description="held-out samples of each set; the rest is left out")
    batch_size: int = Field(
        50,
        gt=0,
        description="questions that are answered at once, and samples that are read at once for the nll at the end",
    )
    max_new_tokens: int = Field(
        32, gt=0, description="tokens of an answer; a held-out answer that is longer can never be matched exactly"
    )
    every_steps: int | None = Field(
        None, gt=0, description="held-out nll after so many steps of a stage, and after its last; null: only at the end"
    )
    running_samples: int = Field(64, gt=0, description="held-out samples read each time, while a stage runs")


class WandbSection(Section):
    project: str = Field(description="W&B's project; WANDB_API_KEY is in the environment")
    entity: str | None = Field(None, description="user or team that has the project; null: the key's own")


class MlflowSection(Section):
    tracking_uri: str = Field(description="MLflow's server, or a local store of its own")
    experiment: str = Field("dpa_ray", description="that runs are put in; made where there is none")


class TrackersSection(Section):
    tensorboard: bool = Field(True, description="event files in the run's folder")
    wandb: WandbSection | None = Field(None, description="Weights & Biases; null: not used")
    mlflow: MlflowSection | None = Field(None, description="null: not used")


class DebugSection(Section):
    record_samples: bool = Field(
        False, description="write which samples each step took, with their ids, to samples.jsonl in the run's folder"
    )
