"""benchmarks/gpu.sh without a GPU: with the real Python, and with a stand-in that says there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lcpt.attention import ATTENTION
from lcpt.attention.base import LinearCost
from lcpt.evaluation.attention_baselines import BASELINES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu.sh"

# What the script asks Python for is `-`, a program on its standard input, and FILE ARGUMENTS.
PYTHON = """#!/bin/bash
if [ "$1" = - ]; then echo "a warning"; echo "nvidia-test-1 sm_90"; exit; fi
echo "$@" >>"$CALLS"
case $1 in
    *$FAILS*) exit 3 ;;
    *$HANGS*) exit 124 ;;  # as `timeout` does
esac
"""


@pytest.fixture
def gpu(tmp_path):
    """gpu(**environment) -> (exit code, stdout, stderr, calls of Python) with a stand-in for Python."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def call(**environment):
        given = {"PYTHON": str(python), "CALLS": str(calls), "OUT": str(tmp_path / "out"), "FAILS": "none",
                 "HANGS": "none"}
        done = subprocess.run([SCRIPT], env=os.environ | given | environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr, calls.read_text().splitlines() if calls.exists() else []

    return call


def test_it_is_bash():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True).returncode == 0


def test_no_gpu_is_one_line(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: PyTorch finds no GPU here\n")
    assert done.stdout == "" and not (tmp_path / "out").exists()


def test_every_stage_runs_and_writes_under_the_gpus_name(gpu, tmp_path):
    code, out, err, calls = gpu()
    assert (code, err) == (0, "")
    for call, (tool, stage) in zip(calls, [
        ("tools/kernel_report.py", "kernels"), ("benchmarks/check_kernels.py", "correct"),
        ("benchmarks/fused.py", "fused"),
        ("tools/benchmark_attention.py", "attention"), ("tools/benchmark_attention.py", "rivals"),
        ("tools/benchmark_training.py", "training"),
        *[("tools/benchmark_attention.py", stage) for stage in ("families", "sparse-8", "sparse-16", "sparse-32")],
    ], strict=True):
        assert call.startswith(tool) and f"--output {tmp_path}/out/{stage}-nvidia-test-1.json" in call
        assert f"{stage}-nvidia-test-1.json" in out
    assert "--targets sm_90" in calls[0]


def test_stages_that_fail_or_hang_are_named_and_the_others_run(gpu):
    code, _, err, calls = gpu(FAILS="kernel_report", HANGS="check_kernels")
    assert code == 1 and len(calls) == 10
    assert err == "error: failed: kernels (exit code 3), correct (not done in 95 s)\n"


def test_every_baseline_is_in_one_of_the_stages(gpu):
    methods = [call.split("--methods ")[1].split()[0] for call in gpu()[3] if "--methods" in call]
    named = {name for names in methods for name in names.split(",")}
    linear = {kind for kind, of_kind in ATTENTION.items() if issubclass(of_kind, LinearCost)}
    assert named >= {"squared", "lowrank", "sparse_qk", "sparse_hash", *linear, *BASELINES["cuda"]}


def test_some_stages(gpu):
    (call,) = gpu(STAGES="attention")[3]
    assert call.startswith("tools/benchmark_attention.py") and "/attention-" in call
    code, _, err, _ = gpu(STAGES="attention speed")
    assert (code, err) == (2, "error: no stage is called speed\n")


def test_wheels_that_are_not_there(gpu, tmp_path):
    code, _, err, _ = gpu(WHEELS=str(tmp_path))
    assert (code, err) == (2, f"error: there are no wheels in {tmp_path}\n")


def test_the_tools_understand_what_the_stages_ask_for(gpu, call_program, monkeypatch):
    """The first finds no GPU; the second reads every config before it meets a name that is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (training,), attention = ([call for call in gpu()[3] if tool in call] for tool in ("_training", "_attention"))
    for call in attention:
        assert call_program(*call.split()) == (2, "", "error: --device cuda: PyTorch finds no GPU here; take cpu\n")
    code, _, err = call_program(*training.replace("flash,cudnn", "none").split())
    assert (code, err) == (2, "error: --sdpa none is none of flash, cudnn, efficient\n")
