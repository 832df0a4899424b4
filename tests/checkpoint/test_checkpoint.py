"""What is written comes back; the newest whole step of a run is found."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from lcpt.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    find_checkpoint,
    open_checkpoint,
    read_manifest,
    read_state,
    read_tensors,
)
from lcpt.utils.hashing import file_sha256, self_sha256
from tests.checkpoint.conftest import GROUPS, STATE, tensors


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
