"""Check on a CPU how a GPU is timed, by the calls to a stand-in for torch.cuda."""

import pytest
import torch

from lcpt.benchmarking import timing

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def too_large():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")


def test_first_passes_name_what_fails(monkeypatch):
    ran, waited = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    steps = {"large": too_large, "well": lambda: ran.append("well")}
    assert timing.first_passes(steps, CUDA) == {
        "large": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    }
    assert ran == ["well"] and waited == [True]
    assert timing.first_passes(steps, CPU) == {} and ran == ["well"]


def test_the_time_on_a_gpu_is_that_between_two_events(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 250.0  # milliseconds

    class Filler:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing, "_filler", lambda device: Filler())
    assert timing._seconds(lambda: log.append("step"), CUDA) == pytest.approx(0.25)
    assert log == ["flush", "record", "step", "record", "wait"]
