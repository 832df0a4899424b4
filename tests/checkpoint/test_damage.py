"""Damage to any file of a step is named, and nothing in it is executed."""

import json
import os
import pickle

import pytest

from lcpt.checkpoint import (
    CheckpointError,
    read_manifest,
    read_tensors,
)
from lcpt.utils.hashing import file_sha256, self_sha256
from tests.checkpoint.conftest import GROUPS, damage


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
