"""Signals to the `deepspeed` command, its launcher, its process group or one rank: saved, ended, nothing left over."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lcpt.checkpoint import find_checkpoint, read_manifest
from lcpt.training.preemption import parent_of


@pytest.fixture
def job(tiny_yaml, tmp_path, environment, launcher, script):
    """A `deepspeed` job of 2 ranks, in a session of its own, with some steps behind it."""
    command = [
        *map(str, launcher),
        script,
        "--config",
        str(tiny_yaml),
        f"run.dir={tmp_path / 'run'}",
        "training.max_steps=100000",
    ]
    with open(tmp_path / "output.txt", "w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
        time.sleep(0.1)
    yield process
    for pid in members(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def members(session):
    """The processes of a session that still run, the oldest first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append((int(fields[19]), int(stat.parent.name)))
    return [pid for _, pid in sorted(found)]


def one(job, who):
    """The pid of the command, of its launcher, or of a rank."""
    launcher = next(pid for pid in members(job.pid) if parent_of(pid) == job.pid)
    ranks = [pid for pid in members(job.pid) if parent_of(pid) == launcher]
    return {"command": job.pid, "launcher": launcher, "rank 0": ranks[0], "rank 1": ranks[1]}[who]


@pytest.mark.parametrize(
    "who, name",
    [
        ("command", "TERM"),
        ("rank 1", "USR1"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("command", "KILL"),
                ("launcher", "TERM"),
                ("launcher", "KILL"),
                ("rank 0", "TERM"),
                ("group", "TERM"),
                ("group", "INT"),
            )
        ),
    ],
)
def test_a_signal_ends_the_job_with_its_state_saved(job, tmp_path, who, name):
    number, began = signal.Signals[f"SIG{name}"], time.monotonic()
    if who == "group":
        os.killpg(job.pid, number)
    else:
        os.kill(one(job, who), number)
    while members(job.pid) and time.monotonic() - began < 40:
        job.poll()
        time.sleep(0.1)
    text = (tmp_path / "output.txt").read_text()
    assert members(job.pid) == [], text
    assert time.monotonic() - began < 25
    assert (who, name) == ("launcher", "KILL") or job.wait() != 0  # deepspeed makes 1 of our 75; hence the marker
    marker = json.loads((tmp_path / "run/preempted.json").read_text())
    step = find_checkpoint(tmp_path / "run")
    assert step.name == f"step-{marker['step']:08d}" and read_manifest(step)
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == marker["step"]
    assert "the same command continues it" in text


def test_a_killed_rank_ends_the_job_by_name(job, tmp_path):
    os.kill(one(job, "rank 1"), signal.SIGKILL)
    began = time.monotonic()
    while members(job.pid) and time.monotonic() - began < 60:
        job.poll()
        time.sleep(0.1)
    text = (tmp_path / "output.txt").read_text()
    assert members(job.pid) == [] and time.monotonic() - began < 60
    assert "error: rank 1 died" in text and job.wait() != 0
    assert not (tmp_path / "run/preempted.json").exists()
