"""Prepare text: write a folder of token shards that pretraining reads."""

import argparse
import sys
import time

from lcpt.commands.one_line_errors import one_line_errors
from lcpt.data import prepare
from lcpt.data.manifest import MANIFEST, fingerprint_of
from lcpt.data.prepare import VOCAB_SIZE
from lcpt.data.writer import SHARD_TOKENS

EXAMPLE = """example:
  lcpt prepare --input data/sample/train.jsonl.xz --output runs/data/train --vocab-size 4096
  lcpt prepare --input data/sample/valid.jsonl.xz --output runs/data/valid \\
      --tokenizer runs/data/train/tokenizer.model

Inputs are JSON lines (.jsonl, .ndjson, .json) with a field "text" (and "id"), plain text (.txt, a file is a document),
both also packed as .gz, .bz2, .xz or .zst, and .parquet; folders of these, links in them too; and
hf:OWNER/NAME[/CONFIG][:SPLIT] on the Hugging Face hub. Hidden files, and others, are passed over and counted."""


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE|DIR|hf:NAME", help="one or more")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="of JSON and parquet records (text)")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer", metavar="FILE", help="a SentencePiece .model, or a tokenizer.json, to use")
    tokenizer.add_argument(
        "--vocab-size", type=int, default=VOCAB_SIZE, metavar="N", help=f"train one of N pieces ({VOCAB_SIZE})"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes; the output stays the same (1)")
    parser.add_argument(
        "--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N", help=f"tokens a shard, about ({SHARD_TOKENS})"
    )
    args = parser.parse_args()
    began = time.perf_counter()
    result = prepare(
        args.input,
        args.output,
        args.tokenizer,
        args.vocab_size,
        args.workers,
        args.shard_tokens,
        args.text_field,
    )
    report(args.output, result, time.perf_counter() - began)
    return 0


def report(output: str, result: dict, seconds: float) -> None:
    manifest = result["manifest"]
    rows = {
        "read": counted(manifest["read"]),
        "passed over": counted(manifest["passed_over"]),
        "documents": f"{manifest['documents']:,}",
        "empty documents skipped": f"{result['empty_documents']:,}",
        "bytes of text": f"{manifest['bytes']:,}",
        "tokens": f"{manifest['tokens']:,} ({manifest['dtype']})",
        "bytes a token": f"{manifest['bytes'] / manifest['tokens']:.3f}",
        "vocabulary": f"{manifest['vocab_size']:,}",
        "shards": f"{len(manifest['shards']):,}",
        "seconds": f"{seconds:.1f}",
        "fingerprint": fingerprint_of(manifest),
        "written to": f"{output} (these numbers: {MANIFEST})",
    }
    for name, value in rows.items():
        print(f"{name:<24}{value}")
    if result["training_fraction"] < 1:
        print(f"note: the tokenizer was trained on {result['training_fraction']:.1%} of the lines", file=sys.stderr)
    if inexact := manifest["documents_not_exact"]:
        print(f"warning: this tokenizer does not give {inexact:,} documents back exactly", file=sys.stderr)


def counted(files: dict[str, int]) -> str:
    """List counts of files by their ending: "3 .jsonl, 1 .lz4"."""
    return ", ".join(f"{count:,} {ending}" for ending, count in files.items()) or "nothing"


if __name__ == "__main__":
    sys.exit(main())
