import json
from functools import partial

import pytest
import torch
from lcpt_kernels import squared_attention

from lcpt.attention import ATTENTION
from lcpt.benchmarking import attention_benchmark
from lcpt.benchmarking.attention_baselines import BASELINES, Unavailable, heads_first, softmax
from lcpt.benchmarking.attention_layer import Method

SMALL = [
    "--heads",
    2,
    "--head-dim",
    16,
    "--repeats",
    2,
    "--set",
    "block_size=16",
    "polysketch.size=8",
    "flurka.summaries.number=2",
    "lowrank.summaries.number=2",
]
KEYS = {
    "method",
    "settings",
    "context",
    "batch",
    "heads",
    "head_dim",
    "dtype",
    "device",
    "backend",
    "mode",
    "milliseconds",
    "repeats",
    "peak_memory_bytes",
    "percent_of_peak",
    "speedup",
}


@pytest.fixture
def benchmark(call_tool, tmp_path):
    """benchmark(*arguments) -> (exit code, report or None, stdout, stderr)."""

    def call(*arguments):
        output = tmp_path / "attention.json"
        code, out, err = call_tool(
            "benchmark_attention",
            "--methods",
            "polysketch,squared",
            "--contexts",
            "96",
            "--output",
            output,
            *SMALL,
            *arguments,
        )
        return code, json.loads(output.read_text()) if output.exists() else None, out, err

    return call


def test_rows_hold_what_the_contract_names(benchmark):
    code, report, out, err = benchmark("--contexts", "40,96", "--batch", 2)
    assert code == 0, err
    assert report["schema_version"] == 1
    assert {"date", "git_commit", "device", "versions", "command", "rows"} <= report.keys()
    assert report["left_out"] == [] and report["measured_peaks"] is None
    assert [(row["context"], row["mode"], row["method"]) for row in report["rows"]] == [
        (context, mode, method)
        for context in (40, 96)
        for mode in ("forward", "forward_backward")
        for method in ("polysketch", "squared", "sdpa_cpu")
    ]
    for row in report["rows"]:
        assert row.keys() == KEYS
        assert (row["batch"], row["heads"], row["head_dim"], row["dtype"], row["device"]) == (2, 2, 16, "fp32", "cpu")
        assert 0 < row["milliseconds"]["p10"] <= row["milliseconds"]["p50"] <= row["milliseconds"]["p90"]
        assert row["repeats"] == 2 and row["backend"] == "torch"
    polysketch, squared, baseline = report["rows"][:3]
    assert polysketch["settings"]["size"] == squared["settings"]["size"] == 8
    assert polysketch["settings"]["block_size"] == squared["settings"]["block_size"] == 16
    assert polysketch["speedup"] == {"sdpa_cpu": baseline["milliseconds"]["p50"] / polysketch["milliseconds"]["p50"]}
    assert baseline["speedup"] == {} and "fwd + bwd" in out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_kind_is_right_and_timed(benchmark, dtype):
    names = [*ATTENTION, "squared", "sdpa_cpu"]
    code, report, _, err = benchmark(
        "--methods", ",".join(names), "--mode", "forward_backward", "--dtype", dtype, "--repeats", 1
    )
    assert code == 0, err
    assert [row["method"] for row in report["rows"]] == names
    assert {row["dtype"] for row in report["rows"]} == {dtype}


def test_a_slow_method_is_timed_once(benchmark):
    _, report, _, _ = benchmark("--budget", 0, "--mode", "forward")
    assert [row["repeats"] for row in report["rows"]] == [1, 1, 1]


def test_memory_is_what_a_pass_adds(benchmark):
    """SDPA makes little but its output; inputs, three times as large, do not count."""
    _, report, _, _ = benchmark(
        "--methods",
        "sdpa_cpu",
        "--contexts",
        "1024",
        "--head-dim",
        64,
        "--repeats",
        1,
        "--heads",
        16,
        "--batch",
        8,
        "--mode",
        "forward",
    )
    output = 4 * 8 * 16 * 64 * 1024
    assert output < report["rows"][0]["peak_memory_bytes"] < 1.5 * output


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--methods", "polysketch,softmux"], "softmux; there are softmax, polynomial"),
        (["--contexts", "1024,many"], "--contexts 1024,many"),
        (["--contexts", "0"], "--contexts 0"),
        (["--mode", "backward"], "--mode backward"),
        (["--heads", 0], "--heads is 0"),
        (["--head-dim", 7], "--head-dim 7"),
        (["--set", "polysketch.sice=3"], "sice"),
        (["--set", "polysketch.size=0"], "polysketch.size is 0"),
        (["--output", "/proc/none/out.json"], "/proc/none"),
    ],
)
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
@pytest.mark.parametrize(
    "name, other, where",
    [
        ("polysketch", "squared", "lcpt.attention.polysketch"),
        ("squared", "polysketch", "lcpt.benchmarking.attention_methods"),
    ],
)
def test_a_wrong_kernel_is_named_and_left_out(benchmark, monkeypatch, name, other, where, wrong):
    monkeypatch.setattr(f"{where}.squared_attention", wrong)
    code, report, _, err = benchmark("--mode", "forward")
    assert code == 1 and err.startswith(f"left out: {name}: {name} is wrong at 65 tokens") and err.count("\n") == 1
    assert [row["method"] for row in report["rows"]] == [other, "sdpa_cpu"]
    assert [reason["method"] for reason in report["left_out"]] == [name]


