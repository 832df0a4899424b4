"""Wrap DeepSpeed: build an engine from our config, and make an optimizer step with it.

deepspeed is imported when a run starts, not before: it costs seconds, and reading a config must not need it.
"""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch

from lcpt.model import GPT
from lcpt.parallel import groups
from lcpt.training.compilation import compile_blocks
from lcpt.training.config import TrainingConfig
from lcpt.training.optimizer import build_optimizer
from lcpt.training.zero_shards import create_moments
from lcpt.training.zero_step import replace_step

# What lcpt derives of DeepSpeed's JSON, and the keys that decide it.
OWNED = {
    "train_batch_size": "training.global_batch_tokens",
    "train_micro_batch_size_per_gpu": "training.micro_batch",
    "gradient_accumulation_steps": "training.micro_batch",
    "gradient_clipping": "training.grad_clip",
    "optimizer": "training.lr, betas and weight_decay",
    "scheduler": "training.schedule",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "data_types": "training.precision",
    "communication_data_type": "training.precision",
    "zero_allow_untested_optimizer": "training.lr, betas and weight_decay",
    "zero_force_ds_cpu_optimizer": "parallel.offload_optimizer",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer": "parallel.offload_optimizer",
    "zero_optimization.compute_grad_norm": "training.grad_clip",
}


@dataclass
class ParallelConfig:
    zero_stage: int = 1  # what ranks share: 1 the optimizer's state, 2 gradients too, 3 weights too; 0 nothing
    offload_optimizer: bool = False  # keep the optimizer's state and work on the host
    sequence: int = 1  # neighbouring ranks that share each sequence, every one a slice of it
    deepspeed: dict[str, Any] = field(default_factory=dict)  # anything else of DeepSpeed's JSON, as it is

    def __post_init__(self):
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"parallel.zero_stage is {self.zero_stage}; it is 0, 1, 2 or 3")
        if self.sequence < 1:
            raise ValueError(f"parallel.sequence is {self.sequence}; it must be ≥ 1")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("parallel.offload_optimizer needs parallel.zero_stage 1, 2 or 3, not 0")
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(f"parallel.deepspeed.zero_optimization is {zero!r}; it is a section")
        given = self.deepspeed | {f"zero_optimization.{key}": value for key, value in zero.items()}
        for key in given.keys() & OWNED.keys():
            raise ValueError(f"parallel.deepspeed.{key} is derived from {OWNED[key]}; set that instead")


def import_deepspeed_quietly() -> None:
    """Import DeepSpeed without its chatter, and without the C++ extension that it would compile at start."""
    if groups.device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else one warning a process
    warnings.filterwarnings("ignore", category=FutureWarning, module="(deepspeed|torch).*")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Asking which compiled ops there are runs a compiler; the one that would be built serves only inference.
    deepspeed.ops.__compatible_ops__ = {}


def check_deepspeed(training: TrainingConfig, parallel: ParallelConfig) -> None:
    """Raise ValueError where parallel.deepspeed has what DeepSpeed does not take."""
    if parallel.deepspeed:
        import_deepspeed_quietly()
        import deepspeed

        deepspeed.DeepSpeedConfig(deepspeed_config(training, parallel, 1))


def build_engine(model: GPT, training: TrainingConfig, parallel: ParallelConfig, accumulation: int):
    """Build a DeepSpeed engine around `model` on this rank's device: AdamW, `accumulation` micro-batches a step.

    Gradients accumulate, and are summed over ranks, in fp32 at every stage. DeepSpeed neither clips nor looks for
    overflow: `update` is told what to do with the gradient.
    """
    import_deepspeed_quietly()
    import deepspeed

    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    config = deepspeed_config(training, parallel, accumulation)
    optimizer = build_optimizer(model, training)  # while parameters have their shapes
    if parallel.zero_stage == 3:
        partition(model, torch.bfloat16 if training.precision == "bf16" else torch.float32, config)
    else:
        model.to(groups.device())
    compile_blocks(model, training.compile, groups.device())
    with redirect_stdout(StringIO()):  # where its bf16 optimizer reports memory
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=config,
            dist_init_required=False,
        )
    create_moments(engine)
    replace_step(engine)
    return engine


def partition(model: GPT, dtype: torch.dtype, config: dict[str, Any]) -> None:
    """Bring a model to the device for ZeRO stage 3, a parameter at a time: no rank's device ever holds all of it."""
    import deepspeed

    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(groups.device())
    # Weights then travel a block at a time: half of the host's work, and a block can be compiled.
    deepspeed.utils.set_z3_leaf_modules(model, list({type(block) for block in model.blocks}))


def deepspeed_config(training: TrainingConfig, parallel: ParallelConfig, accumulation: int) -> dict[str, Any]:
    """Derive DeepSpeed's JSON from our config."""
    stage, on_gpu = parallel.zero_stage, groups.device().type == "cuda"
    zero: dict[str, Any] = {"stage": stage}
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    elif stage == 2 or (stage == 1 and training.precision == "fp32"):
        zero["compute_grad_norm"] = False
    derived = {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own CPU Adam would need a compiler
        "bf16": {
            "enabled": training.precision == "bf16",
            "check_grad_overflow": False,
            "immediate_grad_update": True,  # a bf16 gradient is freed as soon as it is added to the fp32 one
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "timers": {"throughput": {"enabled": False}},  # it waits for the device in every micro-batch
        "steps_per_print": 2**62,
    }
    return derived | parallel.deepspeed | {"zero_optimization": zero | parallel.deepspeed.get("zero_optimization", {})}


def set_accumulation(engine, micro_batch: int, accumulation: int) -> None:
    """Let the engine's next steps be of so many micro-batches, of that many sequences each."""
    engine.set_train_micro_batch_size(micro_batch)
    engine.set_train_batch_size(micro_batch * accumulation * engine.dp_world_size)
    engine.optimizer.gradient_accumulation_steps = accumulation  # ZeRO optimizers have a copy
    engine.micro_steps = 0  # a step ends where a multiple of the accumulation does


def update(engine, rate: float, factor: float | None) -> None:
    """Update the weights at this learning rate, of which a group may have a share (see optimizer.enter_step), with the
    step's gradient times `factor`; None: leave them as they are.

    Call it after the last backward pass of a step; it clears the gradients.
    """
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = rate * group["share"]
    engine.basic_optimizer.clip_factor = factor
    engine.step()
