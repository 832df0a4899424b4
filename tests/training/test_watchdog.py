"""Check that a fault of one rank ends the job, soon, with one line that names rank and reason."""

import json
import os
import signal
import time

import pytest

FAULT = 1


@pytest.fixture(scope="module")
def settings():
    return ["training.max_steps=500", "training.micro_batch=2", "training.hang_seconds=3"]


def errors(job):
    return [line for line in job.text.splitlines() if "error: " in line]


def faster(monkey):
    """A sabotage, where silence counts sooner."""

    def install(number):
        import lcpt.training.watchdog as module

        module.SILENCE_LIMIT_S = module.STARTUP_SILENCE_LIMIT_S = 4.0
        monkey(number)

    return install


def broken():
    raise KeyError("no such\nthing")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_job_by_name(start_job, at_place, send, settings, rank):
    job = start_job(2, *settings, sabotage=at_place("micro-batch 2 of step 3", send("KILL"), rank))
    codes = job.wait(30)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == FAULT, job.text
    [line] = errors(job)
    assert f"rank {rank} died" in line and "Traceback" not in job.text
    assert job.seconds < 15


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_ends_the_job_by_name(start_job, at_place, settings, rank):
    job = start_job(2, *settings, sabotage=at_place("the update of step 2", broken, rank))
    assert job.wait(30) == [FAULT, FAULT]
    [line] = errors(job)
    assert f"rank {rank} failed at the update of step 2: KeyError: " in line and "no such" in line
    assert job.text.count("Traceback") == 1  # of the rank that raised, not of those that missed it


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_ends_the_job_by_name(start_job, at_place, settings, rank):
    job = start_job(2, *settings, sabotage=at_place("micro-batch 1 of step 4", lambda: time.sleep(1000), rank))
    assert job.wait(45) == [FAULT, FAULT], job.text
    [line] = errors(job)
    assert f"rank {rank} hangs at micro-batch 1 of step 4: no progress for " in line
    for number in (0, 1):
        stacks = (job.dir / f"stacks/rank-{number:05d}.txt").read_text()
        assert "forward_and_backward" in stacks and ("in hit" in stacks) == (number == rank)
    assert f"rank {rank} was here:" in job.text and "in hit" in job.text


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("fault", ["dies", "raises", "hangs", "is stopped"])
def test_with_default_limits_a_fault_ends_the_job_within_a_minute(start_job, at_place, send, record, fault, rank):
    """On 4 ranks, within a minute; the last rank of all is one that nobody talks to often."""
    action = {"dies": send("KILL"), "raises": broken, "hangs": lambda: time.sleep(1000), "is stopped": send("STOP")}
    job = start_job(4, "training.max_steps=500", sabotage=at_place("the update of step 3", action[fault], rank))
    job.wait_for(lambda: (job.dir / "metrics.jsonl").exists() and len(job.rows) == 2)
    began = time.monotonic()
    while any(process.is_alive() for n, process in enumerate(job.processes) if n != rank or fault != "is stopped"):
        assert time.monotonic() - began < 60, job.text
        time.sleep(0.05)
    [line] = errors(job)
    message = line.replace(str(job.dir), "run")
    record("faults", {"fault": fault, "rank": rank, "seconds": time.monotonic() - began, "message": message})
    assert f"rank {rank} " in line


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_ends_the_job_by_name(start_job, at_place, send, settings, rank):
    job = start_job(
        2, *settings, "training.hang_seconds=30", sabotage=faster(at_place("the data of step 3", send("STOP"), rank))
    )
    deadline = time.monotonic() + 30
    while job.processes[1 - rank].is_alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert job.processes[1 - rank].exitcode == FAULT, job.text
    job.kill()
    [line] = errors(job)
    assert f"rank {rank} does not answer" in line and "stopped" in line


def test_a_rank_whose_interpreter_lock_is_kept_ends_the_job_by_name(start_job, at_place, settings):
    """No Python thread of that rank runs any more: only the C one can say where it is."""
    import ctypes

    def lock():
        ctypes.PyDLL(None).sleep(1000)  # unlike CDLL, PyDLL does not release the lock

    job = start_job(2, *settings, "training.hang_seconds=30", sabotage=faster(at_place("the data of step 3", lock, 1)))
    deadline = time.monotonic() + 30
    while job.processes[0].is_alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    job.kill()
    assert any("rank 1 does not answer" in line for line in errors(job)), job.text
    assert "in lock" in (job.dir / "stacks/rank-00001.txt").read_text()


def test_a_slow_step_is_no_hang(start_job, at_place, settings):
    """The first step may take long, and later ones may be as slow as ten times what was seen."""

    def sabotage(number):
        at_place("the update of step 1", lambda: time.sleep(5))(number)
        at_place("the update of step 2", lambda: time.sleep(1))(number)
        at_place("the update of step 3", lambda: time.sleep(5))(number)

    job = start_job(2, "training.max_steps=4", "training.warmup_steps=1", "training.hang_seconds=2", sabotage=sabotage)
    assert job.wait(60) == [0, 0], job.text
    assert not (job.dir / "stacks").exists()


def test_a_job_that_was_suspended_goes_on(start_job, settings):
    job = start_job(2, *settings, "training.max_steps=60")
    job.wait_for(lambda: (job.dir / "metrics.jsonl").exists() and len(job.rows) > 3)
    for process in job.processes:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(8)
    for process in job.processes:
        os.kill(process.pid, signal.SIGCONT)
    assert job.wait(60) == [0, 0], job.text


def test_a_fault_is_remembered(start_job, at_place, send, settings):
    job = start_job(2, *settings, sabotage=at_place("the data of step 3", send("KILL"), 1))
    job.wait(30)
    [start] = json.loads((job.dir / "starts.json").read_text())
    assert "rank 1 died" in start["end"] and start["ended"] > start["started"]
