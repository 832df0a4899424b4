"""Join the processes of a job, and run the few collectives that lcpt needs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from lcpt.parallel import launchers
from lcpt.parallel.devices import DeviceError, check_alike, choose_device, gpu_index, identity
from lcpt.parallel.launchers import LauncherError, Place, find_place
from lcpt.utils.errors import first_line, one_line

_store: dist.Store | None = None
_device: torch.device | None = None


class SetupError(ValueError):
    """Says what kept a job from starting: one line, the same on every rank."""


def join(choice: str = "auto") -> None:
    """Enter the process group that a launcher describes in the environment, or one of a single process.

    choice: training.device. launchers.py knows the launchers; NCCL serves tensors on GPUs, gloo those elsewhere.
    Raises SetupError, the same on all ranks unless they cannot meet.
    """
    global _store
    try:
        place = find_place(os.environ)
    except LauncherError as error:
        raise SetupError(str(error)) from None
    alone = {} if "RANK" in os.environ else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(place.variables() | (alone if place.world == 1 else {}))
    try:
        _store, number, world = next(dist.rendezvous("env://"))
    except (dist.DistNetworkError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}, port {os.environ.get('MASTER_PORT')}"
        raise SetupError(
            f"the ranks cannot meet at {where} ({first_line(error)}): another job may have that port; "
            "take one of your own with deepspeed --master_port N"
        ) from error
    use_device(choice, place)
    backend = "cpu:gloo,cuda:nccl" if device().type == "cuda" else "gloo"
    # The prefix keeps its keys apart from the watchdog's, which are in the same store.
    dist.init_process_group(backend, store=dist.PrefixStore("group", _store), rank=number, world_size=world)


def use_device(choice: str, place: Place) -> None:
    """Choose the device of this rank, see devices.py; SetupError if that of any rank in the store does not serve."""
    global _device
    mine: dict[str, Any] = {}
    try:
        _device = choose_device(choice, place.local_rank)
        mine = {"type": _device.type, "identity": identity(_device)}
        if _device.type == "cuda":
            torch.cuda.set_device(_device)
            os.environ["LOCAL_RANK"] = str(_device.index)  # DeepSpeed takes it for the GPU's number
    except DeviceError as error:
        mine = {"error": str(error)}
    everyone = _exchange("device", mine, place) if _store else [mine]
    for number, found in enumerate(everyone):
        if "error" in found:
            raise SetupError(found["error"] if number == 0 else f"rank {number}: {found['error']}")
    try:
        check_alike([found["type"] for found in everyone], [found["identity"] for found in everyone])
    except DeviceError as error:
        raise SetupError(str(error)) from None


def _exchange(key: str, mine: dict, place: Place) -> list[dict]:
    """Return every rank's value, through the store, before there is a group."""
    store().set(f"{key}/{place.rank}", json.dumps(mine))
    values = [json.loads(store().get(f"{key}/{rank}")) for rank in range(place.world)]
    store().set(f"{key}/read/{place.rank}", "")
    if place.rank == 0:  # it holds the store, and may leave next
        store().wait([f"{key}/read/{rank}" for rank in range(place.world)])
    return values


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def store() -> dist.Store:
    """Return the key-value store of rank 0 through which the ranks of this job met."""
    assert _store is not None, "join() comes first"
    return _store


def device() -> torch.device:
    """Return the device on which this rank computes; before join(), a GPU if there is one."""
    if _device is not None:
        return _device
    if torch.cuda.is_available():
        return torch.device("cuda", gpu_index(int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()))
    return torch.device("cpu")


def is_first() -> bool:
    """Check whether this process speaks for its job; before join() too."""
    return rank() == 0 if dist.is_initialized() else launchers.is_first(os.environ)


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


def gather(value: Any) -> list | None:
    """Return every rank's value, in the order of ranks, on the first; None on the others."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
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
