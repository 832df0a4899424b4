"""Say in one line what does not fit into memory: before a start what never can, afterwards which setting to change."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lcpt.data import is_task
from lcpt.model import GPT, ModelConfig
from lcpt.parallel import groups
from lcpt.utils.errors import first_line
from lcpt.utils.memory import host_memory_bytes

if TYPE_CHECKING:
    from lcpt.config import Config

TOKEN = 16  # bytes: an input and a label, int64 each
# What needs less memory than each value of model.activation_checkpointing.
REMEDIES = {False: "selective, true or offload", "selective": "true or offload", True: "offload", "offload": ""}


def check_fits(config: Config, world: int) -> None:
    """Raise ValueError for what cannot fit, whatever else is set: the weights alone, or the tokens of a step.

    Less than that may still be too much; then an allocation fails, and `explain` has the line for it.
    """
    training, host, device = config.training, host_memory_bytes(), groups.device()
    parameters, largest = count_parameters(config.model)
    weights = f"the model has {parameters:,} parameters (the largest tensor: {largest}), {{}}: take a smaller model"
    if (needed := 4 * parameters) > host:
        said = f"{_gib(needed)} in fp32 to begin with, and this machine has {_gib(host)} of memory"
        raise ValueError(weights.format(said))
    if device.type == "cuda":
        width, ranks = 2 if training.precision == "bf16" else 4, world if config.parallel.zero_stage == 3 else 1
        total = torch.cuda.get_device_properties(device).total_memory
        if (needed := width * parameters // ranks) > total:
            said = f"{_gib(needed)} of weights on a rank, and its GPU has {_gib(total)}"
            raise ValueError(weights.format(said) + ", parallel.zero_stage=3 or more ranks")
    tokens = {"training.global_batch_tokens": training.global_batch_tokens}
    if tasks := sum(map(is_task, config.data.valid_sets.values())):  # of text there is no more than there is
        tokens["training.valid_tokens" + f" of {tasks} tasks" * (tasks > 1)] = tasks * training.valid_tokens
    for name, count in tokens.items():
        if (needed := TOKEN * count // world) > host:
            raise ValueError(
                f"{name} {count:,} are {_gib(needed)} of tokens on each of {world} ranks, and this machine has "
                f"{_gib(host)} of memory: lower it, or take more ranks"
            )


def count_parameters(model: ModelConfig) -> tuple[int, str]:
    """Return (parameters of a model, its largest tensor in words), without building it."""
    try:
        with torch.device("meta"):
            named = dict(GPT(model).named_parameters())
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"no memory holds this model ({first_line(error)}): take a smaller one") from error
    name, tensor = max(named.items(), key=lambda item: item[1].numel())
    return sum(p.numel() for p in named.values()), f"{name} {list(tensor.shape)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Check whether an allocation failed, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    allocator = r"can't allocate memory|not enough memory|out of memory|Storage size calculation overflowed"
    return isinstance(error, RuntimeError) and bool(re.search(allocator, str(error)))


def write_snapshot(run: Path) -> Path | None:
    """Write what holds this rank's GPU memory to the run folder, for pytorch.org/memory_viz; None on a CPU.

    With training.profile it has the history too: where each block was allocated.
    """
    if groups.device().type != "cuda":
        return None
    path = run / f"out-of-memory-rank{groups.rank()}.pickle"
    torch.cuda.memory._dump_snapshot(str(path))
    return path


def explain(error: BaseException, config: Config, place: str) -> str:
    """Turn a failed allocation into one line that names the settings to change."""
    training = config.training
    remedies = []
    if training.micro_batch > 1:
        remedies.append(f"lower training.micro_batch (now {training.micro_batch})")
    if cheaper := REMEDIES[config.model.activation_checkpointing]:
        remedies.append(f"set model.activation_checkpointing={cheaper}")
    if config.parallel.zero_stage < 3 and groups.world_size() > 1:
        remedies.append(f"raise parallel.zero_stage (now {config.parallel.zero_stage})")
    if config.parallel.sequence < groups.world_size():
        remedies.append(f"raise parallel.sequence (now {config.parallel.sequence})")
    if groups.device().type == "cuda" and not config.parallel.offload_optimizer:
        remedies.append("set parallel.offload_optimizer=true")
    remedies.append("take a smaller model or data.context")
    return f"rank {groups.rank()} is out of memory at {place} ({first_line(error)}): {', or '.join(remedies)}"


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB"
