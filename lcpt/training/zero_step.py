"""Replace the two update steps of DeepSpeed that read the gradient's norm from the device.

lcpt reads it once a step, with everything else on which ranks must agree (loop.py), and clips in the optimizer. The
ZeRO optimizer of stages 1 and 2 can be told so (`compute_grad_norm: false`); those of bf16 at stage 1 and of stage 3
cannot. A second read would make the device wait for the host between gradient and update.
"""

from __future__ import annotations

from functools import partial


def replace_step(engine) -> None:
    """Give the engine's optimizer a step that leaves the norm, clipping and overflow to its caller."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    if isinstance(engine.optimizer, BF16_Optimizer):
        engine.optimizer.step = partial(_bf16_step, engine.optimizer)
    elif isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        engine.optimizer.step = partial(_stage_3_step, engine.optimizer)


def _bf16_step(zero) -> None:
    """Stage 1 in bf16: every rank has all gradients in fp32, and updates its part of the weights."""
    for weights, gradient in zip(
        zero.fp32_groups_flat_partition, zero.fp32_groups_gradient_flat_partition, strict=True
    ):
        weights.grad = gradient
    zero.optimizer.step()
    zero.update_lp_params()


def _stage_3_step(zero) -> None:
    zero._pre_step()
    zero._partition_all_parameters()
    timers: set[str] = set()
    if not zero.offload_optimizer:
        zero.zero_grad(set_to_none=True)
    for group in range(len(zero.fp16_groups)):
        zero._prepare_sub_group(group, timers)
        zero._optimizer_step(group)
        zero._reassign_or_swap_out_partitioned_parameters(group)
        zero._release_sub_group(group, timers)
    zero._post_step(timers)
