"""Saving while training goes on: what is kept, what a full disk does, and what it costs."""

import contextlib
import os
import subprocess
import time
from pathlib import Path

import pytest

from lcpt.checkpoint import read_manifest, read_state, read_tensors

FAULT = 1


def steps(job):
    return [int(path.name[5:]) for path in sorted((job.dir / "checkpoints").glob("step-*"))]


def test_the_last_few_and_milestones_are_kept(start_job):
    job = start_job(
        2,
        "training.max_steps=17",
        "training.micro_batch=2",
        "checkpoint.every_steps=2",
        "checkpoint.keep_last=2",
        "checkpoint.milestone_steps=5",
    )
    assert job.wait() == [0, 0], job.text
    assert steps(job) == [5, 10, 15, 16, 17]
    names = {path.name for path in (job.dir / "checkpoints").iterdir()}
    assert names == {"latest", *(f"step-{step:08d}" for step in steps(job))}
    for step in steps(job):
        read_manifest(job.dir / f"checkpoints/step-{step:08d}")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_rank_writes_its_part(start_job, stage):
    job = start_job(2, "training.max_steps=3", "training.micro_batch=2", f"parallel.zero_stage={stage}")
    assert job.wait() == [0, 0], job.text
    manifest = read_manifest(job.dir / "checkpoints/step-00000003")
    sizes = [
        sum(entry["size_bytes"] for name, entry in manifest["files"].items() if f"-{rank:05d}.s" in name)
        for rank in (0, 1)
    ]
    assert min(sizes) > 0.8 * max(sizes)
    for group in ("weights", "exp_avg", "exp_avg_sq"):
        for entry in manifest["tensors"][group].values():
            covered = sorted((piece["start"], piece["stop"]) for piece in entry["slices"])
            ends = [0, *(stop for _, stop in covered)]
            assert [start for start, _ in covered] == ends[:-1]  # each number once


def test_saves_by_the_minute_follow_the_clock_of_rank_0(start_job, at_place):
    """A rank 1 whose clock is wrong changes nothing; the clock starts again at every save."""

    def sabotage(number):
        from lcpt.training.saving import Saver

        if number == 1:
            Saver.minutes_are_up = lambda self: True
        at_place("the update of", lambda: time.sleep(0.3))(number)

    job = start_job(
        2,
        "training.max_steps=10",
        "training.micro_batch=4",
        "checkpoint.every_minutes=0.02",
        "checkpoint.keep_last=100",
        sabotage=sabotage,
    )
    assert job.wait() == [0, 0], job.text
    assert 2 <= len(steps(job)) <= 4 and steps(job)[-1] == 10  # every fourth step or so, and the last


def slow_disk(seconds):
    def install(number):
        import lcpt.training.saving as module

        write = module.write_piece

        def slowly(*arguments):
            time.sleep(seconds)
            return write(*arguments)

        module.write_piece = slowly

    return install


def test_training_goes_on_while_a_checkpoint_is_written(start_job, train_ranks):
    settings = ["training.max_steps=30", "training.micro_batch=4", "checkpoint.every_steps=10"]
    job = start_job(2, *settings, sabotage=slow_disk(2))
    job.wait_for(lambda: (job.dir / "metrics.jsonl").exists() and len(job.rows) >= 15)
    assert steps(job) == []  # step 10 is still being written
    assert job.wait() == [0, 0], job.text
    assert steps(job) == [10, 20, 30]
    # What is written is the state of its own step, not of a later one.
    quick = train_ranks(2, *settings)
    for step in ("step-00000010", "step-00000020", "step-00000030"):
        slowly, quickly = job.dir / "checkpoints" / step, quick.dir / "checkpoints" / step
        assert read_state(slowly)["adam_step"] == int(step[5:])
        for group in ("weights", "exp_avg", "exp_avg_sq"):
            found, expected = (read_tensors(path, read_manifest(path), group) for path in (slowly, quickly))
            assert all(tensor.equal(expected[name]) for name, tensor in found.items())


def test_rows_reach_the_disk_before_the_checkpoint_does(start_job):
    """Else a machine that loses its power would come back with a checkpoint and without the rows before it."""

    def sabotage(number):
        import lcpt.training.saving as module

        commit_checkpoint, fsync, synced = module.commit_checkpoint, os.fsync, []

        def note(descriptor):
            synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
            fsync(descriptor)

        def checked(partial, step, *arguments):
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

            assert synced.count("metrics.jsonl") >= step  # one save a step
            events = EventAccumulator(str(partial.parents[1] / "tensorboard"))
            events.Reload()
            assert [event.step for event in events.Scalars("loss/train")][:step] == list(range(1, step + 1))
            return commit_checkpoint(partial, step, *arguments)

        os.fsync, module.commit_checkpoint = note, checked

    job = start_job(1, "training.max_steps=4", "training.micro_batch=8", "checkpoint.every_steps=1", sabotage=sabotage)
    assert job.wait() == [0], job.text


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_does_not_cost_the_save_that_is_under_way(start_job, at_place, rank):
    """A rank that raises leaves the background the time to end, on all ranks."""

    def broken():
        raise RuntimeError("out of memory")

    def sabotage(number):
        slow_disk(2)(number)
        at_place("the update of step 5", broken, rank)(number)

    job = start_job(2, "training.max_steps=9", "training.micro_batch=4", "checkpoint.every_steps=4", sabotage=sabotage)
    assert job.wait() == [FAULT, FAULT], job.text
    assert steps(job) == [4] and "out of memory" in job.text


