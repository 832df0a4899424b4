"""Measure what one long document takes: to score it with carried state, and to go on writing after it.

    python benchmarks/long_document.py --output benchmarks/results/long-document-cpu.json

Of scoring: the peak bytes of live tensors above the weights, beside the bytes of all keys and values that the softmax
layers hold at its end, and process seconds. Of writing: process milliseconds a token, the median of repeated tokens,
after the document. The model has random weights: neither depends on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from lcpt.attention import AttentionConfig
from lcpt.attention.polysketch import PolysketchConfig
from lcpt.benchmarking.live_bytes import LiveBytes
from lcpt.evaluation.scoring import score_with_carried_state
from lcpt.evaluation.windows import windows
from lcpt.model import GPT, ModelConfig
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.provenance import report_header

LAYERS = {
    "softmax": ["softmax"],
    "hybrid": ["polysketch", "polysketch", "polysketch", "softmax"],
    "polysketch": ["polysketch"],
}
LONGEST_BOOK = 463_826  # tokens, of those that lcpt is tried on
CPU = torch.device("cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=["hybrid", "polysketch"], help="(the last two)")
    parser.add_argument("--tokens", nargs="+", type=int, default=[4, 8192, 32_768, LONGEST_BOOK], metavar="N")
    parser.add_argument("--piece", type=int, default=2048, metavar="N", help="tokens that are read at a time (2,048)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="tokens that are written (20)")
    parser.add_argument("--output", required=True, metavar="OUT.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    header, rows = report_header(CPU) | {"piece": args.piece}, []
    print(f"{'layers':<12}{'tokens':>9}{'peak MB':>10}{'keys MB':>10}{'ratio':>7}{'seconds':>9}{'ms a token':>12}")
    for layers in args.layers:
        for tokens in args.tokens:
            row = measure(layers, tokens, args.piece, args.repeats)
            rows.append(row)
            ratio = row["peak_bytes"] / row["key_bytes"] if row["key_bytes"] else None
            print(
                f"{layers:<12}{tokens:9,}{row['peak_bytes'] / 1e6:10.1f}{row['key_bytes'] / 1e6:10.1f}"
                f"{'-' if ratio is None else f'{ratio:.2f}':>7}{row['seconds']:9.1f}"
                f"{row['milliseconds_a_token']:12.2f}",
                flush=True,
            )
            replace_text(Path(args.output), json.dumps(header | {"rows": rows}, indent=1) + "\n")
    return 0


def measure(layers: str, tokens: int, piece: int, repeats: int) -> dict:
    attention = AttentionConfig(pattern=LAYERS[layers], block_size=256, polysketch=PolysketchConfig(size=16))
    config = ModelConfig(n_layers=4, d_model=128, n_heads=2, vocab_size=1024, attention=attention)
    torch.manual_seed(0)
    model = GPT(config).eval()
    document = np.random.default_rng(0).integers(config.vocab_size, size=tokens + 1)
    began = time.process_time()
    with LiveBytes() as live:
        for _ in score_with_carried_state(model, windows(0, document, tokens, tokens), 1, piece, CPU):
            pass
    seconds = time.process_time() - began
    return {
        "layers": layers,
        "tokens": tokens,
        "n_layers": config.n_layers,
        "d_model": config.d_model,
        "n_heads": config.n_heads,
        "peak_bytes": live.peak,
        "key_bytes": 4 * 2 * config.d_model * tokens * config.kinds.count("softmax"),
        "seconds": seconds,
        "milliseconds_a_token": milliseconds_a_token(model, torch.from_numpy(document[None]), piece, repeats),
    }


def milliseconds_a_token(model: GPT, tokens: torch.Tensor, piece: int, repeats: int) -> float:
    cache = None
    for part in tokens.split(piece, dim=1):
        _, cache = model.prefill(part, cache, last_only=True)
    spent = []
    for _ in range(repeats):
        began = time.process_time()
        _, cache = model.decode(tokens[:, 0], cache)
        spent.append(1e3 * (time.process_time() - began))
    return statistics.median(spent)


if __name__ == "__main__":
    sys.exit(main())
