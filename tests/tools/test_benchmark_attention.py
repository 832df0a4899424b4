import json

import pytest
import torch
import torch.nn.functional as F
from lcpt_kernels import squared_attention

from lcpt.attention import ATTENTION, AttentionConfig
from lcpt.evaluation.attention_benchmark import WrongResult, check
from lcpt.evaluation.attention_methods import BASELINES, Layer, methods

SMALL = ["--heads", 2, "--head-dim", 16, "--repeats", 2, "--set", "block_size=16", "polysketch.size=8",
         "flurka.summaries.number=2", "lowrank.summaries.number=2"]
KEYS = {"method", "settings", "context", "batch", "heads", "head_dim", "dtype", "device", "backend", "mode",
        "milliseconds", "repeats", "peak_memory_bytes", "speedup"}


@pytest.fixture
def benchmark(call_tool, tmp_path):
    """benchmark(*arguments) -> (exit code, report or None, stdout, stderr)."""

    def call(*arguments):
        output = tmp_path / "attention.json"
        code, out, err = call_tool("benchmark_attention", "--methods", "polysketch,squared", "--contexts", "96",
                                   "--output", output, *SMALL, *arguments)
        return code, json.loads(output.read_text()) if output.exists() else None, out, err

    return call


def test_rows_hold_what_the_contract_names(benchmark):
    code, report, out, err = benchmark("--contexts", "40,96", "--batch", 2)
    assert code == 0, err
    assert report["schema_version"] == 1
    assert {"date", "git_commit", "device", "versions", "command", "rows"} <= report.keys()
    assert [(row["context"], row["mode"], row["method"]) for row in report["rows"]] == [
        (context, mode, method) for context in (40, 96) for mode in ("forward", "forward_backward")
        for method in ("polysketch", "squared", "sdpa_cpu")]
    for row in report["rows"]:
        assert row.keys() == KEYS
        assert (row["batch"], row["heads"], row["head_dim"], row["dtype"], row["device"]) == (2, 2, 16, "fp32", "cpu")
        assert 0 < row["milliseconds"]["p10"] <= row["milliseconds"]["p50"] <= row["milliseconds"]["p90"]
        assert row["repeats"] == 2
    polysketch, squared, baseline = report["rows"][:3]
    assert polysketch["settings"]["size"] == squared["settings"]["size"] == 8
    assert polysketch["settings"]["block_size"] == squared["settings"]["block_size"] == 16
    assert polysketch["speedup"] == {
        "sdpa_cpu": baseline["milliseconds"]["p50"] / polysketch["milliseconds"]["p50"]}
    assert baseline["speedup"] == {} and "forward_backward" in out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_kind_is_right_and_timed(benchmark, dtype):
    names = [*ATTENTION, "squared", "sdpa_cpu"]
    code, report, _, err = benchmark("--methods", ",".join(names), "--mode", "forward_backward", "--dtype", dtype,
                                     "--repeats", 1)
    assert code == 0, err
    assert [row["method"] for row in report["rows"]] == names
    assert {row["dtype"] for row in report["rows"]} == {dtype}


def test_a_slow_method_is_timed_once(benchmark):
    _, report, _, _ = benchmark("--budget", 0, "--mode", "forward")
    assert [row["repeats"] for row in report["rows"]] == [1, 1, 1]


def test_memory_is_what_a_pass_adds(benchmark):
    """SDPA makes little but its output; inputs, three times as large, do not count."""
    _, report, _, _ = benchmark("--methods", "sdpa_cpu", "--contexts", "1024", "--head-dim", 64, "--repeats", 1,
                                "--heads", 16, "--batch", 8, "--mode", "forward")
    output = 4 * 8 * 16 * 64 * 1024
    assert output < report["rows"][0]["peak_memory_bytes"] < 1.5 * output


@pytest.mark.parametrize("arguments, part", [
    (["--methods", "polysketch,softmux"], "softmux; there are softmax, polynomial"),
    (["--contexts", "1024,many"], "--contexts 1024,many"), (["--contexts", "0"], "--contexts 0"),
    (["--mode", "backward"], "--mode backward"), (["--heads", 0], "--heads 0"), (["--head-dim", 7], "--head-dim 7"),
    (["--set", "polysketch.sice=3"], "sice"), (["--set", "polysketch.size=0"], "polysketch.size is 0"),
    (["--output", "/proc/none/out.json"], "/proc/none"),
])
def test_bad_input_is_one_line(benchmark, arguments, part):
    code, report, out, err = benchmark(*arguments)
    assert (code, report, out) == (2, None, "") and err.startswith("error: ") and part in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu_is_one_line(benchmark):
    code, _, _, err = benchmark("--device", "cuda")
    assert code == 2 and "finds no GPU" in err and err.count("\n") == 1


def wrong_output(*args, backend="auto", **kwargs):
    o, state = squared_attention(*args, backend=backend, **kwargs)
    return o if backend == "reference" else o * (1 + 1e-4), state


def wrong_gradient(a, b, *args, backend="auto", **kwargs):
    return squared_attention(a, b if backend == "reference" else b.detach(), *args, backend=backend, **kwargs)


@pytest.mark.parametrize("wrong", [wrong_output, wrong_gradient])
@pytest.mark.parametrize("name, where", [
    ("polysketch", "lcpt.attention.polysketch"), ("squared", "lcpt.evaluation.attention_methods"),
])
def test_a_wrong_kernel_is_refused(benchmark, monkeypatch, name, where, wrong):
    monkeypatch.setattr(f"{where}.squared_attention", wrong)
    code, report, out, err = benchmark()
    assert (code, report, out) == (2, None, "") and err.startswith(f"error: {name} is wrong") and err.count("\n") == 1


@pytest.mark.parametrize("wrong", [
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v),  # sees the future
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True) * torch.nan,
])
def test_a_wrong_baseline_is_refused(monkeypatch, wrong):
    monkeypatch.setitem(BASELINES["cpu"], "sdpa_cpu", wrong)
    layer = Layer(1, 2, 16, torch.float32, torch.device("cpu"))
    with pytest.raises(WrongResult, match="sdpa_cpu is wrong at 50 tokens"):
        check("sdpa_cpu", methods(["sdpa_cpu"], AttentionConfig(), layer)["sdpa_cpu"], layer, 50)
