"""How much is one step of a stage: samples, FLOPs, bytes, and what crosses the network?

Pure arithmetic over counts. FLOPs are the model's own (no recomputation), a multiplication and an addition each one.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpa_ray.doctor.cost import STATE_BYTES

Q_BYTES = 8
"""Of q for each target: log q and the target's logit in fp32."""


@dataclass(frozen=True)
class Model:
    """Parameters of a run's parts."""

    llm: int
    lookup: int  # of the LLM's, those of an embedding that is only looked up, not multiplied with
    tower: int
    connector: int
    num_layers: int
    attention_width: int  # heads times their size
    num_image_tokens: int

    @property
    def multiplied(self) -> int:
        return self.llm - self.lookup


@dataclass(frozen=True)
class Work:
    """A stage of a run. Tokens and targets are means over its samples, image tokens counted."""

    stage: str
    llm_mode: str  # full | lora | frozen
    num_samples: int  # of an epoch
    epochs: int
    max_steps: int | None
    global_batch_size: int
    tokens: float
    text_tokens: float
    bytes_per_sample: float  # in the shards
    trained: int
    lora: int  # of the trained parameters
    with_images: bool
    blind: str  # none | live | cached: where q comes from
    model: Model

    @property
    def num_steps(self) -> int:
        """With the recipe's batch."""
        whole = self.epochs * -(-self.num_samples // self.global_batch_size)
        return min(whole, self.max_steps or whole)

    @property
    def num_taken(self) -> int:
        """Samples that the stage passes through the model, those of further epochs counted again."""
        per_epoch = -(-self.num_samples // self.global_batch_size)
        epochs, rest = divmod(self.num_steps, per_epoch)
        return epochs * self.num_samples + min(rest * self.global_batch_size, self.num_samples)

    @property
    def flops_per_sample(self) -> float:
        """Forward and backward of one sample.

        A token costs 2 FLOPs for each parameter that it is multiplied with, and as many again for the gradient of its
        input, which every stage needs, and of the weight where that is trained. Attention (causal: half of the square)
        has no weights: twice its forward in the backward.
        """
        model = self.model
        weights = 3 if self.llm_mode == "full" else 2
        each = 2.0 * model.multiplied * weights + 6.0 * self.lora
        attention = 3 * _attention(model, self.tokens)
        flops = self.tokens * each + attention
        if self.with_images:
            flops += model.num_image_tokens * (2.0 * model.tower + 6.0 * model.connector)
        if self.blind == "live":
            flops += self.blind_flops_per_sample
        return flops

    @property
    def blind_flops_per_sample(self) -> float:
        """The pass without the image: forward alone, text alone."""
        return 2.0 * self.model.multiplied * self.text_tokens + _attention(self.model, self.text_tokens)

    @property
    def checkpoint_bytes(self) -> int:
        return STATE_BYTES * self.trained


def _attention(model: Model, num_tokens: float) -> float:
    """Scores and their product with the values, of one sample's forward."""
    return 2.0 * model.num_layers * model.attention_width * num_tokens**2


def exchanged_bytes(work: Work, *, zero_stage: int | None, item: int, num_workers: int, num_passes: int) -> float:
    """What one GPU sends in a step: gradients are reduced and updated weights gathered; at ZeRO 3 every pass gathers all
    weights twice, for forward and backward.

    Args:
        item: bytes of a weight or gradient that travels.
    """
    share = (num_workers - 1) / num_workers
    if zero_stage == 3:
        whole = work.model.llm + (work.model.tower + work.model.connector if work.with_images else 0)
        return share * item * (2 * num_passes * whole + work.trained)
    return share * item * 2 * work.trained
