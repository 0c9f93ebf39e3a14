"""DeepSpeed behind the Engine protocol: ZeRO 0 to 3, bf16 or fp32, every default that matters stated."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dpa_ray.batch import Batch
from dpa_ray.engine.protocol import (
    OptimizerSettings,
    Unsharded,
    emptied,
    make_optimizer,
    rank,
    trained_names,
    world_size,
)
from dpa_ray.engine.state import Fragment, adam_fragment, num_updates, set_num_updates
from dpa_ray.model.step import StepModule, StepSums

FP32_SUM_FROM = 64
"""Of so many ranks gradients are summed in fp32 also where they are bf16. A sum in bf16, one rank's share after the other's, is
off by 0.7 % of its rms at 64 ranks and by 2 % at 512, where a share is less than half of the sum's last bit; of 8 ranks that is
nothing, and fp32 is twice the bytes."""


def deepspeed_config(
    *, zero_stage: int, bf16: bool, micro_batch_size: int, accumulation_steps: int, grad_clip: float, world_size: int
) -> dict[str, Any]:
    """DeepSpeed's JSON config. What is stated though it may be the default has moved between releases."""
    # Micro-batches are summed in fp32, or the result would hang on how many they are. (Stage 1 has another optimizer then.)
    data_types = {"data_types": {"grad_accum_dtype": "fp32"}} if bf16 and zero_stage >= 2 else {}
    over_ranks = {"communication_data_type": "fp32"} if bf16 and world_size >= FP32_SUM_FROM else {}
    return {
        **data_types,
        **over_ranks,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        # At stage 0 DeepSpeed has no fp32 master weights and reports no norm: ZeroEngine has its own there.
        "gradient_clipping": grad_clip if zero_stage > 0 else 0.0,
        "bf16": {"enabled": bf16 and zero_stage > 0, "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,  # torch's own AdamW, which needs no build
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        },
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


class ZeroEngine:
    """Engine (see protocol.py) on DeepSpeed.

    The weight sum of a step is known only at its end: it divides the gradients in place of a loss scale.
    """

    def __init__(
        self,
        module: StepModule,
        settings: OptimizerSettings,
        device: torch.device,
        *,
        zero_stage: int,
        bf16: bool,
        micro_batch_size: int,
        accumulation_steps: int,
    ):
        deepspeed = _import_deepspeed(device)
        # DeepSpeed moves a whole model too, but after the fp32 masters of stage 0 were made of it
        self.module = module if zero_stage else module.to(device)
        self.device = device
        self.zero_stage = zero_stage
        self.replicated = zero_stage == 0
        self.sharded = zero_stage == 3
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.unsharded = Unsharded(self.parameters, settings) if zero_stage == 0 else None
        optimizer = self.unsharded.optimizer if self.unsharded else make_optimizer(list(self.parameters), settings)
        config = deepspeed_config(
            zero_stage=zero_stage, bf16=bf16, micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps, grad_clip=settings.grad_clip, world_size=world_size(),
        )  # fmt: skip
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.deepspeed = deepspeed
        self._set_scale(1.0)

    def forward(self, batch: Batch) -> StepSums:
        sums: StepSums = self.engine(batch.to(self.device))
        return sums

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def update(self, divisor: float, lr: float) -> float:
        # DeepSpeed has averaged the gradients over ranks; they are to be summed, then divided.
        scale = divisor / world_size()
        if self.unsharded is not None:
            masters = self.unsharded.masters
            found = [p.grad for p in self.parameters]
            grads = [torch.zeros_like(m) if g is None else g.float() for g, m in zip(found, masters, strict=True)]
            return self.unsharded.update(grads, scale, lr, self.engine.step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self._set_scale(scale)
        self.engine.step()
        self._set_scale(1.0)
        norm = float(self.engine.get_global_grad_norm())
        return norm if math.isfinite(norm) else math.inf

    def _set_scale(self, scale: float) -> None:
        if self.zero_stage > 0:
            self.engine.optimizer.override_loss_scale(scale)

    def fragments(self) -> list[Fragment]:
        names = trained_names(self.module)
        if self.unsharded is not None:
            return self.unsharded.fragments(names)
        return list(
            (_fragments_3 if self.zero_stage == 3 else _fragments_1_2)(self.engine.optimizer, names, self.parameters)
        )

    def num_updates(self) -> int:
        return num_updates(self._adam)

    def restored(self, num_updates: int) -> None:
        if self.unsharded is not None:
            self.unsharded.restored(num_updates)
            return
        set_num_updates(self._adam, num_updates)
        if self.zero_stage < 3:
            self.engine.optimizer.update_lp_params()
        else:
            _write_back_3(self.engine.optimizer)

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """torch's own optimizer, inside DeepSpeed's."""
        adam: torch.optim.Optimizer = self.unsharded.optimizer if self.unsharded else self.engine.optimizer.optimizer
        return adam

    def gather(self, names: Sequence[str]) -> dict[str, Tensor]:
        own = dict(self.module.model.named_parameters(remove_duplicate=False))
        full: dict[str, Tensor] = {}
        for name in names:  # one at a time: a whole large model would not fit on one GPU
            with self.deepspeed.zero.GatheredParameters([own[name]], enabled=self.zero_stage == 3):
                if rank() == 0:
                    full[name] = own[name].detach().cpu().clone()
        return full

    def close(self) -> None:
        self.engine.destroy()
        # Hooks of the module, and of its parameters by ways that the garbage collector does not see, hold engine and optimizer.
        optimizers = {id(optimizer): optimizer for optimizer in (self._adam, self.engine.optimizer)}
        self.engine.optimizer = self.engine.basic_optimizer = None
        for optimizer in optimizers.values():
            vars(optimizer).clear()
        if self.sharded:
            from deepspeed.runtime.zero import parameter_offload

            parameter_offload.FWD_MODULE_STACK.clear()  # keeps the outermost module
            for parameter in self.module.parameters():
                parameter.ds_tensor = None  # type: ignore[attr-defined]
        del self.engine, self.unsharded, self.parameters
        emptied(self.module)


def _fragments_1_2(zero: Any, names: Sequence[str], parameters: Sequence[Tensor]) -> Iterator[Fragment]:
    """ZeRO 1 and 2: parameters one after the other in a flat buffer, of which each rank keeps one part."""
    for name, parameter in zip(names, parameters, strict=True):
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None and mapping.lp_fragment_address.numel > 0:
            flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            inside, part = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield adam_fragment(name, part.start, zero.optimizer, flat, inside.start, part.numel)


def _fragments_3(zero: Any, names: Sequence[str], parameters: Sequence[Tensor]) -> Iterator[Fragment]:
    """ZeRO 3: of each parameter every rank keeps one part, the last ones padded."""
    for name, parameter in zip(names, parameters, strict=True):
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start = rank() * size
        length = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if length > 0:
            yield adam_fragment(name, start, zero.optimizer, zero.fp32_partitioned_groups_flat[group], offset, length)


def _write_back_3(zero: Any) -> None:
    """Parameters from their fp32 masters, as DeepSpeed does it when it loads a checkpoint of its own."""
    for group, master in enumerate(zero.fp32_partitioned_groups_flat):
        flat = zero.fp16_partitioned_groups_flat[group]
        flat.data.copy_(master.data)
        parts = zero.fp16_partitioned_groups[group]
        for part, new in zip(parts, zero.unflatten(flat, parts), strict=True):
            part.data = new.data
    if zero.persistent_parameters:  # small ones, which stay whole on every rank
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told what it would otherwise guess, build or print."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops as ops

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if device.type == "cpu":
        # The shared-memory collectives are compiled at first use (48 s, needs g++); gloo serves.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
