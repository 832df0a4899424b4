"""The command as users type it, in real processes."""

import json
import socket
import subprocess
import sys

import pytest


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
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["valid_bits_per_byte"] > 0
    assert json.loads((tmp_path / "run/environment.json").read_text())["world_size"] == 2
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step-00000004"
    said = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in said] == ["step 1", "step 4"]  # no bar in a log; rank 0 alone speaks
    assert "tokens a second, 100.0% of the run" in said[-1]
    assert "Traceback" not in done.stderr + done.stdout
    warnings = [line for line in (done.stdout + done.stderr).splitlines() if "warning" in line.lower()]
    assert all("hostfile" in line or "get_accelerator" in line for line in warnings), warnings  # the launcher's own
    assert len(warnings) <= 3


def test_one_process_trains_without_a_launcher(pretrain, tmp_path):
    done = pretrain("run.dir=mine", "training.max_steps=3", "training.micro_batch=8")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "mine/summary.json").read_text())["step"] == 3


def test_a_dry_run_prints_config_and_cost_and_writes_nothing(pretrain, tmp_path):
    done = pretrain("--dry-run", "run.dir=mine", "training.lr=0.25")
    assert done.returncode == 0 and done.stderr == ""
    assert "lr: 0.25" in done.stdout and "dir: mine" in done.stdout
    for part in ("parameters", "FLOPs a token", "FLOPs of the run", "memory a rank of 1", "1 polysketch, 1 softmax"):
        assert part in done.stdout
    assert list(tmp_path.iterdir()) == []


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


def test_bad_input_under_the_launcher(run, launcher, script, tiny_yaml, tmp_path):
    """One error line from two ranks, no traceback, and an exit code that is not 0."""
    done = run(*launcher, script, "--config", tiny_yaml, "run.dir=mine", "model.vocab_size=12", cwd=tmp_path)
    assert done.returncode != 0 and "Traceback" not in done.stderr + done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "model.vocab_size=330" in errors[0]


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
