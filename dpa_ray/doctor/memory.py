"""How much memory does a stage need on one device, and how would each ZeRO stage share it out?

An estimate for what the engines here do (engine/zero.py, engine/plain.py): fp32 masters and both moments of AdamW for
what is trained alone, DeepSpeed's buckets, the loss in chunks. W ranks; bytes everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from dpa_ray.doctor.activations import Kept
from dpa_ray.engine.zero import deepspeed_config
from dpa_ray.model.score import CHUNK_BYTES

ZERO_STAGES = (0, 1, 2, 3)
GIB = 2**30

CUDA_BYTES = GIB
"""What CUDA, cuBLAS and NCCL take of a GPU before anything is put on it; 0.5 to 1 GiB are usual."""

MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of `stage3_max_live_parameters`: so many gathered parameters may stay between uses."""

ALL_REDUCE_ELEMENTS = 500_000_000
"""DeepSpeed's default bucket at ZeRO 0."""


@dataclass(frozen=True)
class Counts:
    """A stage's parameters, each counted once."""

    frozen: int
    trained: int
    small: int  # of both, in tensors that ZeRO 3 keeps whole on every rank
    width: int  # of the decoder
    num_rows: int  # of the head
    head_is_trained: bool

    @property
    def whole(self) -> int:
        return self.frozen + self.trained


@dataclass(frozen=True)
class Pictures:
    """The tower's side of one image."""

    num_layers: int
    width: int
    num_features: int  # image tokens
    side: int  # pixels


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device at the worst moment of a step."""

    weights: int
    gathered: int  # ZeRO 3: parameters made whole while they are used
    gradients: int
    masters: int
    moments: int
    buckets: int
    activations: int
    loss: int
    reserve: int
    update: int  # at the update, when activations and loss are gone
    start: int  # while the engine is made

    @property
    def state(self) -> int:
        """Weights and the optimizer's state, which stay between steps."""
        return self.weights + self.masters + self.moments

    @property
    def total(self) -> int:
        step = self.gathered + self.activations + self.loss
        return max(self.state + self.gradients + self.buckets + max(step, self.update), self.start) + self.reserve

    def to_dict(self) -> dict[str, int]:
        return {f"{f.name}_bytes": getattr(self, f.name) for f in fields(self)} | {"total_bytes": self.total}


def count(model: Any, head: Any) -> Counts:
    """The counts of a stage's model, on whatever device; `requires_grad` says what is trained."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    threshold = _zero_settings(3)["stage3_param_persistence_threshold"]
    return Counts(
        sum(p.numel() for p in parameters) - trained, trained, sum(p.numel() for p in parameters if p.numel() < threshold),
        head.weight.shape[1], head.weight.shape[0], bool(head.weight.requires_grad),
    )  # fmt: skip


def estimate(
    counts: Counts,
    *,
    zero_stage: int | None,
    world_size: int,
    bf16: bool,
    num_slots: int,
    num_targets: int,
    kept: int,
    pictures: Pictures | None = None,
    num_images: int = 0,
    on_gpu: bool = True,
) -> Estimate:
    """Of one rank.

    Args:
        zero_stage: None is the plain engine.
        num_slots: positions that the decoder computes in a micro-batch, padding included.
        num_targets: of a micro-batch, at most.
        kept: bytes that the decoder keeps of a micro-batch for the backward (activations.py).
        num_images: of a micro-batch.
    """
    item = 2 if bf16 else 4
    trained = counts.trained
    gradients, masters, moments, update = _state(trained, zero_stage, world_size, item)
    weights, gathered, start, buckets = counts.whole * item, 0, 0, 0
    if zero_stage:
        settings = _zero_settings(zero_stage)
        # made whole, however little is trained; ZeRO 1 and 2 have two where communication overlaps, as on GPUs
        buckets = settings["reduce_bucket_size"] * item * (2 if on_gpu and zero_stage < 3 else 1)
        if zero_stage == 3 and world_size > 1:
            start = weights + -(-weights // world_size)  # the whole model is on the device before it is parted
            gathered = item * min(counts.whole, MAX_LIVE_PARAMETERS + settings["stage3_prefetch_bucket_size"])
            weights = -(-weights // world_size) + item * counts.small
    seen = _pictures(pictures, num_images, counts.width, item) if pictures else 0
    return Estimate(
        weights=weights, gathered=gathered, gradients=gradients, masters=masters, moments=moments, buckets=buckets,
        activations=kept + seen + 2 * num_slots * counts.width * item,  # embeddings, and the same with images in place
        loss=_loss(counts, num_targets, item, "cuda" if on_gpu else "cpu"), reserve=CUDA_BYTES if on_gpu else 0,
        update=update, start=start,
    )  # fmt: skip


def kept_bytes(kept: Kept, *, checkpointing: bool) -> int:
    """Of the decoder at the worst moment. Without checkpointing that is where the backward begins; with it, a layer is
    computed again while gradients of about its size pass through."""
    return kept.checkpointed + kept.layer if checkpointing else kept.whole


def _state(trained: int, zero_stage: int | None, world_size: int, item: int) -> tuple[int, int, int, int]:
    """(gradients, masters, moments, more at the update) of `trained` parameters on one rank."""
    several = world_size > 1
    if zero_stage is None:  # gradients are summed in fp32; in one flat tensor they cross ranks
        return 4 * trained + item * trained, 4 * trained if item == 2 else 0, 8 * trained, 4 * trained if several else 0
    if zero_stage == 0:
        crossing = item * min(trained, ALL_REDUCE_ELEMENTS) if several else 0
        exact = 4 * trained if item == 2 else 0
        return item * trained, exact, 8 * trained, max(crossing, exact)
    share = -(-trained // world_size)
    gradients = item * trained if zero_stage == 1 else 4 * share  # from stage 2 on micro-batches are summed in fp32
    return gradients, 4 * share, 8 * share, 4 * share


def _loss(counts: Counts, num_targets: int, item: int, device: str) -> int:
    """Hidden states of the targets, a chunk of logits with what is made of it, and the head's gradient."""
    chunk = min(CHUNK_BYTES[device], 4 * num_targets * counts.num_rows)
    hidden = 2 * num_targets * counts.width * item
    several = 4 * num_targets * counts.num_rows > chunk
    head = (4 + item) * counts.num_rows * counts.width if counts.head_is_trained and several else 0
    return 2 * chunk + hidden + head


def _pictures(of: Pictures, num_images: int, width: int, item: int) -> int:
    """Pixels, the tower's hidden states (all are given back), and what the connector keeps."""
    pixels = 3 * of.side**2 * (4 + item)
    states = (of.num_layers + 1) * (of.num_features + 1) * of.width * item
    connector = of.num_features * (of.width + 3 * width) * item
    return num_images * (pixels + states + connector)


def _zero_settings(stage: int) -> dict[str, Any]:
    config = deepspeed_config(
        zero_stage=stage, bf16=True, micro_batch_size=1, accumulation_steps=1, grad_clip=0.0, world_size=1
    )
    settings: dict[str, Any] = config["zero_optimization"]
    return settings
