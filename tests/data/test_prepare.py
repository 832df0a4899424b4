"""The prepared folder: what is in it, that it is the same however it was made, and that it is all or nothing."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from lcpt.data import Contiguous, Corpus, DataError, Tokenizer, parallel_encode, prepare
from lcpt.data.atomic_folder import new_folder
from lcpt.data.documents import documents
from lcpt.data.manifest import load_manifest, render, with_sha256
from lcpt.data.order import window_start


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_come_back(corpus, texts):
    tokenizer = Tokenizer(corpus.tokenizer)
    assert len(corpus) == len(texts) and len(corpus.manifest["shards"]) > 3
    for number, text in enumerate(texts):
        identifier, tokens, n_bytes = corpus.document(number)
        assert identifier == f"book-{number}" and n_bytes == len(text.encode())
        assert tokens.dtype == np.int64 and tokens[0] == corpus.bos_id and tokenizer.decode(tokens) == text
        assert corpus.bos_id not in tokens[1:]
    assert corpus.manifest["bytes"] == sum(len(text.encode()) for text in texts)
    assert corpus.manifest["documents_not_exact"] == 0


def test_stream_is_the_documents_in_turn(corpus):
    stream = np.concatenate([corpus.document(number)[1] for number in range(len(corpus))])
    np.testing.assert_array_equal(corpus.read(0, corpus.tokens), stream)
    borders = np.cumsum([shard["tokens"] for shard in corpus.manifest["shards"]])
    for start, stop in [(0, 0), *((int(b) - 9, int(b) + 9) for b in borders[:-1]), (5, corpus.tokens)]:
        np.testing.assert_array_equal(corpus.read(start, stop), stream[start:stop])
    for start, stop in [(-1, 3), (3, 2), (0, corpus.tokens + 1)]:
        with pytest.raises(IndexError):
            corpus.read(start, stop)


def test_a_range_has_the_ids_of_its_documents(corpus):
    sizes = [len(corpus.document(number)[1]) for number in range(len(corpus))]
    starts = np.cumsum([0, *sizes])
    for start, stop in [(0, 1), (starts[3] - 1, starts[3] + 1), (starts[5], starts[9]), (0, corpus.tokens), (7, 7)]:
        expected = [f"book-{n}" for n in range(len(sizes)) if max(start, starts[n]) < min(stop, starts[n + 1])]
        assert corpus.document_ids(int(start), int(stop)) == expected


def test_same_bytes_for_any_workers(jsonl, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel_encode, "BATCH_CHARACTERS", 5000)  # or all this text were one batch
    for workers in (2, 3):
        prepare([jsonl], tmp_path / "out", vocab_size=600, shard_tokens=9000, workers=workers)
        assert content(tmp_path / "out") == content(prepared)
        (tmp_path / "out").rename(tmp_path / str(workers))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_shard_size_moves_no_token(jsonl, prepared, corpus, tmp_path):
    model = prepared / "tokenizer.model"
    for shard_tokens in (1, 10**6):
        prepare([jsonl], tmp_path / str(shard_tokens), tokenizer=model, shard_tokens=shard_tokens)
        other = Corpus(tmp_path / str(shard_tokens))
        np.testing.assert_array_equal(other.read(0, other.tokens), corpus.read(0, corpus.tokens))
        assert len(other.manifest["shards"]) == (len(corpus) if shard_tokens == 1 else 1)
        assert other.fingerprint == corpus.fingerprint


def test_content_alone_decides_the_fingerprint_and_the_order(tmp_path, prepared, texts):
    """Not the names of files or documents; but each token, and the tokenizer."""

    def corpus_of(name, texts, tokenizer):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare([tmp_path / name], tmp_path / f"{name}.data", tokenizer=tokenizer)
        return Corpus(tmp_path / f"{name}.data")

    model = prepared / "tokenizer.model"
    foreign = tmp_path / "foreign.model"  # the same pieces, another file
    foreign.write_bytes(model.read_bytes() + b"\x7a\x00")
    one, renamed = corpus_of("a.jsonl", texts, model), corpus_of("b.jsonl", texts, model)
    assert one.document(0)[0] != renamed.document(0)[0]
    assert one.fingerprint == renamed.fingerprint
    for n in range(9):
        np.testing.assert_array_equal(*(Contiguous(x).sample(n, 7, 100).inputs for x in (one, renamed)))
    others = [
        corpus_of("c.jsonl", texts[::-1], model),
        corpus_of("d.jsonl", [*texts[:-1], texts[-1] + "!"], model),
        corpus_of("e.jsonl", texts, foreign),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_a_folder_prepared_before_keeps_its_fingerprint_and_order(tmp_path, prepared):
    shutil.copytree(prepared, tmp_path / "old")
    manifest = load_manifest(prepared)
    del manifest["fingerprint"]
    (tmp_path / "old/manifest.json").write_bytes(render(old := with_sha256(manifest)))
    corpus = Corpus(tmp_path / "old")
    assert corpus.fingerprint == old["sha256"] != Corpus(prepared).fingerprint
    start = window_start(3, corpus.tokens, 50, 7, old["sha256"])
    np.testing.assert_array_equal(Contiguous(corpus).sample(3, 7, 50).inputs, corpus.read(start, start + 50))


def test_empty_documents_are_skipped_and_counted(tmp_path, prepared):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text('{"text": ""}\n{"text": "  \\n"}\n{"text": "one\\r\\n", "id": "x\\ny"}\n')
    (tmp_path / "in/b.txt").write_text("zwei")
    result = prepare([tmp_path / "in"], tmp_path / "out", tokenizer=prepared / "tokenizer.model")
    assert result["empty_documents"] == 2
    assert result["manifest"]["sources"] == [
        {"name": "a.jsonl", "documents": 1, "bytes": 5},
        {"name": "b.txt", "documents": 1, "bytes": 4},
    ]
    assert str(tmp_path) not in (tmp_path / "out/manifest.json").read_text()
    assert [Corpus(tmp_path / "out").document(n)[0] for n in (0, 1)] == ["x y", "b.txt"]
    # What scores the text itself leaves out the same.
    folders = (tmp_path / "in", tmp_path / "out")
    read = [list(documents(folder, Tokenizer(prepared / "tokenizer.model"))) for folder in folders]
    assert [(i, t.tolist(), n) for i, t, n in read[0]] == [(i, t.tolist(), n) for i, t, n in read[1]]


def test_output_is_never_overwritten(jsonl, prepared, tmp_path):
    before = content(prepared)
    with pytest.raises(DataError, match="already holds prepared data"):
        prepare([jsonl], prepared, vocab_size=600)
    assert content(prepared) == before
    (tmp_path / "mine.txt").write_text("mine")
    for output in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(DataError, match="choose another --output"):
            prepare([jsonl], output, vocab_size=600)


def test_failure_leaves_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n' * 50 + "broken\n")
    for options in ({"vocab_size": 300}, {"vocab_size": 300, "workers": 2}, {"workers": 0}):
        with pytest.raises(DataError):
            prepare([tmp_path / "a.jsonl"], tmp_path / "out", **options)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_two_writers_do_not_meet(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("first")
        with pytest.raises(DataError, match="another process"), new_folder(tmp_path / "out"):
            pass
    assert content(tmp_path / "out") == {"file": b"first"}


@pytest.fixture
def large_run(start_tool, texts, prepared, tmp_path):
    """A run of prepare_data.py on two workers that is busy, and its children."""
    source = tmp_path / "large.jsonl"
    source.write_text("".join(json.dumps({"text": " ".join(texts)}) + "\n" for _ in range(300)))
    options = ["--workers", "2", "--tokenizer", prepared / "tokenizer.model", "--shard-tokens", "50000"]
    with start_tool("prepare_data.py", "--input", source, "--output", tmp_path / "out", *options) as run:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob(".out.unfinished/shard-*")):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        workers = [int(c) for c in children if b"parallel_encode" in Path(f"/proc/{c}/cmdline").read_bytes()]
        assert len(workers) == 2
        yield run, workers
        run.kill()


def gone(pids, seconds=10) -> bool:
    deadline = time.monotonic() + seconds
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_killed_run_leaves_nothing_that_opens(large_run, tmp_path, jsonl, prepared):
    run, workers = large_run
    run.kill()
    run.wait()
    assert not (tmp_path / "out").exists() and gone(workers)
    for folder in (tmp_path / "out", tmp_path / ".out.unfinished"):
        with pytest.raises(DataError):
            Corpus(folder)
    prepare([jsonl], tmp_path / "out", tokenizer=prepared / "tokenizer.model")
    assert not (tmp_path / ".out.unfinished").exists() and len(content(tmp_path / "out")) == 3


@pytest.mark.parametrize("victim", ["worker", "interrupt"])
def test_dead_worker_and_ctrl_c_end_cleanly(large_run, tmp_path, victim):
    run, workers = large_run
    if victim == "worker":
        os.kill(workers[-1], signal.SIGKILL)
    else:
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    _, errors = run.communicate(timeout=30)
    assert run.returncode == (2 if victim == "worker" else 130) and gone(workers)
    assert errors.splitlines()[-1].startswith("error: ") and "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["large.jsonl"]
