"""A small corpus of whole-ish documents and its prepared folder, made once."""

import hashlib
import json
import lzma
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lcpt.data import Corpus, prepare
from lcpt.data.manifest import MANIFEST, SCHEMA_VERSION, render, with_sha256
from lcpt.data.open_tokenizer import SENTENCEPIECE
from lcpt.data.writer import ShardWriter

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Twenty documents of the sample books, of uneven length, with curly quotes, verse and blank lines."""
    with lzma.open(ROOT / "data/sample/valid.jsonl.xz", "rb") as file:
        book = json.loads(file.readline())["text"]
    return [book[start : start + 3000 + 137 * number] for number, start in enumerate(range(0, 200_000, 10_000))]


@pytest.fixture(scope="session")
def jsonl(texts, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "books.jsonl"
    records = (json.dumps({"id": f"book-{n}", "text": text}) for n, text in enumerate(texts))
    path.write_text("\n".join(records) + "\n")
    return path


@pytest.fixture(scope="session")
def prepared(jsonl, tmp_path_factory) -> Path:
    """Several shards, vocabulary 600."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare([jsonl], folder, vocab_size=600, shard_tokens=9000)
    return folder


@pytest.fixture(scope="session")
def corpus(prepared) -> Corpus:
    return Corpus(prepared)


@pytest.fixture
def numbered_folder(tmp_path):
    """numbered_folder(lengths, shard_tokens) -> a prepared folder of documents of those lengths, called 0, 1, …

    Every token is its own place in the stream, so a sample tells where each of its tokens is from.
    """

    def make(lengths, shard_tokens=4096) -> Path:
        folder = tmp_path / f"numbered-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / SENTENCEPIECE).write_bytes(b"none")
        sha256, total = hashlib.sha256(b"none").hexdigest(), int(sum(lengths))
        writer = ShardWriter(folder, np.dtype(np.uint32), sha256, shard_tokens)
        for number, tokens in enumerate(np.split(np.arange(total), np.cumsum(lengths)[:-1])):
            writer.add(str(number), tokens, len(tokens))
        writer.close()
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "dtype": "uint32",
            "vocab_size": total,
            "bos_id": 0,
            "tokenizer_sha256": sha256,
            "fingerprint": writer.content.hexdigest(),
            "tokens": total,
            "documents": len(lengths),
            "bytes": total,
            "documents_not_exact": 0,
            "sources": [],
            "shards": writer.shards,
        }
        (folder / MANIFEST).write_bytes(render(with_sha256(manifest)))
        return folder

    return make


@pytest.fixture
def start_tool():
    """start_tool("prepare_data.py", "--input", …) -> Popen of a real process (group) with piped text output."""

    def start(tool: str, *arguments) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command,
            env=environment,
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # a suite in the background ignores it

    return start


@pytest.fixture
def run_tool(start_tool):
    """The same, run to its end -> CompletedProcess."""

    def run(*arguments) -> subprocess.CompletedProcess:
        with start_tool(*arguments) as process:
            out, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)

    return run