def missing(layer):
    raise Unavailable("a library is not installed")


def refusing(layer):
    def attend(q, k, v):
        raise RuntimeError("No available kernel.\nAborting execution.")

    return sdpa_like(attend)


def sdpa_like(attend):
    return Method(settings={}, inputs=heads_first, attend=attend, definition=partial(softmax, window=None))


@pytest.mark.parametrize(
    "rival, reason",
    [
        (missing, "a library is not installed"),
        (refusing, "RuntimeError: No available kernel."),
        (lambda layer: sdpa_like(lambda q, k, v: v.transpose(1, 2)), "rival is wrong at 65 tokens"),
        (lambda layer: sdpa_like(lambda q, k, v: softmax(q, k, v, None) * torch.nan), "rival is wrong at 65 tokens"),
    ],
)
def test_a_baseline_that_cannot_be_is_left_out_in_a_line(benchmark, monkeypatch, rival, reason):
    monkeypatch.setitem(BASELINES["cpu"], "rival", rival)
    code, report, _, err = benchmark("--mode", "forward")
    assert code == 0 and err.startswith(f"left out: rival: {reason}") and err.count("\n") == 1
    assert [row["method"] for row in report["rows"]] == ["polysketch", "squared", "sdpa_cpu"]
    assert report["left_out"][0]["method"] == "rival" and report["left_out"][0]["reason"].startswith(reason)


def test_what_a_gpu_cannot_run_is_left_out_there(benchmark, monkeypatch):
    def failing(steps, device):
        return {"squared": "OutOfMemoryError: too large"} if "squared" in steps else {}

    monkeypatch.setattr("lcpt.benchmarking.attention_benchmark.first_passes", failing)
    code, report, _, err = benchmark("--mode", "forward")
    assert code == 1 and err == "left out: squared: OutOfMemoryError: too large\n"
    assert [row["method"] for row in report["rows"]] == ["polysketch", "sdpa_cpu"]
    reason = {"method": "squared", "reason": "OutOfMemoryError: too large", "context": 96, "mode": "forward"}
    assert report["left_out"] == [reason]


def test_tokens_are_constant_over_contexts(benchmark):
    _, report, _, _ = benchmark("--contexts", "32,64,256", "--tokens", 128, "--mode", "forward")
    assert [row["batch"] for row in report["rows"][::3]] == [4, 2, 1]


def test_rows_are_written_as_they_come(benchmark, monkeypatch, tmp_path):
    """All contexts in the first mode, then in the next; the third is cut off."""
    measured, real = [], attention_benchmark.measure

    def measure(methods, backends, layer, context, mode, **options):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append((mode, context))
        return real(methods, backends, layer, context, mode, **options)

    monkeypatch.setattr("lcpt.commands.benchmark_attention.measure", measure)
    benchmark("--methods", "squared,sdpa_cpu", "--contexts", "64,32", "--mode", "forward_backward,forward")
    assert measured == [("forward_backward", 64), ("forward_backward", 32)]
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert [(row["context"], row["method"]) for row in rows] == [
        (context, method) for context in (64, 32) for method in ("squared", "sdpa_cpu")
    ]
    assert len((tmp_path / "attention.md").read_text().splitlines()) == 2 + 4
    assert not (tmp_path / "attention.png").exists()


def test_a_table_and_a_picture_stand_beside_it(benchmark, tmp_path):
    code, _, out, _ = benchmark("--contexts", "32,64")
    lines = (tmp_path / "attention.md").read_text().splitlines()
    assert code == 0 and len(lines) == 2 + 2 * 2 * 3
    above, *shown = out.splitlines()
    assert above.startswith("batch 1, backend ") and [line[0] for line in shown[: len(lines)]] == ["|"] * len(lines)
    assert max(map(len, shown)) <= 120
    assert "x fastest softmax" in lines[0] and "% of bandwidth" not in lines[0]
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
