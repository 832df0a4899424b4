"""Peaks of attention layers by PyTorch's account, of the kernels' path too."""

import json
from pathlib import Path

import pytest
import torch
from lcpt_kernels import dispatch, squared_attention

from lcpt.benchmarking.allocated_bytes import kernels_left_out, most_allocated_bytes

COMMITTED = Path(__file__).parents[2] / "benchmarks/results/attention-memory.json"
STATE = 640 * 64 * 2 / 256  # bytes of a token and head: features, Dv, bf16, tokens of a block


def test_the_peak_is_counted():
    def step():
        x = torch.ones(10, 4)  # 160 bytes
        y = x.neg()
        del x
        return y.sum()

    assert most_allocated_bytes(step) == 320


def test_what_the_kernels_need_is_counted_on_a_cpu():
    """Beyond o, which is there before, the peak of the backward pass has dq, da, dv, db and the state's gradient."""
    T, H, D, r = 4096, 2, 64, 32
    q, k, v = (torch.zeros(1, T, H, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    a, b = (torch.zeros(1, T, H, r, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with kernels_left_out():
        o, _ = squared_attention(a, b, v, q=q, k=k, degree=4, scale=1 / r, shift=1.0)
        do = torch.zeros_like(o)
        peak = most_allocated_bytes(lambda: torch.autograd.grad(o, [q, k, v, a, b], do))
    assert dispatch.device_obstacle(q) == "tensors are on cpu"
    a_token_and_head = 2 * (D + r + D + r) + STATE
    assert a_token_and_head < peak / (T * H) < a_token_and_head + 32  # sums of rows, and the denominator's state


def test_rows_and_the_committed_figures(call_program, tmp_path):
    code, said, _ = call_program(
        "benchmarks/attention_memory.py", "--contexts", 2048, "--heads", 4, "--output", tmp_path / "out.json"
    )
    rows = {row["kind"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert code == 0 and len(said.splitlines()) == 2 + len(rows)
    assert rows["softmax"]["times_softmax"] == rows["softmax"]["times_flash_2"] == 1
    committed = json.loads(COMMITTED.read_text())["rows"]
    assert {row["context"] for row in committed} == {8192, 32768}
    for row in committed:
        assert row["times_flash_2"] == pytest.approx(rows[row["kind"]]["times_flash_2"], rel=0.15), row["kind"]
    assert max(row["times_flash_2"] for row in committed if row["kind"] == "polysketch") <= 1.2


def test_bad_input_is_one_line(call_program, tmp_path):
    for arguments in (["--heads", 0, "--output", tmp_path / "out.json"], ["--output", "/proc/none/out.json"]):
        code, _, err = call_program("benchmarks/attention_memory.py", *arguments)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
