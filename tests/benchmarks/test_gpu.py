"""benchmarks/gpu.sh without a GPU: with the real Python, and with a stand-in that says there is one."""

import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from lcpt.attention import ATTENTION
from lcpt.attention.base import LinearCost
from lcpt.benchmarking.attention_baselines import BASELINES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu.sh"
QUICK = ["warm", "kernels", "correct", "attention"]
FULL = ["warm", "training", "rivals", "families", "sparse-16", "sparse-8", "sparse-32", "sparse-flex", "fused"]
LOOP = ["warm", "loop-8k", "loop-32k"]
NAME = "gpu-{}-nvidia-test-1"

# Files are written as the tools write them; $SAYS is what the look for imports says, beside the GPU's name.
PYTHON = """#!/bin/bash
echo "$@" >>"$CALLS"
case "$*" in
    benchmarks/gpu_imports.py*) echo "a warning"; echo "gpu nvidia-test-1 sm_90"; echo -e "$SAYS"; exit ;;
esac
echo "this is $1"
while [ $# != 0 ]; do
    [ "$1" != --output ] || echo "rows" >"$2"
    all="$all $1"; shift
done
case $all in
    *$FAILS*) exit 3 ;;
    *$HANGS*) exec sleep 4 ;;
esac
"""
TIMEOUT = """#!/bin/bash
echo "$1 $2" >>"$LIMITS"  # --kill-after=2 SECONDS
shift
case "$*" in *$TOO_LONG*) exit 124 ;; esac
shift
exec "$@"
"""


@pytest.fixture
def environment(tmp_path):
    """Build the environment of a machine with stand-ins for Python, and for timeout if its folder is first in PATH."""
    for name, text in (("python", PYTHON), ("bin/timeout", TIMEOUT)):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    return os.environ | {
        "PYTHON": str(tmp_path / "python"),
        "CALLS": str(tmp_path / "calls"),
        "LIMITS": str(tmp_path / "limits"),
        "RESULTS": str(tmp_path / "results"),
        "OUT": str(tmp_path / "out"),
        "FAILS": "none",
        "HANGS": "none",
        "TOO_LONG": "none",
        "SAYS": "",
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
    }


@pytest.fixture
def gpu(environment, tmp_path):
    """gpu(*arguments, **environment) -> (exit code, stdout, stderr, calls of stages)."""

    def call(*arguments, **changed):
        (tmp_path / "calls").unlink(missing_ok=True)
        done = subprocess.run([SCRIPT, *arguments], env=environment | changed, capture_output=True, text=True)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done.returncode, done.stdout, done.stderr, [call for call in calls if "gpu_imports" not in call]

    return call


def archived(tmp_path, run):
    """name of a file -> its text, of the archive."""
    (file,) = [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]
    assert file.name == f"{NAME.format(run)}.tar.gz"
    with tarfile.open(file) as archive:
        return {
            member.name.removeprefix(f"{NAME.format(run)}/"): archive.extractfile(member).read().decode()
            for member in archive
            if member.isfile()
        }


def test_the_script_parses_as_bash():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True).returncode == 0


