"""DeepSpeed behind one door: our config in, an engine out, and named fp32 tensors back from any ZeRO stage.

deepspeed is imported when a run starts, not before: it costs seconds, and reading a config must not need it.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from lcpt.training.config import TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class ParallelConfig:
    zero_stage: int = 1

    def __post_init__(self):
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(f"parallel.zero_stage is {self.zero_stage}; it is 1, 2 or 3")


def quiet_deepspeed() -> None:
    """Import DeepSpeed without its chatter, and without the C++ extension that it would compile at start."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else one warning a process
    warnings.filterwarnings("ignore", category=FutureWarning, module="(deepspeed|torch).*")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Asking which compiled ops there are runs a compiler; the one that would be built serves only inference.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_init_required=False, verbose=False)


def build_engine(model: nn.Module, training: TrainingConfig, parallel: ParallelConfig, accumulation: int):
    """A DeepSpeed engine around `model`, with AdamW and `accumulation` micro-batches a step."""
    quiet_deepspeed()
    import deepspeed

    optimizer = torch.optim.AdamW(
        parameter_groups(model, training.weight_decay), lr=training.lr, betas=tuple(training.betas), eps=1e-8,
    )
    config = {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.grad_clip,
        "zero_optimization": {"stage": parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": training.precision == "bf16"},
        "communication_data_type": "fp32",
        "steps_per_print": 2**62,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    create_moments(engine)
    return engine


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; gains, biases and scalars do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def create_moments(engine) -> None:
    """Give AdamW its zero moments before the first step.

    DeepSpeed links parameters to their moments once, after the first *group* has made its first step: with two groups
    the second would never be reachable by name.
    """
    base = engine.optimizer.optimizer
    if engine.zero_optimization_stage() == 3:
        flat = engine.optimizer.fp32_partitioned_groups_flat
    else:
        flat = [partition for group in base.param_groups for partition in group["params"]]
    for partition in flat:
        zeros = {moment: torch.zeros_like(partition) for moment in MOMENTS}
        base.state[partition] = {"step": torch.tensor(0.0), **zeros}


def set_learning_rate(engine, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def adam_step(engine) -> int:
    """How many updates AdamW has made."""
    return int(next(iter(engine.optimizer.optimizer.state.values()))["step"])


def named_tensors(engine, group: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole fp32 tensor on the CPU) of "weights" or of an Adam moment; every rank must walk through it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    for name, parameter in engine.module.named_parameters():
        if group == "weights":
            yield name, safe_get_full_fp32_param(parameter).cpu()
        else:
            yield name, safe_get_full_optimizer_state(parameter, group).cpu()
    if group == "weights":
        yield from ((name, buffer.float().cpu()) for name, buffer in engine.module.named_buffers())


def load_named_tensors(engine, tensors: dict[str, dict[str, torch.Tensor]], adam_step: int) -> None:
    """Put whole tensors of "weights" and both moments in their places, before the first step; every rank calls it."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    stage_3 = engine.zero_optimization_stage() == 3
    if not stage_3:
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # links the moments, as the first step would
    for name, parameter in engine.module.named_parameters():
        weight = tensors["weights"][name].to(parameter.device)
        safe_set_full_fp32_param(parameter, weight)
        # That sets the fp32 master copy alone; the next forward pass reads the parameter itself.
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=stage_3):
            parameter.data.copy_(weight)
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, tensors[moment][name].to(parameter.device), moment)
    for state in engine.optimizer.optimizer.state.values():
        state["step"].fill_(adam_step)
