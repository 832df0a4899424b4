"""Choose the device of a rank: the GPU that is its own, or the CPU; never the CPU where a GPU was promised."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from lcpt.utils.errors import first_line

LISTS_OF_GPUS = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "CUDA_VISIBLE_DEVICES")
COUNT_OF_GPUS = "SLURM_GPUS_ON_NODE"
BY_DEEPSPEED = "CROSS_RANK"  # its launcher sets this, and CUDA_VISIBLE_DEVICES on any machine


class DeviceError(ValueError):
    """Says in one line why a rank cannot compute where it should."""


def choose_device(choice: str, local_rank: int, environment: Mapping[str, str] = os.environ) -> torch.device:
    """Choose the device of the process `local_rank` of its machine, under training.device.

    auto is the GPU if there is one. Raises DeviceError where there must be one and none works: under cuda, and under
    auto in a SLURM job that has GPUs.
    """
    device = torch.device("cpu")
    if choice != "cpu":
        promised = "training.device is cuda" if choice == "cuda" else gpus_of_slurm(environment)
        if torch.cuda.is_available():
            device = torch.device("cuda", gpu_index(local_rank, torch.cuda.device_count()))
            check_works(device)
        elif promised:
            raise DeviceError(
                f"{promised}, but this machine has no working GPU, or this PyTorch no CUDA; "
                "training.device=cpu trains without"
            )
    accelerator = environment.get("DS_ACCELERATOR", device.type)
    if accelerator != device.type:
        raise DeviceError(
            f"DS_ACCELERATOR is {accelerator}, but under training.device={choice} this machine computes on "
            f"{device.type}; unset DS_ACCELERATOR, and set training.device"
        )
    return device


def check_works(device: torch.device) -> None:
    """Raise DeviceError if nothing can be computed there."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        raise DeviceError(
            f"{device} of this machine does not work ({first_line(error)}); training.device=cpu trains without"
        ) from error


def gpu_index(local_rank: int, visible: int) -> int:
    """Return a process's GPU among the `visible` ones: its own if it sees one alone, else that of its local rank."""
    if visible == 1:  # SLURM and some MPI launchers show each process its own, which is then number 0
        return 0
    if local_rank >= visible:
        raise DeviceError(
            f"process {local_rank} of this machine sees {visible} GPUs: start one process a GPU "
            "(deepspeed --num_accelerators, torchrun --nproc_per_node, srun --ntasks-per-node)"
        )
    return local_rank


def identity(device: torch.device) -> str | None:
    """Name a GPU, the same for all processes that see it; None where that cannot be known, and for a CPU."""
    if device.type == "cpu":
        return None
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", None) or "") or None


def check_alike(types: Sequence[str], identities: Sequence[str | None]) -> None:
    """Raise DeviceError if ranks compute on devices of several types, or two of them on one GPU; an entry a rank."""
    owners: dict[str, int] = {}
    for rank, (kind, name) in enumerate(zip(types, identities, strict=True)):
        if kind != types[0]:
            raise DeviceError(
                f"rank 0 computes on {types[0]} and rank {rank} on {kind}: not every machine has a working GPU; "
                "leave it out, or set training.device=cpu"
            )
        if name is not None and owners.setdefault(name, rank) != rank:
            raise DeviceError(
                f"ranks {owners[name]} and {rank} share one GPU ({name}): start one process a GPU, or show each its "
                "own (srun --gpus-per-task=1)"
            )


def gpus_of_slurm(environment: Mapping[str, str]) -> str | None:
    """Say by which variable SLURM gave this job GPUs; None if it has none."""
    if "SLURM_JOB_ID" not in environment:
        return None
    for name in LISTS_OF_GPUS[:2] if BY_DEEPSPEED in environment else LISTS_OF_GPUS:
        if (value := environment.get(name, "")) not in ("", "-1", "NoDevFiles"):
            return f"SLURM gave this job GPUs ({name}={value})"
    if (count := environment.get(COUNT_OF_GPUS, "0")) not in ("", "0"):
        return f"SLURM gave this job GPUs ({COUNT_OF_GPUS}={count})"
    return None