@pytest.mark.parametrize(
    "function, rank", [("write_piece", 0), ("write_piece", 1), ("commit_checkpoint", 0), ("open_partial", 0)]
)
def test_a_save_that_fails_on_one_rank_fails_as_a_whole(start_job, function, rank):
    """Once, in the middle: it is told, leaves nothing, and the next one succeeds."""

    def sabotage(number):
        import lcpt.training.saving as module

        original, calls = getattr(module, function), []

        def fails_once(*arguments):
            calls.append(1)
            if number == rank and len(calls) == 2:
                raise OSError(5, "Input/output error")
            return original(*arguments)

        setattr(module, function, fails_once)

    job = start_job(2, "training.max_steps=6", "training.micro_batch=2", "checkpoint.every_steps=2", sabotage=sabotage)
    assert job.wait() == [0, 0], job.text
    assert steps(job) == [2, 6] and not list((job.dir / "checkpoints").glob(".step-*"))
    [line] = [line for line in job.text.splitlines() if "warning: " in line]
    assert "the checkpoint of step 4 could not be written" in line and "Input/output error" in line
    assert function != "write_piece" or f"rank {rank}" in line


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_rows_wait_for_room(start_job, small_disk, train_ranks, numbers, tmp_path):
    """A disk that is full for some steps costs nothing, once there is room again."""
    settings = ["training.max_steps=50", "training.micro_batch=2", "checkpoint.every_steps=100"]
    blocker = small_disk / "blocker"

    def sabotage(number):
        from lcpt.training.watchdog import Watchdog

        heartbeat = Watchdog.heartbeat

        def fill(self, place, timeout_s=None):
            if place == "the data of step 3" and number == 0:
                with contextlib.suppress(OSError), open(blocker, "wb", buffering=0) as file:
                    while True:
                        file.write(b"x" * 1000)
            if place == "the data of step 45" and number == 0:
                blocker.unlink()
            heartbeat(self, place, timeout_s)

        Watchdog.heartbeat = fill

    job = start_job(2, *settings, dir=small_disk / "run", sabotage=sabotage)
    assert job.wait() == [0, 0], job.text
    assert "its rows wait for room" in job.text and "Traceback" not in job.text
    assert numbers(job.rows) == numbers(train_ranks(2, *settings, dir=tmp_path / "whole").rows)


def test_a_run_goes_on_when_the_disk_is_full(start_job, small_disk, train_ranks, numbers, tmp_path):
    """The run goes on without that checkpoint; at its end the failure is an error, and nothing half-done stays behind.
    With room again it continues, from the last one that had room, as if nothing had been."""
    settings = ["training.max_steps=9", "training.micro_batch=2", "checkpoint.every_steps=2"]
    blocker = small_disk / "blocker"

    def sabotage(number):
        from lcpt.training.watchdog import Watchdog

        heartbeat = Watchdog.heartbeat

        def fill(self, place, timeout_s=None):
            if place == "the data of step 4" and number == 0:
                while not (small_disk / "run/checkpoints/latest").exists():
                    time.sleep(0.01)
                with contextlib.suppress(OSError):
                    blocker.write_bytes(b"x" * (1 << 22))
                with open(blocker, "r+b") as file:  # leave room for rows, not for a checkpoint
                    file.truncate(blocker.stat().st_size - 60_000)
            heartbeat(self, place, timeout_s)

        Watchdog.heartbeat = fill

    job = start_job(2, *settings, "checkpoint.every_steps=3", dir=small_disk / "run", sabotage=sabotage)
    assert job.wait() == [FAULT, FAULT], job.text
    assert steps(job) == [3] and not list((job.dir / "checkpoints").glob(".step-*"))
    read_manifest(job.dir / "checkpoints/step-00000003")
    assert job.text.count("warning: the checkpoint of step") == 2 and "No space left on device" in job.text
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert "step 9" in line and "mend that" in line and "Traceback" not in job.text
    blocker.unlink()
    again = start_job(2, *settings, "checkpoint.every_steps=3", dir=small_disk / "run")
    assert again.wait() == [0, 0], again.text
    assert numbers(again.rows) == numbers(train_ranks(2, *settings, dir=tmp_path / "whole").rows)
