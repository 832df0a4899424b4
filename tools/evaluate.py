"""Perplexity, bits per byte and loss by position of a checkpoint on whole documents.

Every token of a document is scored once. With --stride N below the context, each sees at least context - N tokens."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from lcpt.checkpoint import CheckpointError
from lcpt.checkpoint.files import replace_text
from lcpt.data import DataError, Tokenizer
from lcpt.evaluation.documents import documents
from lcpt.evaluation.memory import peak_memory_bytes
from lcpt.evaluation.perplexity import Tally, score
from lcpt.evaluation.windows import windows
from lcpt.model.pretrained import open_pretrained
from lcpt.parallel import groups

EXAMPLE = """example:
  python tools/evaluate.py --checkpoint runs/demo --data data/sample/valid.jsonl.xz \\
      --output runs/demo/evaluation.json"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN|STEP|EXPORT",
        help="a run folder, one of its steps, or what export.py wrote",
    )
    parser.add_argument("--data", required=True, metavar="FILE|DIR", help="text, or a prepared folder")
    parser.add_argument("--context", type=int, metavar="N", help="tokens a window (the context of training)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between windows (the context: disjoint ones)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="windows at a time; changes no number (1)")
    parser.add_argument("--output", required=True, metavar="OUT.json")
    args = parser.parse_args()
    try:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        report = evaluate(args.checkpoint, args.data, args.context, args.stride, args.batch)
    except (CheckpointError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    replace_text(Path(args.output), json.dumps(report, indent=2) + "\n")
    print_table(report, args.output)
    return 0


def evaluate(checkpoint: str, data: str, context: int | None, stride: int | None, batch: int) -> dict:
    trained, device = open_pretrained(checkpoint), groups.device()
    context = context or trained.context
    stride = stride or context
    if not (0 < stride <= context and batch > 0):
        raise DataError(f"stride {stride} must lie in 1 … {context} (the context), and batch {batch} be ≥ 1")
    model, tokenizer = trained.model.to(device), Tokenizer(trained.tokenizer)

    tally, began = Tally(tokenizer.token_bytes(), context), time.perf_counter()
    text_bytes = 0

    def cut_documents():
        nonlocal text_bytes
        for number, (tokens, n_bytes) in enumerate(documents(data, tokenizer)):
            text_bytes += n_bytes
            yield from windows(number, tokens, context, stride)

    with tqdm(unit="tok", unit_scale=True, desc="scoring", disable=None) as bar:
        for window, losses in score(model, cut_documents(), batch, device):
            tally.add(window, losses)
            bar.update(len(losses))
    if not tally.tokens:
        raise DataError(f"{data} holds no text to score")
    return {
        "schema_version": 1,
        "checkpoint": str(trained.folder),
        "step": trained.step,
        "data": str(data),
        **tally.report(text_bytes),
        "window": context,
        "stride": stride,
        "tokens_per_second": sum(tally.tokens) / (time.perf_counter() - began),
        "peak_memory_bytes": peak_memory_bytes(device),
        "versions": {"torch": torch.__version__},
    }


def print_table(report: dict, output: str) -> None:
    low, high = report["bits_per_byte_interval"]
    rows = {
        "checkpoint": report["checkpoint"],
        "scored": f"{report['tokens_scored']:,} tokens, {report['bytes_scored']:,} bytes",
        "window, stride": f"{report['window']:,}, {report['stride']:,}",
        "loss": f"{report['loss']:.4f} nats a token",
        "perplexity": f"{report['perplexity']:.2f} a token",
        "bits per byte": f"{report['bits_per_byte']:.4f} (95 % of resampled windows: {low:.3f} to {high:.3f})",
        "tokens a second": f"{report['tokens_per_second']:,.0f}",
        "written to": output,
    }
    for name, value in rows.items():
        print(f"{name:<18}{value}")


if __name__ == "__main__":
    sys.exit(main())
