"""Damage to any file is named by verify, and refused at open wherever opening can see it."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from lcpt.data import Corpus, DataError, prepare, verify
from lcpt.data.manifest import render, with_sha256

FILES = ["manifest.json", "tokenizer.model", "shard-00000.safetensors", "shard-00002.safetensors"]


@pytest.fixture
def folder(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "copy")


def damaged(folder) -> list[str]:
    lines = {name: line for name, line in verify(folder).items() if line}
    assert all(name in line and "\n" not in line for name, line in lines.items())
    return list(lines)


def test_whole_folder_is_whole(folder):
    assert damaged(folder) == [] and set(verify(folder)) == {path.name for path in folder.iterdir()}


def flip(position):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return damage


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "first byte": flip(0),
    "middle byte": flip(0.5),
    "last byte": flip(1),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_named_and_refused(folder, name, kind):
    DAMAGE[kind](folder / name)
    assert damaged(folder) == [name]
    with pytest.raises(DataError, match=name) as error:
        Corpus(folder)
    assert "\n" not in str(error.value)


def test_without_hashing_open_sees_shape_but_not_content(folder):
    flip(0.5)(folder / FILES[2])
    Corpus(folder, hash_shards=False)
    DAMAGE["truncated"](folder / FILES[3])
    with pytest.raises(DataError, match=f"{FILES[3]}: cut short"):
        Corpus(folder, hash_shards=False)


def test_foreign_files_are_named(folder, jsonl, prepared, tmp_path):
    prepare([jsonl], tmp_path / "other", vocab_size=700, shard_tokens=9000)
    shard = FILES[2]
    shutil.copy(tmp_path / "other" / shard, folder / shard)
    content = (folder / shard).read_bytes()
    size = json.loads((folder / "manifest.json").read_bytes())["shards"][0]["size_bytes"]
    (folder / shard).write_bytes(content.ljust(size, b"\0"))
    (folder / "extra.txt").write_text("")
    assert damaged(folder) == [shard, "extra.txt"]
    tensors = load_file(prepared / shard)
    save_file(tensors, folder / shard, {"tokenizer_sha256": "0" * 64})
    with pytest.raises(DataError, match=f"{shard}: a foreign shard, made with another tokenizer"):
        Corpus(folder, hash_shards=False)
    tensors["tokens"] = tensors["tokens"].view("int16")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    save_file(tensors, folder / shard, {"tokenizer_sha256": manifest["tokenizer_sha256"]})
    with pytest.raises(DataError, match=f"{shard}: a foreign shard"):
        Corpus(folder, hash_shards=False)
    shutil.copy(tmp_path / "other/tokenizer.model", folder / "tokenizer.model")
    with pytest.raises(DataError, match="tokenizer.model: is not the tokenizer that made these tokens"):
        Corpus(folder, hash_shards=False)


def test_other_manifests_are_refused(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    path.write_bytes(render(with_sha256({**manifest, "schema_version": 99})))
    with pytest.raises(DataError, match="schema version 99"):
        Corpus(folder)
    for content in (b"[]", b"{}", b'{"step": 3}', json.dumps(manifest).encode(), render({**manifest, "tokens": 1})):
        path.write_bytes(content)
        with pytest.raises(DataError, match="manifest.json: damaged"):
            Corpus(folder)


def test_a_shard_that_goes_after_opening_is_named(folder):
    """Shards are read when they are needed, a long time after the checks at the start."""
    corpus = Corpus(folder)
    path = folder / corpus.manifest["shards"][1]["file"]
    start = corpus.manifest["shards"][0]["tokens"]
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    for _ in range(2):
        with pytest.raises(DataError, match=f"{path.name}: cannot be read .*; prepare the data again, or restore"):
            corpus.read(start, start + 5)
        path.unlink(missing_ok=True)
    path.write_bytes(content)
    assert len(corpus.read(start, start + 5)) == 5


@pytest.mark.parametrize("name", ["../other/shard.safetensors", "/etc/hostname", ""])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(folder, name):
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["shards"][0]["file"] = name
    manifest.pop("sha256")
    (folder / "manifest.json").write_bytes(render(with_sha256(manifest)))
    with pytest.raises(DataError, match="no file of its folder"):
        Corpus(folder)
