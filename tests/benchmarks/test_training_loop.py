"""benchmarks/training_loop.py on a CPU, and the sums of a trace."""

import gzip
import json

from lcpt.benchmarking.trace import device_seconds, part_of


def test_a_row_of_each_variant(call_program, tiny_yaml, tmp_path):
    arguments = ["--config", tiny_yaml, "--steps", 4, "--micro-batches", 2, "--output", tmp_path / "loop.json"]
    arguments += ["--variants", "zero1,zero3-compiled"]
    code, said, errors = call_program("benchmarks/training_loop.py", *arguments)
    assert code == 0, errors
    report = json.loads((tmp_path / "loop.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["tiny zero1", "tiny zero3-compiled"]
    for row in report["rows"]:
        assert row["tokens_per_second"] > 0 and row["mfu"] is None and row["steps"] == 1
        assert row["forward_seconds"] + row["backward_seconds"] <= row["step_seconds"]
        assert row["method"] in said


def test_a_variant_that_fails_is_named(call_program, tiny_yaml, tmp_path):
    arguments = ["--config", tiny_yaml, "--steps", 4, "--limit", 0.1, "--output", tmp_path / "loop.json"]
    code, _, errors = call_program("benchmarks/training_loop.py", *arguments)
    assert code == 1 and "failed: zero3-compiled: not done in 0.1 s" in errors


def test_device_time_by_part(tmp_path):
    events = [
        {"cat": "kernel", "name": "block_output_kernel", "dur": 3e6},
        {"cat": "kernel", "name": "nvjet_tst_128x256", "dur": 5e6},
        {"cat": "kernel", "name": "sm90_xmma_gemm_bf16", "dur": 1e6},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "dur": 2e6},
        {"cat": "cpu_op", "name": "aten::mm", "dur": 7e6},
        {"name": "no category"},
    ]
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = device_seconds(tmp_path / "trace.json.gz")
    assert found == {"matrix products": 6.0, "attention": 3.0, "copies": 2.0}
    assert part_of("ncclDevKernel_AllReduce") == "communication" and part_of("vectorized_add") != "copies"
