import json

import pytest
import torch

from lcpt.benchmarking import traffic
from lcpt.benchmarking.attention_layer import Layer
from lcpt.benchmarking.fused_steps import Step, WrongResult, check, outputs_and_gradients, steps


@pytest.fixture
def fused(call_program):
    return lambda *arguments: call_program("benchmarks/fused.py", *arguments)


def test_bytes_are_counted_without_a_gpu(fused, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = fused("--tokens", 8192, "--heads", 2, "--output", tmp_path / "out.json")
    assert code == 0 and "no GPU is here to take times" in out
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["wrong"] == {} and all(row["milliseconds"] is None for row in report["rows"])
    rows = {(row["method"], row["mode"], row["backend"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 4 * len({row["method"] for row in report["rows"]}) >= 4 * 10
    tensor = 2 * 8192 * 2 * 64  # bytes of x
    chunked, every = (rows[name, "forward", "torch"] for name in ("cross_entropy", "cross_entropy, all logits"))
    assert chunked["operators"] > every["operators"] and rows["cross_entropy", "forward", "triton"]["batch"] == 1
    for (name, mode, backend), row in rows.items():
        assert row["bytes"] >= 1.4 * tensor, (name, mode, backend)
        if backend == "triton":
            assert row["bytes"] < rows[name, mode, "torch"]["bytes"], (name, mode)
            assert row["operators"] <= (11 if name.startswith("cross_entropy") else 5), (name, mode)
    assert rows["elu1", "forward", "triton"]["bytes"] == 2 * tensor
    assert rows["elu1", "forward", "torch"]["bytes"] == 4 * tensor
    plain, shifted = (rows[name, "forward", "triton"]["bytes"] for name in ("norm_rotary", "norm_rotary, key shift"))
    assert shifted == plain + 2 * 2 * 64  # of the key shift itself


def test_bad_input_is_one_line(fused, tmp_path):
    for arguments in (["--tokens", 5000], ["--heads", 0], ["--head-dim", 7], ["--only", "nothing"]):
        code, _, err = fused(*arguments, "--output", tmp_path / "out.json")
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    code, _, err = fused("--output", "/proc/none/out.json")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_rows_are_written_as_they_come(fused, tmp_path, monkeypatch):
    """The second step is cut off."""
    counted, real = [], traffic.traffic

    def count(*args):
        if len(counted) == 2:  # both backends of the first
            raise KeyboardInterrupt
        counted.append(args)
        return real(*args)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(traffic, "traffic", count)
    with pytest.raises(KeyboardInterrupt):
        fused("--tokens", 8192, "--heads", 1, "--output", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["mode"], row["backend"]) for row in rows] == [
        (mode, backend) for mode in ("forward", "forward_backward") for backend in ("torch", "triton")
    ]


def small_steps(dtype=torch.float32):
    return steps(
        Layer(batch=2, heads=2, head_dim=16, dtype=dtype, device=torch.device("cpu")),
        40,
        block_size=16,
        summaries=4,
        sketch=8,
        vocabulary=300,
    )


def test_every_step_runs_and_gives_a_gradient_to_all_that_learns():
    for name, step in small_steps().items():
        found = outputs_and_gradients(step.function, step.inputs, backend="torch")
        assert all(x.isfinite().all() for x in found), name
        assert all(x.norm() > 0 for x in found), name


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda y, backend: y * (1.1 if backend == "triton" else 1.0), "rounding explains"),
        (lambda y, backend: y * torch.rand(()) if backend == "triton" else y, "other bits"),
        (lambda y, backend: y + (torch.nan if backend == "triton" else 0.0), "other bits"),
    ],
)
def test_a_wrong_kernel_is_found(change, part):
    x = torch.randn(1, 9, 2, 4, requires_grad=True)
    with pytest.raises(WrongResult, match=part):
        check(Step(lambda x, backend: (change(x.sin(), backend),), [x]))
    check(Step(lambda x, backend: (x.sin(),), [x]))
