import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcpt.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    Slice,
    commit_checkpoint,
    find_checkpoint,
    open_checkpoint,
    open_partial,
    read_manifest,
    read_state,
    read_tensors,
    step_name,
    write_piece,
)
from lcpt.utils.hashing import file_sha256, self_sha256

STATE = {"step": 7, "tokens": 700, "loss": 0.1 + 0.2}
GROUPS = ("weights", "exp_avg", "exp_avg_sq")


def tensors(seed=0):
    """A matrix, a vector, a scalar, a transposed view, and one in bf16."""
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(5, 3, generator=draw)
    return {
        "matrix": matrix,
        "vector": torch.randn(4, generator=draw),
        "scalar": torch.randn((), generator=draw),
        "transposed": matrix.T,
        "half": matrix.bfloat16(),
    }


@pytest.fixture
def write(tmp_path):
    """write(step, seed) -> the step folder, of a run in tmp_path / "run"."""
    config = tmp_path / "config.yaml"
    config.write_text("run: {dir: x}\n")

    def write(step=7, seed=0):
        groups = {
            group: [
                Slice(name, tuple(tensor.shape), 0, tensor.float().flatten())
                for name, tensor in tensors(seed + n).items()
            ]
            for n, group in enumerate(GROUPS)
        }
        partial = open_partial(tmp_path / "run/checkpoints", step)
        return commit_checkpoint(partial, step, [write_piece(partial, 0, groups)], STATE, {"config.yaml": config})

    return write


def test_tensors_and_state_come_back_as_written(write):
    step = write()
    assert step.name == "step-00000007"
    manifest = read_manifest(step)
    for number, group in enumerate(GROUPS):
        found, expected = read_tensors(step, manifest, group), tensors(number)
        assert found.keys() == expected.keys()
        for name, x in found.items():
            assert x.dtype == torch.float32 and torch.equal(x, expected[name].float()), name
    assert read_state(step) == STATE
    assert (step / "config.yaml").read_text() == "run: {dir: x}\n"


def test_files_are_as_documented(write):
    step = write()
    files = {path.name for path in step.iterdir()}
    assert files == {f"{group}-00000.safetensors" for group in GROUPS} | {"state.json", "config.yaml", "manifest.json"}
    manifest = json.loads((step / "manifest.json").read_text())
    assert manifest["step"] == 7 and manifest["schema_version"] == 1
    assert manifest["files"].keys() == files - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry == {"size_bytes": (step / name).stat().st_size, "sha256": file_sha256(step / name)}
    assert (step.parent / "latest").read_text() == "step-00000007\n"
    assert {path.name for path in step.parent.iterdir()} == {"latest", "step-00000007"}


def test_the_same_state_gives_the_same_bytes(write, tmp_path):
    first = {path.name: path.read_bytes() for path in write().iterdir()}
    shutil.rmtree(tmp_path / "run")
    assert {path.name: path.read_bytes() for path in write().iterdir()} == first


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_whoever_may_read_one_file_may_read_all(write, umask, mode):
    before = os.umask(umask)
    try:
        assert {path.stat().st_mode & 0o777 for path in write().iterdir()} == {mode}
    finally:
        os.umask(before)


