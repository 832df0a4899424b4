"""Join the processes of a job, and run the few collectives that lcpt needs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from lcpt.utils.errors import first_line, one_line

_store: dist.Store | None = None


class SetupError(ValueError):
    """Says what kept a job from starting: one line, the same on every rank."""


def join() -> None:
    """Enter the process group that a launcher describes in the environment, or one of a single process.

    Launchers: deepspeed and torchrun (RANK, WORLD_SIZE, …), srun (SLURM_*; it needs MASTER_ADDR and MASTER_PORT too).
    NCCL for tensors on GPUs, gloo for those elsewhere.
    """
    global _store
    os.environ.update(_missing_variables(os.environ))
    try:
        _store, number, world = next(dist.rendezvous("env://"))
    except dist.DistNetworkError as error:
        place = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
        raise SetupError(
            f"the ranks cannot meet at {place} ({first_line(error)}): another job may have that port; "
            "take one of your own with deepspeed --master_port N"
        ) from error
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    # The prefix keeps its keys apart from the watchdog's, which are in the same store.
    dist.init_process_group(backend, store=dist.PrefixStore("group", _store), rank=number, world_size=world)


def _missing_variables(environment: Mapping[str, str]) -> dict[str, str]:
    if "RANK" in environment:
        return {}
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            raise SetupError(
                f"srun started {environment['SLURM_STEP_NUM_TASKS']} tasks, but {' and '.join(missing)} "
                "are not set; start through launch/pretrain.sbatch, which sets them"
            )
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
        }
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def store() -> dist.Store:
    """Return the key-value store of rank 0 through which the ranks of this job met."""
    assert _store is not None, "join() comes first"
    return _store


def device() -> torch.device:
    """Return the device on which this rank computes."""
    if torch.cuda.is_available():
        # SLURM may show each task its own GPU alone, which is then number 0.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(*values: torch.Tensor | float, device: torch.device) -> list[float]:
    """Sum each value over all ranks, in float64; tensors are scalars. It reads from the device once."""
    sums = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def broadcast(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if dist.is_initialized():
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]
    return value


def all_gather(value: Any, group: dist.ProcessGroup | None = None) -> list:
    """Return every rank's value, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Guard code that may fail on some ranks: a ValueError or OSError on any becomes the same SetupError on all."""
    mine = None
    try:
        yield
    except (ValueError, OSError) as error:
        mine = one_line(error)
    for number, message in enumerate(all_gather(mine)):
        if message is not None:
            raise SetupError(message if number == 0 else f"rank {number}: {message}")
