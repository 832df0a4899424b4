"""Documents arrive exactly as the files hold them, and broken files are named with their line."""

import bz2
import gzip
import json
import lzma

import pytest
import zstandard

from lcpt.data import DataError, find_sources, read_documents

TEXT = " é\r\nline\rtwo\n\n\u2028 end \n"
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def read(*inputs):
    return [document for source in find_sources(inputs).sources for document in read_documents(source)]


@pytest.mark.parametrize("packed", PACK)
def test_exact_from_every_packing(tmp_path, packed):
    records = [{"text": TEXT, "id": "a"}, {"text": "", "id": 7, "more": {}}, {"text": "x" * 3_000_000}]
    lines = b"\n".join(json.dumps(record, ensure_ascii=False).encode() for record in records)
    twice = PACK[packed](b"\xef\xbb\xbf" + lines + b"\n\n") + PACK[packed](lines)  # several members are legal
    (tmp_path / f"a.jsonl{packed}").write_bytes(twice)
    (tmp_path / f"b.txt{packed}").write_bytes(PACK[packed](TEXT.encode()))
    found = read(tmp_path)
    assert found[:3] == [("a", TEXT), ("7", ""), (f"a.jsonl{packed}:3", "x" * 3_000_000)]
    assert [text for _, text in found[3:]] == [TEXT, "", "x" * 3_000_000, TEXT]
    assert found[-1] == (f"b.txt{packed}", TEXT)


def test_folders_are_walked_in_order(tmp_path):
    for name in ("b.txt", "sub/a.TXT", "a.txt", "skipped.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [text for _, text in read(tmp_path)] == ["a.txt", "b.txt", "sub/a.TXT"]


def test_what_is_passed_over_is_counted(tmp_path):
    """Links are followed, also one that leads back up; hidden files, and those in hidden folders, are no text."""
    (tmp_path / "real/.ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "in").mkdir()
    for name in (
        "in/a.jsonl",
        "in/b.jsonl.bz2",
        "in/c.ndjson",
        "in/d.jsonl.lz4",
        "in/._e.txt",
        "in/README",
        "real/z.txt",
    ):
        content = b'{"text": "t"}\n'
        (tmp_path / name).write_bytes(bz2.compress(content) if name.endswith("bz2") else content)
    (tmp_path / "real/.ipynb_checkpoints/z-checkpoint.txt").write_text("old")
    (tmp_path / "in/sub").symlink_to(tmp_path / "real")
    (tmp_path / "real/up").symlink_to(tmp_path / "in")
    found = find_sources([tmp_path / "in"])
    assert [source.name for source in found.sources] == ["a.jsonl", "b.jsonl.bz2", "c.ndjson", "sub/z.txt"]
    assert found.passed_over == {".lz4": 1, "hidden": 2, "no ending": 1}
    assert [text for _, text in read(tmp_path / "in")] == ["t", "t", "t", '{"text": "t"}\n']


def test_a_file_given_twice_is_refused_and_files_of_one_name_are_told_apart(tmp_path):
    for name in ("one/a.txt", "two/a.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
    for twice in ([tmp_path / "one", tmp_path / "one/a.txt"], [tmp_path / "one/a.txt"] * 2, ["hf:a/b", "hf:a/b"]):
        with pytest.raises(DataError, match="give it once"):
            find_sources(twice)
    names = [source.name for source in find_sources([tmp_path / "one", tmp_path / "two"]).sources]
    assert names == [str(tmp_path / "one/a.txt"), str(tmp_path / "two/a.txt")]


def test_the_text_may_be_in_another_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "c", "text": "t"}\n')
    [source] = find_sources([tmp_path / "a.jsonl"], text_field="content").sources
    assert [text for _, text in read_documents(source)] == ["c"]
    (tmp_path / "a.jsonl").write_text('{"text": "t"}\n')
    with pytest.raises(DataError, match='a.jsonl:1: "content" is missing.*--text-field'):
        list(read_documents(source))


def test_a_long_window_and_a_byte_order_mark(tmp_path):
    text = "x" * 3_000_000
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    (tmp_path / "a.txt.zst").write_bytes(
        zstandard.ZstdCompressor(compression_params=parameters).compress(text.encode())
    )
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfb\xef\xbb\xbf")
    assert [found for _, found in read(tmp_path)] == [text, "b\ufeff"]


def test_parquet_files_and_datasets_are_read(tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "set").mkdir()
    parquet.write_table(pyarrow.table({"text": [TEXT, "b"], "id": ["x", None]}), tmp_path / "set/one [1].parquet")
    parquet.write_table(pyarrow.table({"text": ["c"], "other": [1.5]}), tmp_path / "set/two.parquet")
    assert read(tmp_path / "set") == [("x", TEXT), ("one [1].parquet:2", "b"), ("two.parquet:1", "c")]
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "set/none.parquet")
    (tmp_path / "set/two.parquet").rename(tmp_path / "set/two::three.parquet")
    assert read(tmp_path / "set")[-1] == ("two::three.parquet:1", "c")
    (tmp_path / "hub").mkdir()
    parquet.write_table(pyarrow.table({"text": ["d"]}), tmp_path / "hub/train.parquet")
    monkeypatch.chdir(tmp_path)
    assert read("hf:hub") == [("hf:hub:1", "d")] == [(i.replace(":train", ""), t) for i, t in read("hf:hub:train")]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    parquet.write_table(pyarrow.table({"words": ["d"]}), tmp_path / "words.parquet")
    for bad in (tmp_path / "bad.parquet", tmp_path / "words.parquet", "hf:hub:nosplit", "hf:"):
        with pytest.raises(DataError, match="hf:|bad.parquet|words.parquet:1") as error:
            read(bad)
        assert "\n" not in str(error.value)


BROKEN = {
    "utf8.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', "utf8.jsonl:2: not valid UTF-8"),
    "json.jsonl": (b'{"text": "a"}\n\n{"text": "a\n', "json.jsonl:3: broken JSON"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl:1: broken JSON"),
    "list.json": (b"[1]\n", "list.json:1: not a JSON object"),
    "none.jsonl": (b'{"body": "a"}\n', 'none.jsonl:1: "text" is missing'),
    "number.jsonl": (b'{"text": 3}\n', 'number.jsonl:1: "text" is of type int'),
    "half.jsonl": (b'{"text": "\\ud800"}\n', "half.jsonl:1: holds half of a surrogate"),
    "latin.txt": (b"one\ntwo \xe9\n", "latin.txt:2: not valid UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_content_is_named(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(tmp_path / name)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("packed", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".txt"])
def test_damaged_archives_are_named(tmp_path, packed, kind):
    whole = PACK[packed](b"".join(b'{"text": "%d"}\n' % n for n in range(20_000)))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x55
    for content in (whole[: len(whole) // 2], whole[:-1], b"no archive at all", bytes(flipped)):
        path = tmp_path / f"cut{kind}{packed}"
        path.write_bytes(content)
        if packed == ".zst" and content == bytes(flipped):
            continue  # a frame need not carry a checksum, so a flip need not show
        with pytest.raises(DataError, match=rf"cut{kind}{packed}:\d+: "):
            read(path)


def test_unknown_inputs_are_refused(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"")
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    for name in ("a.pdf", "a.parquet.gz", "absent.txt", ""):
        with pytest.raises(DataError):
            read(tmp_path / name)
