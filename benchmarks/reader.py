"""Measure how fast one rank reads training data, and with --scale what it costs to open a trillion tokens.

    python benchmarks/reader.py --output benchmarks/results/reader-cpu.json --scale

Folders of random tokens, written for it: documents of 21 tokens, of log-normal length about a mean of 500, and of
100,000. Each way to read makes whole micro-batches from sample 0 on, in CPU seconds of the process; `share` is the part
of each step's sequences that is this rank's, since a rank packs for all of them. `memmap` copies windows out of the
file and does nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from lcpt.data import Contiguous, Corpus, DataConfig, SampleSource, SourceConfig, open_text, rows
from lcpt.data.best_fit import BestFit
from lcpt.data.manifest import MANIFEST, SCHEMA_VERSION, render, with_sha256
from lcpt.data.open_tokenizer import SENTENCEPIECE
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.provenance import report_header

CONTEXT, SEQUENCES = 8192, 8  # of a rank's step
TOKENIZER_CONTENT = b"none"
LENGTHS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "21": lambda draw, tokens: np.full(tokens // 21, 21),
    "500 log-normal": lambda draw, tokens: draw.lognormal(np.log(500) - 0.5, 1.0, tokens // 500).astype(np.int64) + 1,
    "100,000": lambda draw, tokens: np.full(max(1, tokens // 100_000), 100_000),
}
READERS: dict[str, dict] = {
    "contiguous, not masked": {"mask_documents": False},
    "contiguous": {},
    "best_fit": {"packing": "best_fit"},
}
SCALE = {"shards": 14_902, "tokens": 64 * 2**20, "documents": 6711}  # 10^12 tokens and 10^8 documents in all


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="OUT.json")
    parser.add_argument("--tokens", type=float, default=40e6, metavar="N", help="of a folder (40e6)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="the fastest counts (3)")
    parser.add_argument("--scale", action="store_true", help="also open 10^12 tokens, in sparse files")
    parser.add_argument("--open", metavar="DIR", help=argparse.SUPPRESS)  # what --scale starts
    parser.add_argument("--packing", default="contiguous", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        print(json.dumps(open_and_read(args.open, args.packing)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = list(measure(Path(folder), int(args.tokens), args.repeats))
        if args.scale:
            found += scale(Path(folder) / "scale")
    report = {**report_header(torch.device("cpu")), "rows": found}
    replace_text(Path(args.output), json.dumps(report, indent=1) + "\n")
    return 0


def measure(folder: Path, tokens: int, repeats: int) -> Iterator[dict]:
    """Yield and print a row a way to read."""
    draw = np.random.default_rng(0)
    print(f"{'documents':16}{'method':26}{'sources':>8}{'share':>8}{'M tokens/s':>12}{'padding':>10}{'cut':>9}")
    for name, lengths in LENGTHS.items():
        paths = [write_folder(folder / f"{name}-{n}", lengths(draw, tokens), draw) for n in range(3)]
        settings = {"documents": name, "context": CONTEXT, "tokens": tokens, "micro_batch": 1}
        yield shown({"method": "memmap", "settings": settings, "sources": 1, "share": 1, **bare(paths[0], repeats)})
        for method, options in READERS.items():
            for sources, share in ((1, 1), (3, 1), (1, 64)):
                read = best_of(repeats, partial(timed, paths[:sources], options, tokens, share))
                cut = cut_fraction(paths[0]) if method == "best_fit" else None
                row = {"method": method, "settings": settings, "sources": sources, "share": 1 / share, **read}
                yield shown({**row, "cut_fraction": cut})


def shown(row: dict) -> dict:
    speed, padding, cut = row["tokens_per_second"] / 1e6, row.get("padding_fraction"), row.get("cut_fraction")
    print(
        f"{row['settings']['documents']:16}{row['method']:26}{row['sources']:8}{row['share']:8.4g}{speed:12.1f}"
        f"{'-' if padding is None else format(padding, '.2%'):>10}{'-' if cut is None else format(cut, '.3%'):>9}",
        flush=True,
    )
    return row


def open_paths(paths: list[Path], options: dict) -> SampleSource:
    """Open one folder, or a mixture of three in parts of 0.5, 0.3 and 0.2."""
    sources = [SourceConfig(str(path), weight) for path, weight in zip(paths, (0.5, 0.3, 0.2), strict=False)]
    chosen = {"path": str(paths[0])} if len(paths) == 1 else {"path": None, "sources": sources}
    data = DataConfig(**chosen, context=CONTEXT, **options)  # type: ignore[arg-type]
    return open_text(data, lambda path: Corpus(path, hash_shards=False))


def timed(paths: list[Path], options: dict, tokens: int, ranks: int) -> dict:
    """Read what one of so many ranks reads while all of them read `tokens`, from a source just opened."""
    source, step = open_paths(paths, options), ranks * SEQUENCES
    firsts = range(0, max(1, tokens // CONTEXT // step) * step, step)
    padding, began = 0, time.process_time()
    for first in firsts:
        padding += rows(source, 0, first, SEQUENCES, CONTEXT).padding
    seconds, read = time.process_time() - began, len(firsts) * SEQUENCES * CONTEXT
    return {"tokens_per_second": read / seconds, "padding_fraction": padding / read}


def bare(path: Path, repeats: int) -> dict:
    """Copy windows in random order, twice each: inputs and labels."""
    tokens = Corpus(path, hash_shards=False)._shard(0)["tokens"]
    starts = np.random.default_rng(0).permutation((len(tokens) - 1) // CONTEXT) * CONTEXT

    def read() -> dict:
        began = time.process_time()
        for start in starts:
            for shift in (0, 1):
                tokens[start + shift : start + shift + CONTEXT].astype(np.int64)
        return {"tokens_per_second": len(starts) * CONTEXT / (time.process_time() - began)}

    return best_of(repeats, read)


def best_of(repeats: int, read: Callable[[], dict]) -> dict:
    return max((read() for _ in range(repeats)), key=lambda found: found["tokens_per_second"])


def cut_fraction(path: Path) -> float | None:
    """Count the documents no longer than the context that best_fit cuts in an epoch, as a part of them."""
    source = BestFit(Corpus(path, hash_shards=False))
    lengths = source.corpus.document_lengths()
    if not (short := lengths <= CONTEXT).any():
        return None
    begins, whole = np.cumsum(lengths) - lengths, 0
    for region in range(source.shape(CONTEXT)[0]):
        parts = source.pack(region, CONTEXT, short_first=False).parts
        document = np.searchsorted(begins, parts.starts, side="right") - 1
        whole += int((short[document] & (parts.lengths == lengths[document])).sum())
    return 1 - whole / int(short.sum())


def write_folder(folder: Path, lengths: np.ndarray, draw: np.random.Generator) -> Path:
    """Write a prepared folder of one shard, of random tokens in documents of those lengths."""
    folder.mkdir()
    tensors = {
        "tokens": draw.integers(0, 32_000, lengths.sum(), dtype=np.uint16),
        "offsets": np.cumsum([0, *lengths], dtype=np.int64),
        "bytes": 4 * lengths.astype(np.int64),
        "ids": np.frombuffer(b"\n".join(b"%d" % n for n in range(len(lengths))), dtype=np.uint8),
    }
    content = save(tensors, metadata={"tokenizer_sha256": hashlib.sha256(TOKENIZER_CONTENT).hexdigest()})
    (folder / "shard-00000.safetensors").write_bytes(content)
    shard = {
        "file": "shard-00000.safetensors",
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "tokens": int(lengths.sum()),
        "documents": len(lengths),
        "bytes": int(4 * lengths.sum()),
    }
    write_manifest(folder, [shard])
    return folder


def write_manifest(folder: Path, shards: list[dict]) -> None:
    (folder / SENTENCEPIECE).write_bytes(TOKENIZER_CONTENT)
    totals = {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents", "bytes")}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "dtype": "uint16",
        "vocab_size": 32_000,
        "bos_id": 1,
        "tokenizer_sha256": hashlib.sha256(TOKENIZER_CONTENT).hexdigest(),
        "fingerprint": hashlib.sha256(json.dumps(shards).encode()).hexdigest(),
        **totals,
        "documents_not_exact": 0,
        "sources": [],
        "shards": shards,
    }
    (folder / MANIFEST).write_bytes(render(with_sha256(manifest)))


def scale(folder: Path) -> list[dict]:
    """Open 10^12 tokens and make the first batch, each way in a process of its own."""
    write_sparse(folder)
    found = []
    for packing in ("contiguous", "best_fit"):
        command = [sys.executable, __file__, "--output", "-", "--open", str(folder), "--packing", packing]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found.append({"method": f"open, {packing}", "settings": {**SCALE, "context": CONTEXT}, **row})
        seconds = f"opening {row['open_seconds']:.2f}, the first batch {row['batch_seconds']:.3f} CPU seconds"
        print(f"10^12 tokens, {packing}: {seconds}, {row['memory_bytes'] / 1e6:.0f} MB")
    return found


def write_sparse(folder: Path) -> None:
    """Write a folder of many shards, which are one sparse file under as many names: all of its tokens are 0."""
    folder.mkdir()
    n, documents = SCALE["tokens"], SCALE["documents"]
    offsets = np.linspace(0, n, documents + 1).astype(np.int64)
    shapes = [("offsets", "I64", documents + 1, 8), ("bytes", "I64", documents, 8), ("tokens", "U16", n, 2)]
    shapes += [("ids", "U8", 2 * documents - 1, 1)]
    header: dict[str, dict] = {"__metadata__": {"tokenizer_sha256": hashlib.sha256(TOKENIZER_CONTENT).hexdigest()}}
    end = 0
    for name, dtype, length, width in shapes:
        header[name] = {"dtype": dtype, "shape": [length], "data_offsets": [end, end + length * width]}
        end += length * width
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    size, shards = 8 + len(encoded) + end, []
    for number in range(SCALE["shards"]):
        path = folder / f"shard-{number:05d}.safetensors"
        if number % 10_000:  # a file has only so many names
            os.link(folder / f"shard-{number // 10_000 * 10_000:05d}.safetensors", path)
        else:
            with open(path, "wb") as file:
                file.write(len(encoded).to_bytes(8, "little") + encoded + offsets.tobytes())
                file.truncate(size)
        counts = {"tokens": n, "documents": documents, "bytes": 4 * n}
        shards.append({"file": path.name, "size_bytes": size, "sha256": f"{number:064x}", **counts})
    write_manifest(folder, shards)


def open_and_read(folder: str, packing: str) -> dict:
    """Open a folder and make a batch of SEQUENCES: CPU seconds of both, and the memory that they took at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = memory("VmRSS"), time.process_time()
    corpus = Corpus(folder, hash_shards=True)  # the folder is too large for it
    source = BestFit(corpus) if packing == "best_fit" else Contiguous(corpus)
    source.check_context(CONTEXT)
    opened = time.process_time()
    rows(source, 0, 0, SEQUENCES, CONTEXT)
    done = time.process_time()
    return {
        "open_seconds": opened - began,
        "batch_seconds": done - opened,
        "memory_bytes": memory("VmHWM") - before,
        "tokens": corpus.tokens,
        "documents": len(corpus),
    }


def memory(name: str) -> int:
    """Read bytes of this process: VmRSS, now, or VmHWM, at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


if __name__ == "__main__":
    sys.exit(main())