def with_slices(step, slices):
    """The weights' matrix in slices (start, stop), each in a file of its own."""
    manifest = json.loads((step / "manifest.json").read_text())
    flat, pieces = tensors()["matrix"].flatten(), []
    for number, (start, stop) in enumerate(slices):
        file = f"weights-{number + 1:05d}.safetensors"
        save_file({"matrix": flat[start:stop].clone()}, step / file)
        pieces.append({"file": file, "start": start, "stop": stop})
        manifest["files"][file] = {"size_bytes": (step / file).stat().st_size, "sha256": file_sha256(step / file)}
    manifest["tensors"]["weights"]["matrix"]["slices"] = pieces
    manifest["sha256"] = self_sha256(manifest)
    (step / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("slices", [[(0, 7), (7, 15)], [(11, 15), (0, 4), (4, 11)]])
def test_slices_are_put_together(write, slices):
    step = write()
    with_slices(step, slices)
    assert torch.equal(read_tensors(step, read_manifest(step))["matrix"], tensors()["matrix"])


@pytest.mark.parametrize("slices", [[(0, 7)], [(0, 7), (8, 15)], [(3, 15)], []])
def test_slices_with_a_gap_are_refused(write, slices):
    step = write()
    with_slices(step, slices)
    with pytest.raises(CheckpointError, match="matrix"):
        read_tensors(step, read_manifest(step))


def damage(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        path.write_bytes(flipped)


@pytest.mark.parametrize("how", ["flipped bit", "truncated", "empty", "missing"])
@pytest.mark.parametrize(
    "file", [*(f"{group}-00000.safetensors" for group in GROUPS), "state.json", "config.yaml", "manifest.json"]
)
def test_damage_is_named(write, file, how):
    step = write()
    damage(step / file, how)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(step)
    assert str(step / file) in str(caught.value) and "\n" not in str(caught.value)


def test_any_flipped_bit_of_the_manifest_is_noticed(write):
    path = write() / "manifest.json"
    content = path.read_bytes()
    noticed = 0
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        try:
            same = read_manifest(path.parent) == json.loads(content)  # white space may change
        except CheckpointError:
            noticed += 1
        else:
            assert same
    assert noticed > 50


def test_an_edited_manifest_is_refused(write):
    path = write() / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tensors"]["weights"]["matrix"]["shape"] = [3, 5]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="damaged or edited"):
        read_manifest(path.parent)


@pytest.mark.parametrize("place", ["files", "slices"])
@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/hostname"])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(write, name, place):
    path = write() / "manifest.json"
    manifest = json.loads(path.read_text())
    if place == "files":
        manifest["files"][name] = next(iter(manifest["files"].values()))
    else:
        manifest["tensors"]["weights"]["matrix"]["slices"][0]["file"] = name
    path.write_text(json.dumps(manifest | {"sha256": self_sha256(manifest)}))
    with pytest.raises(CheckpointError, match="no file of its folder"):
        read_manifest(path.parent)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}"])
def test_json_that_is_no_manifest_is_refused(write, content):
    path = write() / "manifest.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match="manifest.json"):
        read_manifest(path.parent)


def test_another_schema_version_is_named(write):
    path = write() / "manifest.json"
    manifest = json.loads(path.read_text()) | {"schema_version": 99}
    path.write_text(json.dumps(manifest | {"sha256": self_sha256(manifest)}))
    with pytest.raises(CheckpointError, match="99"):
        read_manifest(path.parent)


def test_pickle_is_never_loaded(write, tmp_path):
    """A pickle under a tensor file's name, hashes in order, must not run."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was run"),)

    step = write()
    file = step / "weights-00000.safetensors"
    file.write_bytes(pickle.dumps(Evil()))
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"][file.name] = {"size_bytes": file.stat().st_size, "sha256": file_sha256(file)}
    manifest["sha256"] = self_sha256(manifest)
    (step / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="weights-00000"):
        read_tensors(step, read_manifest(step))
    assert not (tmp_path / "was run").exists()


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


def test_a_run_finds_its_newest_checkpoint_and_a_step_itself(write):
    first, second = write(3), write(20)
    run = first.parents[1]
    assert find_checkpoint(run) == find_checkpoint(str(run)) == find_checkpoint(run / "checkpoints") == second
    assert find_checkpoint(first) == first


@pytest.mark.parametrize("latest", ["step-00000099\n", "\n", "", "../../elsewhere\n"])
def test_a_latest_file_that_names_no_step_is_told(write, latest, capsys):
    step = write()
    (step.parent / "latest").write_text(latest)
    for path in (step.parents[1], step.parent):
        assert find_checkpoint(path) == open_checkpoint(path)[0] == step
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and all(line.startswith("warning: ") and "checkpoints/latest" in line for line in said)


@pytest.mark.parametrize("damage", ["gone", "no manifest", "cut", "changed"])
def test_the_newest_whole_step_is_taken_and_the_damaged_one_named(write, damage, capsys):
    old, new = write(3), write(20)
    file = new / "weights-00000.safetensors"
    if damage == "gone":
        shutil.rmtree(new)
    elif damage == "no manifest":
        (new / "manifest.json").unlink()
    elif damage == "cut":
        os.truncate(file, 10)
    else:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    step, manifest = open_checkpoint(old.parents[1])
    [line] = capsys.readouterr().err.splitlines()
    assert step == old and manifest["step"] == 3
    assert line.startswith("warning: ") and new.name in line and line.endswith(f"taking {old.name}")
    with pytest.raises(CheckpointError):  # who names a step wants that step
        open_checkpoint(new)


def test_without_a_whole_step_every_one_is_named(write):
    old, new = write(3), write(20)
    for step in (old, new):
        os.truncate(step / "state.json", 1)
    with pytest.raises(CheckpointError, match=f"{new.name}.*{old.name}"):
        open_checkpoint(old.parents[1])


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=str(path)):
            find_checkpoint(path)


def test_every_steps_is_checked():
    with pytest.raises(ValueError, match="checkpoint.every_steps is 0"):
        CheckpointConfig(0)
