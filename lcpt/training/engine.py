"""Wrap DeepSpeed: build an engine from our config, and make an optimizer step with it.

deepspeed is imported when a run starts, not before: it costs seconds, and reading a config must not need it.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from lcpt.parallel import groups
from lcpt.training.bad_steps import SkippableAdamW
from lcpt.training.config import TrainingConfig
from lcpt.training.zero_shards import create_moments


@dataclass
class ParallelConfig:
    zero_stage: int = 1  # what ranks share: 1 the optimizer's state, 2 gradients too, 3 weights too; 0 nothing
    offload_optimizer: bool = False  # keep the optimizer's state and work on the host

    def __post_init__(self):
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"parallel.zero_stage is {self.zero_stage}; it is 0, 1, 2 or 3")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("parallel.offload_optimizer needs parallel.zero_stage 1, 2 or 3, not 0")


def import_deepspeed_quietly() -> None:
    """Import DeepSpeed without its chatter, and without the C++ extension that it would compile at start."""
    if groups.device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else one warning a process
    warnings.filterwarnings("ignore", category=FutureWarning, module="(deepspeed|torch).*")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Asking which compiled ops there are runs a compiler; the one that would be built serves only inference.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_init_required=False, verbose=False)


def build_engine(model: nn.Module, training: TrainingConfig, parallel: ParallelConfig, accumulation: int):
    """Build a DeepSpeed engine around `model`, with AdamW and `accumulation` micro-batches a step."""
    import_deepspeed_quietly()
    import deepspeed

    optimizer = SkippableAdamW(
        parameter_groups(model, training.weight_decay),
        lr=training.lr,
        betas=(training.betas[0], training.betas[1]),
        eps=1e-8,
    )
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": groups.device().type == "cuda"}
    config = {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.grad_clip if parallel.zero_stage else 0.0,  # at stage 0 `update` clips
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own CPU Adam would need a compiler
        "bf16": {"enabled": training.precision == "bf16"},
        "communication_data_type": "fp32",
        "steps_per_print": 2**62,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    create_moments(engine)
    return engine


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Group parameters for weight decay: matrices decay; gains, biases and scalars do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def update(engine, training: TrainingConfig, rate: float, skip: bool) -> float:
    """Clip the gradient and update at this learning rate, after a step's last backward pass.

    Nothing changes if `skip`, or if the gradient is not finite. Returns the global norm of the gradient, inf or NaN
    where it is not finite.
    """
    optimizer = engine.basic_optimizer
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    optimizer.skip = skip
    if engine.zero_optimization_stage() > 0:  # where DeepSpeed clips, and itself skips what is not finite
        engine.step()
        return float(engine.get_global_grad_norm())
    norm = float(nn.utils.clip_grad_norm_(engine.module.parameters(), training.grad_clip or math.inf))
    optimizer.skip = skip or not math.isfinite(norm)
    engine.step()
    return norm


def adam_step(engine) -> int:
    """Return how many updates AdamW has made."""
    return int(next(iter(engine.basic_optimizer.state.values()))["step"])
