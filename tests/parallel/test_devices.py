"""Which device a rank takes; GPUs here are stand-ins."""

import pytest
import torch

from lcpt.parallel import devices
from lcpt.parallel.devices import DeviceError, check_alike, choose_device, gpu_index, gpus_of_slurm

CPU = torch.device("cpu")
NO_GPUS = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "0", "CUDA_VISIBLE_DEVICES": "NoDevFiles"}
UNDER_DEEPSPEED = {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0,1", "CROSS_RANK": "0"}  # without any GPU
GPUS = [
    {"SLURM_JOB_ID": "7", name: value}
    for name, value in (
        ("SLURM_JOB_GPUS", "0"),
        ("SLURM_STEP_GPUS", "2,3"),
        ("SLURM_GPUS_ON_NODE", "8"),
        ("CUDA_VISIBLE_DEVICES", "0"),
    )
]


@pytest.fixture
def machine(monkeypatch):
    """machine(n) -> this machine has n GPUs that work."""

    def set_up(n):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
        monkeypatch.setattr(devices, "check_works", lambda device: None)

    return set_up


@pytest.mark.parametrize("local_rank, visible, expected", [(0, 8, 0), (7, 8, 7), (0, 1, 0), (3, 1, 0), (1, 2, 1)])
def test_a_process_takes_its_own_gpu(machine, local_rank, visible, expected):
    machine(visible)
    assert gpu_index(local_rank, visible) == expected
    for choice in ("auto", "cuda"):
        assert choose_device(choice, local_rank, {}) == torch.device("cuda", expected)
    assert choose_device("cpu", local_rank, {}) == CPU


def test_more_processes_than_gpus_are_refused():
    """They would share one, and nobody would say so."""
    with pytest.raises(DeviceError, match="process 4 of this machine sees 4 GPUs"):
        gpu_index(4, 4)


def test_ranks_that_share_a_gpu_are_refused():
    check_alike(["cuda"] * 3, ["a", "b", None])
    check_alike(["cpu"] * 2, [None, None])
    with pytest.raises(DeviceError, match=r"ranks 0 and 2 share one GPU \(a\)"):
        check_alike(["cuda"] * 3, ["a", "b", "a"])
    with pytest.raises(DeviceError, match="rank 0 computes on cuda and rank 1 on cpu"):
        check_alike(["cuda", "cpu"], ["a", None])


@pytest.mark.parametrize("environment", GPUS, ids=str)
def test_slurm_promised_a_gpu(machine, environment):
    machine(0)
    name, value = list(environment.items())[1]
    with pytest.raises(DeviceError, match=rf"SLURM gave this job GPUs \({name}={value}\), but .* no working GPU"):
        choose_device("auto", 0, environment)
    assert choose_device("cpu", 0, environment) == CPU


@pytest.mark.parametrize("environment", [{}, {"CUDA_VISIBLE_DEVICES": "0"}, NO_GPUS, UNDER_DEEPSPEED], ids=str)
def test_without_a_promise_auto_is_the_cpu(machine, environment):
    machine(0)
    assert gpus_of_slurm(environment) is None and choose_device("auto", 0, environment) == CPU
    with pytest.raises(DeviceError, match="training.device is cuda, but this machine has no working GPU"):
        choose_device("cuda", 0, environment)


def test_a_gpu_that_does_not_work_is_named(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "zeros", broken)
    with pytest.raises(DeviceError, match=r"cuda:1 of this machine does not work \(CUDA error: uncorrectable"):
        choose_device("auto", 1, {})


@pytest.mark.parametrize("gpus, choice, accelerator", [(0, "auto", "cuda"), (2, "cpu", "cuda"), (2, "auto", "cpu")])
def test_deepspeed_must_not_be_told_otherwise(machine, gpus, choice, accelerator):
    machine(gpus)
    with pytest.raises(DeviceError, match=f"DS_ACCELERATOR is {accelerator}, but"):
        choose_device(choice, 0, {"DS_ACCELERATOR": accelerator})
    other = {"cuda": "cpu", "cpu": "cuda"}[accelerator]
    assert choose_device(choice, 0, {"DS_ACCELERATOR": other}).type == other
