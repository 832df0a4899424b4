"""The command as users type it, in real processes."""

import json
import socket
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch


@pytest.fixture
def run(environment):
    """run(*command, cwd) -> the finished process."""
    return lambda *command, cwd: subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def pretrain(run, script, tiny_yaml, tmp_path):
    """pretrain(*arguments) -> the finished process of `python launch/pretrain.py --config tiny.yaml …`."""
    return lambda *arguments: run(sys.executable, script, "--config", tiny_yaml, *arguments, cwd=tmp_path)


def test_the_deepspeed_launcher_trains_on_two_ranks(run, launcher, script, tiny_yaml, valid_folder, tmp_path):
    done = run(
        *launcher,
        script,
        "--config",
        tiny_yaml,
        f"run.dir={tmp_path / 'run'}",
        "training.max_steps=4",
        f"data.valid_path={valid_folder}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[-1]["valid_bits_per_byte"] > 0
    assert json.loads((tmp_path / "run/environment.json").read_text())["world_size"] == 2
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step-00000004"
    said = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in said] == ["step 1", "step 4"]  # no bar in a log; rank 0 alone speaks
    assert "tokens a second" in said[-1] and said[-1].endswith("100.0% of the run")
    assert "Traceback" not in done.stderr + done.stdout
    warnings = [line for line in (done.stdout + done.stderr).splitlines() if "warning" in line.lower()]
    assert all("hostfile" in line or "get_accelerator" in line for line in warnings), warnings  # the launcher's own
    assert len(warnings) <= 3


def test_one_process_trains_without_a_launcher(pretrain, environment, tmp_path):
    """In a SLURM job that has GPUs, on the CPU by choice."""
    with patch.dict(environment, {"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "0"}):
        done = pretrain("run.dir=mine", "training.device=cpu", "training.max_steps=3", "training.micro_batch=8")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "mine/summary.json").read_text())["step"] == 3


def test_a_dry_run_prints_config_and_cost_and_writes_nothing(pretrain, tmp_path):
    done = pretrain("--dry-run", "run.dir=mine", "training.lr=0.25")
    assert done.returncode == 0 and done.stderr == ""
    assert "lr: 0.25" in done.stdout and "dir: mine" in done.stdout
    for part in ("parameters", "FLOPs a token", "FLOPs of the run", "memory a rank of 1", "1 polysketch, 1 softmax"):
        assert part in done.stdout
    assert done.stdout.splitlines()[-1].startswith("a start on 1 rank would begin; micro-batches a rank and step: 8;")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def call(call_program, tiny_yaml, tmp_path, monkeypatch):
    """call(*arguments) -> what call_program does of launch/pretrain.py, which leaves pytest its Ctrl-C."""
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: call_program("launch/pretrain.py", "--config", tiny_yaml, *arguments)


def test_a_dry_run_for_ranks_that_do_not_work_prints_the_cost_first(call, tmp_path):
    code, out, err = call("--dry-run", "--ranks", 16, "run.dir=mine")
    assert code == 2 and "memory a rank of 16" in out
    [line] = err.splitlines()
    assert line.startswith("error: 8 sequences") and "among 1, 2, 4 or 8 ranks" in line
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_model_that_no_memory_holds_is_one_line(call):
    code, _, err = call("--dry-run", "run.dir=mine", "model.d_model=10000000000")
    assert code == 2 and err.startswith("error: no memory holds this model") and err.count("\n") == 1


def test_ranks_belong_to_a_dry_run(call, capsys):
    assert call("--dry-run", "--ranks", 0, "run.dir=mine") == (2, "", "error: --ranks is 0; it must be ≥ 1\n")
    with pytest.raises(SystemExit, match="2"):
        call("--ranks", 16, "run.dir=mine")
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["run.dir=mine", "training.learning_rate=1"], ["training.learning_rate"]),
        ([], ["run.dir"]),
        (["run.dir=mine", "model.vocab_size=12"], ["model.vocab_size=330"]),
        (["--dry-run", "run.dir=mine", "training.precision=fp8"], ["training.precision"]),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(pretrain, tmp_path, arguments, parts):
    done = pretrain(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and all(part in line for part in parts)
    assert not (tmp_path / "mine").exists()


def test_bad_input_under_the_launcher(run, launcher, script, environment, tiny_yaml, tmp_path):
    """With a host file: one error line from two ranks, no traceback, and an exit code that is not 0."""
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    ssh = tmp_path / "bin/ssh"  # with which it asks whether that machine is there
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/sh\nwhile [ "$1" != localhost ]; do shift; done; shift; exec "$@"\n')
    ssh.chmod(0o755)
    program, _, _, *port = launcher
    hosts = "--hostfile", tmp_path / "hosts"
    with patch.dict(environment, {"PATH": f"{ssh.parent}:{environment['PATH']}", "SLURM_JOB_ID": "7"}):
        done = run(
            program, *hosts, *port, script, "--config", tiny_yaml, "run.dir=mine", "model.vocab_size=12", cwd=tmp_path
        )
    assert done.returncode != 0 and "Traceback" not in done.stderr + done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "model.vocab_size=330" in errors[0]
    assert "dist_world_size=2" in done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize(
    "variables, overrides, words",
    [
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "0,1"}, [], "SLURM gave this job GPUs (SLURM_JOB_GPUS=0,1)"),
        ({"DS_ACCELERATOR": "cuda"}, [], "DS_ACCELERATOR is cuda"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, [], "MASTER_ADDR and MASTER_PORT are not set"),
    ],
    ids=str,
)
def test_a_job_that_is_not_what_was_asked_for_is_refused(pretrain, environment, tmp_path, variables, overrides, words):
    with patch.dict(environment, variables):
        done = pretrain("run.dir=mine", *overrides)
    [line] = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and words in line
    assert list(tmp_path.iterdir()) == []


def test_help_shows_an_example(run, script, tmp_path):
    done = run(sys.executable, script, "--help", cwd=tmp_path)
    assert done.returncode == 0 and "deepspeed" in done.stdout and "section.key=value" in done.stdout


def test_a_port_in_use_is_one_line(run, script, tiny_yaml, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = run(
            "deepspeed",
            "--num_accelerators",
            1,
            "--master_port",
            other.getsockname()[1],
            script,
            "--config",
            tiny_yaml,
            "run.dir=mine",
            cwd=tmp_path,
        )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "--master_port" in errors[0]
    assert "Traceback" not in done.stderr