def test_no_gpu_is_one_line(environment, tmp_path):
    changed = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "TOO_LONG": "none"}
    done = subprocess.run([SCRIPT, "quick"], env=environment | changed, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: PyTorch finds no GPU here\n")
    assert not (tmp_path / "out").exists() and not (tmp_path / "results").exists()


@pytest.mark.parametrize("arguments", [[], ["fast"], ["quick", "full"], ["--help"]])
def test_usage_is_one_line(gpu, arguments):
    assert gpu(*arguments) == (2, "", "usage: benchmarks/gpu.sh quick | full | loop\n", [])


@pytest.mark.parametrize("run, stages, most", [("quick", QUICK, 210), ("full", FULL, 400), ("loop", LOOP, 290)])
def test_every_stage_runs_within_the_time_that_is_stated(gpu, tmp_path, run, stages, most):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/some.whl").touch()
    code, out, err, calls = gpu(run, WHEELS=str(tmp_path / "wheels"))
    assert (code, err) == (0, "")
    assert calls.pop(0).startswith("-m pip install") and len(calls) == len(stages)
    assert re.findall(r"^== (\S+)", out, re.MULTILINE) == stages
    for call, stage in zip(calls[1:], stages[1:], strict=True):
        assert f"--output {tmp_path}/results/{NAME.format(run)}/{stage}.json" in call
    assert "--target sm_90" in calls[0] and f"{tmp_path}/out/{NAME.format(run)}.tar.gz" in out
    limits = re.findall(r"--kill-after=(\d+) (\d+)", (tmp_path / "limits").read_text())
    assert len(limits) == 2 + len(stages)
    assert sum(int(after) + int(limit) for after, limit in limits) <= most
    files = archived(tmp_path, run)
    assert files.keys() == {f"{stage}.log" for stage in stages} | {f"{stage}.json" for stage in stages[1:]} | {
        "stages.txt"
    }
    assert files[f"{stages[1]}.json"] == "rows\n" and files["stages.txt"].count(": done in ") == len(stages)


def test_stages_that_fail_or_hang_are_named_and_the_others_run(gpu, tmp_path):
    code, _, err, calls = gpu("quick", FAILS="kernel_report", TOO_LONG="check_kernels")
    assert code == 1 and len(calls) == 3  # and what is like `timeout` ended the fourth
    assert err.startswith("error: failed: kernels (exit code 3), correct (not done in 50 s); ")
    files = archived(tmp_path, "quick")
    assert files["kernels.json"] == files["attention.json"] == "rows\n"
    assert "failed: correct (not done in 50 s)" in files["stages.txt"]


def test_the_files_of_an_earlier_run_do_not_stand_in(gpu, tmp_path):
    gpu("quick")
    assert gpu("quick", TOO_LONG="check_kernels")[0] == 1
    assert "correct.json" not in archived(tmp_path, "quick")


@pytest.mark.parametrize("how, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_a_run_that_is_killed_leaves_what_it_had(environment, tmp_path, how, code):
    """The third stage has written, and not ended."""
    running = subprocess.Popen(
        [SCRIPT, "quick"],
        env=environment | {"HANGS": "check_kernels"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    archive = tmp_path / "out" / f"{NAME.format('quick')}.tar.gz"
    end = time.monotonic() + 30
    while not (archive.exists() and "correct.json" in archived(tmp_path, "quick")):
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    running.send_signal(how)
    assert running.wait(timeout=10) == code
    files = archived(tmp_path, "quick")
    assert files["kernels.json"] == files["correct.json"] == "rows\n" and "kernels: done" in files["stages.txt"]
    assert ("stopped before the end" in files["stages.txt"]) == (how == signal.SIGTERM)


def test_what_lacks_an_import_is_named_and_the_others_run(gpu, tmp_path):
    says = "say missing import: some\\nlacks training some,other\\nlacks sparse-8 some"
    code, out, err, calls = gpu("full", SAYS=says)
    assert code == 1 and len(calls) == len(FULL) - 2 and not any("benchmark_training" in call for call in calls)
    assert "missing import: some\n" in out and "missing import: some\n" in archived(tmp_path, "full")["stages.txt"]
    assert err.startswith("error: failed: training (no some,other), sparse-8 (no some); ")


def test_every_baseline_is_in_one_of_the_stages(gpu):
    methods = [
        call.split("--methods ")[1].split()[0]
        for run in ("quick", "full")
        for call in gpu(run)[3]
        if "--methods" in call
    ]
    named = {name for names in methods for name in names.split(",")}
    linear = {kind for kind, of_kind in ATTENTION.items() if issubclass(of_kind, LinearCost)}
    assert named >= {"squared", "lowrank", "sparse_qk", "sparse_hash", *linear, *BASELINES["cuda"]}


def test_only_the_stages_asked_for_run(gpu):
    (call,) = gpu("quick", STAGES="attention")[3]
    assert call.startswith("tools/benchmark_attention.py") and "/attention.json" in call
    code, _, err, _ = gpu("quick", STAGES="attention speed")
    assert code == 2 and err == "error: quick has no stage speed, but warm kernels correct attention\n"


def test_wheels_that_do_not_fit_keep_no_stage_from_running(gpu, tmp_path):
    (tmp_path / "some.whl").touch()
    code, out, err, calls = gpu("quick", WHEELS=str(tmp_path), FAILS="pip install")
    assert (code, err, len(calls)) == (0, "", 1 + len(QUICK))
    said = f"the wheels in {tmp_path} could not be installed\n"
    assert said in out and said in archived(tmp_path, "quick")["stages.txt"]


def test_a_wheels_folder_without_wheels_is_refused(gpu, tmp_path):
    code, _, err, _ = gpu("quick", WHEELS=str(tmp_path))
    assert (code, err) == (2, f"error: there are no wheels in {tmp_path}\n")


def test_the_tools_understand_what_the_stages_ask_for(gpu, call_program, monkeypatch):
    """The first finds no GPU; the second reads every config before it meets a name that is none."""
    calls = gpu("quick")[3] + gpu("full")[3]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (training,), attention = ([call for call in calls if tool in call] for tool in ("_training", "_attention"))
    for call in attention:
        assert call_program(*call.split()) == (2, "", "error: --device cuda: PyTorch finds no GPU here; take cpu\n")
    code, _, err = call_program(*training.replace("flash,cudnn", "none").split())
    assert (code, err) == (2, "error: --sdpa none is none of flash, cudnn, efficient\n")
