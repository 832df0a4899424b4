"""The memory of ranks that share a sequence, in small."""

import gc
import json

import pytest
import torch

from lcpt.benchmarking.live_bytes import LiveBytes


def test_two_ranks_of_a_linear_kind(call_program, tmp_path):
    code, said, _ = call_program(
        "benchmarks/sequence_memory.py", "--slices", "1x1024", "2x1024", "--output", tmp_path / "out.json"
    )
    assert code == 0 and len(said.splitlines()) == 5
    report = json.loads((tmp_path / "out.json").read_text())
    assert {"schema_version", "git_commit", "device", "versions", "command"} <= report.keys()
    rows = {(row["ranks"], row["activation_checkpointing"]): row for row in report["rows"]}
    assert list(rows) == [(1, True), (1, "offload"), (2, True), (2, "offload")]
    for (ranks, policy), row in rows.items():
        assert row["context"] == ranks * 1024 and len(row["peak_bytes_of_ranks"]) == ranks
        assert row["host_bytes"] == row["estimated_host_bytes"] == (4 * 4 * 128 * 1024 if policy == "offload" else 0)
        assert row["peak_bytes"] == pytest.approx(row["estimated_bytes"], rel=0.1)


def test_live_bytes_are_counted_a_storage_at_a_time():
    gc.collect()
    with LiveBytes() as live:
        x = torch.ones(10, 4)
        assert live.now == 160
        y = x.t()[1:]  # a view
        assert live.now == 160
        z = y * 2
        assert live.now == live.peak == 160 + 120
        x.add_(1)
        del x
        assert live.now == 280
        del y
        assert live.now == 120
        z = z + 1
        assert (live.now, live.peak, live.host_peak) == (120, 280, 0)
