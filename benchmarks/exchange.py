"""Measure what sharing a sequence costs a layer besides the transfer: forward and backward of a slice that goes on from
another rank's, beside the same tokens as a whole sequence. What the other rank would send is there at once.

    python benchmarks/exchange.py --output benchmarks/results/exchange-cpu.json

On a CPU a ratio of process times of one thread, on a GPU of times on the device; exit code 1 where it is above 1.1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from lcpt_kernels import feature_attention, flurka_attention, squared_attention
from lcpt_kernels.between_ranks import Exchange
from torch import Tensor

from lcpt.benchmarking.timing import time_in_turn
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.provenance import report_header

BLOCK, GOAL = 256, 1.1


class FromBefore(Exchange):
    """Has what a rank before would send, without sending it."""

    def __init__(self, start: int):
        self.start = start

    def shift(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def before(self, S: Tensor, log_decay: Tensor | None) -> Tensor:
        return S


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, default=4096, metavar="N", help=f"of a slice, a multiple of {BLOCK} (4096)"
    )
    parser.add_argument("--heads", type=int, default=2, metavar="H", help="(2)")
    parser.add_argument("--head-dim", type=int, default=64, metavar="D", help="(64)")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="timed passes of each, in turn (9)")
    parser.add_argument("--output", required=True, metavar="OUT.json")
    args = parser.parse_args()
    if args.tokens < 2 * BLOCK or args.tokens % BLOCK or min(args.heads, args.head_dim, args.repeats) < 1:
        print(f"error: --tokens is a multiple of {BLOCK}, at least {2 * BLOCK}; the others are ≥ 1", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = report_header(device) | {"tokens": args.tokens, "heads": args.heads, "rows": []}
    try:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        replace_text(Path(args.output), json.dumps(report) + "\n")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, layer in layers(args.tokens, args.heads, args.head_dim, device).items():
        times = time_in_turn(
            {"whole": lambda layer=layer: layer(None), "slice": lambda layer=layer: layer(FromBefore(args.tokens))},
            args.repeats,
            device,
        )
        whole, of_slice = (times[each]["milliseconds"]["p50"] for each in ("whole", "slice"))
        report["rows"].append({"layer": name, "ratio": of_slice / whole, **times})
        print(f"{name:12s} {of_slice / whole:.3f} of {whole:,.1f} ms")
        replace_text(Path(args.output), json.dumps(report, indent=1) + "\n")
    return int(any(row["ratio"] > GOAL for row in report["rows"]))


def layers(tokens: int, heads: int, head_dim: int, device: torch.device) -> dict:
    """Make forward and backward passes of the attention of a layer, each a function of an exchange, or of None."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def leaf(rows: int, size: int) -> Tensor:
        return torch.randn(1, rows, heads, size, device=device, dtype=dtype).requires_grad_()

    q, k, v, phi_q, phi_k = (leaf(tokens, head_dim) for _ in range(5))
    a, b, d_o = leaf(tokens, 32), leaf(tokens, 32), torch.randn_like(v)
    phi_summary, v_summary = leaf(tokens // 8, head_dim), leaf(tokens // 8, head_dim)

    def polysketch(exchange):
        o, _ = squared_attention(a, b, v, q=q, k=k, degree=4, shift=1.0, block_size=BLOCK, exchange=exchange)
        o.backward(d_o)

    def kernel(exchange):
        o, _ = feature_attention(phi_q.exp(), phi_k.exp(), v, block_size=BLOCK, exchange=exchange)
        o.backward(d_o)

    def flurka(exchange):
        far = phi_q.exp(), phi_summary.exp(), v_summary
        o, _ = flurka_attention(q, k, v, *far, summaries=BLOCK // 8, block_size=BLOCK, exchange=exchange)
        o.backward(d_o)

    return {"polysketch": polysketch, "kernel": kernel, "flurka": flurka}


if __name__ == "__main__":
    sys.exit(main())
