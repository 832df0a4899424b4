"""The processes of a job: joining them, and the few collectives that lcpt needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


class SetupError(ValueError):
    """What kept a job from starting: one line, the same on every rank."""


def join() -> None:
    """Enter the process group that a launcher describes in the environment, or one of a single process.

    NCCL for tensors on GPUs, gloo for those elsewhere.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def device() -> torch.device:
    """Where this rank computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def total(*values: torch.Tensor | float, device: torch.device) -> list[float]:
    """The sum over all ranks of each value, in float64."""
    sums = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def share(value):
    """Rank 0's value, on every rank."""
    if dist.is_initialized():
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]
    return value


@contextmanager
def agreed() -> Iterator[None]:
    """Set-up that may fail on some ranks: a ValueError or OSError on any becomes the same SetupError on all."""
    mine = None
    try:
        yield
    except (ValueError, OSError) as error:
        mine = " ".join(str(error).split())
    errors = [mine]
    if dist.is_initialized():
        errors = [None] * world_size()
        dist.all_gather_object(errors, mine)
    for number, error in enumerate(errors):
        if error is not None:
            raise SetupError(error if number == 0 else f"rank {number}: {error}")
