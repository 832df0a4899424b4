"""Whatever ends a writer, the old checkpoint or the new one is whole."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcpt.checkpoint import (
    Slice,
    find_checkpoint,
    open_partial,
    read_manifest,
    read_tensors,
    step_name,
    write_piece,
)
from tests.checkpoint.conftest import tensors


class Crash(Exception):
    pass


@pytest.mark.parametrize("call", ["os.replace", "os.fsync"])
def test_a_crash_at_any_moment_leaves_the_old_or_the_new(write, monkeypatch, call):
    """Die at the first, second, … renaming or syncing: `latest` always names a whole step, and the next save works."""
    module, name = os, call.removeprefix("os.")
    original, survived = getattr(module, name), False
    old = write(1)
    for moment in range(50):
        calls = 0

        def dies(*args, moment=moment, **kwargs):
            nonlocal calls
            calls += 1
            if calls > moment:
                raise Crash
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, dies)
        try:
            write(2)
            survived = True
        except Crash:
            pass
        monkeypatch.setattr(module, name, original)
        found = find_checkpoint(old.parents[1])
        read_manifest(found)
        assert found == old or found.name == step_name(2)
        for step in old.parent.glob("step-*"):
            read_manifest(step)  # what carries a final name is whole
        if survived:
            break
        shutil.rmtree(old.parent / step_name(2), ignore_errors=True)
        (old.parent / "latest").write_text(old.name + "\n")
    assert survived and moment >= (2 if call == "os.replace" else 6)  # 3 renames; every file and folder synced
    assert {path.name for path in old.parent.iterdir()} == {"latest", step_name(1), step_name(2)}


def test_files_are_synced_before_they_get_their_name(write, monkeypatch):
    """Every file, and the folder that lists them, reaches the disk before the rename."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("rename", os.fspath(b))), replace(a, b)))
    step = write()
    renamed = events.index(("rename", str(step)))
    synced = set(events[:renamed])
    [partial] = {str(Path(event).parent) for event in synced if "state.json" in event}
    for path in step.iterdir():
        name = ".manifest.json.partial" if path.name == "manifest.json" else path.name
        assert f"{partial}/{name}" in synced, path.name
    assert partial in synced
    assert str(step.parent) in events[renamed:]


def test_a_writer_killed_between_files_leaves_the_last_checkpoint(write, run_ranks, monkeypatch):
    """kill -9 in the middle of the second file."""
    import lcpt.utils.tensor_files as module

    step, calls = write(1), []

    def save(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), 9)
        save_file(*args, **kwargs)

    def killed():
        monkeypatch.setattr(module, "save_file", save)
        write(2)

    with pytest.raises(RuntimeError, match="signal 9"):
        run_ranks(killed, 1)
    assert find_checkpoint(step.parents[1]) == step
    assert not (step.parent / step_name(2)).exists()
    again = write(2)
    read_manifest(again)
    assert {path.name for path in step.parent.iterdir()} == {"latest", step_name(1), step_name(2)}


def test_a_full_disk_leaves_the_last_checkpoint(write, monkeypatch):
    import lcpt.utils.tensor_files as module

    step = write(1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write(2)
    assert find_checkpoint(step.parents[1]) == step and not (step.parent / step_name(2)).exists()


def test_writing_a_step_again_replaces_it(write):
    write(7, seed=0)
    step = write(7, seed=50)
    assert torch.equal(read_tensors(step, read_manifest(step))["matrix"], tensors(50)["matrix"])


@pytest.mark.parametrize("leftover", [".step-00000007.replaced", ".step-00000007.partial", ".step-00000002.partial"])
def test_what_a_crash_left_is_no_hindrance(write, leftover):
    old = write()
    (old.parent / leftover).mkdir()
    (old.parent / leftover / "weights-00000.safetensors").write_text("half")
    read_manifest(write(seed=5))
    assert {path.name for path in old.parent.iterdir()} == {"latest", "step-00000007"}


def test_a_process_of_a_dead_job_cannot_write_into_a_new_save(tmp_path):
    """It may not have noticed yet: each attempt has a folder of its own, and the next one removes the last."""
    stale = open_partial(tmp_path / "checkpoints", 5)
    fresh = open_partial(tmp_path / "checkpoints", 5)
    assert fresh != stale and fresh.is_dir() and not stale.exists()
    with pytest.raises(FileNotFoundError):
        write_piece(stale, 1, {"weights": [Slice("x", (2,), 0, torch.ones(2))]})
