import pytest
import torch

from lcpt.attention import AttentionConfig
from lcpt.benchmarking import attention_benchmark, peaks
from lcpt.benchmarking.attention_layer import Layer
from lcpt.benchmarking.attention_methods import methods
from lcpt.benchmarking.kernel_work import Size, block_causal_cost
from lcpt.benchmarking.roofline import softmax_cost

LAYER = Layer(batch=3, heads=2, head_dim=16, dtype=torch.float32, device=torch.device("cpu"))
CONFIG = AttentionConfig(block_size=16)


def in_turn(steps, repeats, device, budget=None, progress=None):
    """Every pass takes two milliseconds."""
    figure = {
        "milliseconds": {"p10": 1.0, "p50": 2.0, "p90": 3.0},
        "repeats": repeats,
        "peak_memory_bytes": 5,
        "memory_before_bytes": 3,
    }
    return dict.fromkeys(steps, figure)


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_percents_of_peak_follow_from_the_counts(monkeypatch, mode):
    monkeypatch.setattr(attention_benchmark, "time_in_turn", in_turn)
    found, left_out = methods(["polysketch", "squared", "fastmax", "sdpa_cpu"], CONFIG, LAYER)
    backends = {"polysketch": "triton", "squared": "triton", "fastmax": "triton", "sdpa_cpu": "torch"}
    measured = {"flops_per_second": 1e12, "bytes_per_second": 1e11}
    rows, failed = attention_benchmark.measure(found, backends, LAYER, 64, mode, repeats=2, budget=9.0, peaks=measured)
    assert left_out == failed == {}
    shares = {row["method"]: row["percent_of_peak"] for row in rows}
    size = Size(tokens=64, head_dim=16, features=32, block_size=16, local_blocks=1, dtype=torch.float32)
    flops, n_bytes = block_causal_cost(2, size, mode)
    assert shares["squared"] == pytest.approx(
        {"flops": 100 * 3 * flops / 2e-3 / 1e12, "bytes": 100 * 3 * n_bytes / 2e-3 / 1e11}
    )
    flops, n_bytes = softmax_cost(2, 16, 64, mode)
    assert shares["sdpa_cpu"] == pytest.approx(
        {"flops": 100 * 3 * flops / 2e-3 / 1e12, "bytes": 100 * 3 * n_bytes / 2e-3 / 1e11}
    )
    sketches = 2 * 2 * 64 * 2 * 16 * 31  # of q and k of two heads, of 64 tokens: 16 -> 31 and a constant
    more = (3 if mode == "forward_backward" else 1) * 100 * 3 * sketches / 2e-3 / 1e12
    assert shares["polysketch"]["flops"] - shares["squared"]["flops"] == pytest.approx(more)
    assert shares["fastmax"] is None  # nobody has counted it
    assert {row["backend"] for row in rows if row["method"] != "sdpa_cpu"} == {"triton"}


def test_what_runs_in_pytorch_has_no_share_of_the_kernels_count(monkeypatch):
    monkeypatch.setattr(attention_benchmark, "time_in_turn", in_turn)
    found, _ = methods(["polysketch", "squared"], CONFIG, LAYER)
    measured = {"flops_per_second": 1e12, "bytes_per_second": 1e11}
    backends = dict.fromkeys(found, "torch")
    rows, _ = attention_benchmark.measure(found, backends, LAYER, 64, "forward", repeats=2, budget=9.0, peaks=measured)
    assert [row["percent_of_peak"] for row in rows] == [None, None]


def test_peaks_are_flops_and_bytes_over_the_measured_time(monkeypatch):
    ran = []

    def run(steps, repeats, device):
        ran.extend(step() for step in steps.values())
        return in_turn(steps, repeats, device)

    monkeypatch.setattr(peaks, "time_in_turn", run)
    found = peaks.measured_peaks(torch.device("cpu"), side=32, copied=1000)
    assert found == pytest.approx({"flops_per_second": 2 * 32**3 / 2e-3, "bytes_per_second": 2 * 1000 / 2e-3})
    assert ran[0].dtype == torch.bfloat16 and ran[0].shape == (32, 32) and ran[1].numel() == 1000
