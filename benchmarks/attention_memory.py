"""Count the memory of an attention layer on a GPU's path, forward and backward: the most bytes at a time beyond input
and weights, beside those of the same layer with softmax.

    python benchmarks/attention_memory.py --output benchmarks/results/attention-memory.json

Nothing is timed, and no GPU is needed: the layer runs on the CPU with the Triton backend, whose kernels are not
started. Softmax runs there in PyTorch's flash attention, which at 32,768 tokens takes a few minutes. On a GPU
FlashAttention-2 allocates one thing more in its backward pass, an fp32 sum of dq: `times_softmax` is without it,
`times_flash_2` with it.
"""

from __future__ import annotations

import argparse
import json
import sys
from copy import deepcopy
from pathlib import Path

import torch

from lcpt.attention import build_attention, rotary_table
from lcpt.benchmarking.allocated_bytes import kernels_left_out, most_allocated_bytes
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.provenance import report_header

# Softmax first: the others are compared with it.
KINDS = ("softmax", "polysketch", "flurka", "kernel", "feedforward", "fastmax", "lowrank", "sparse_qk", "sparse_hash")
FP32_BYTES = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", nargs="+", type=int, default=[8192, 32768], metavar="T", help="(8192 32768)")
    parser.add_argument("--heads", type=int, default=12, metavar="H", help="(12)")
    parser.add_argument("--head-dim", type=int, default=64, metavar="D", help="(64)")
    parser.add_argument("--output", required=True, metavar="OUT.json")
    args = parser.parse_args()
    if min(*args.contexts, args.heads, args.head_dim) < 1 or args.head_dim % 2:
        print("error: --contexts and --heads are ≥ 1, --head-dim is even", file=sys.stderr)
        return 2
    rows: list[dict] = []

    def write() -> None:
        report = report_header(torch.device("cpu")) | {"rows": rows}
        replace_text(Path(args.output), json.dumps(report, indent=1) + "\n")

    try:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"one layer, {args.heads} heads of {args.head_dim}, one sequence, bf16, forward + backward")
    print(f"{'context':>8} {'kind':13}{'peak MB':>9}{'times softmax':>15}{'times FlashAttention-2':>24}")
    for context in args.contexts:
        for kind in KINDS:
            row = row_of(kind, context, args.heads, args.head_dim, rows)
            rows.append(row)
            print(
                f"{context:8,} {kind:13}{row['peak_bytes'] / 1e6:9.1f}{row['times_softmax']:15.2f}"
                f"{row['times_flash_2']:24.2f}",
                flush=True,
            )
            write()
    return 0


def row_of(kind: str, context: int, heads: int, head_dim: int, before: list[dict]) -> dict:
    """Count a kind, and compare it with the row of softmax at this context, which is itself or in `before`."""
    peak = peak_bytes(kind, context, heads, head_dim)
    softmax = next((row["peak_bytes"] for row in before if row["context"] == context), peak)
    flash_2 = softmax + FP32_BYTES * context * heads * head_dim
    return {
        "kind": kind,
        "context": context,
        "heads": heads,
        "head_dim": head_dim,
        "dtype": "bf16",
        "mode": "forward_backward",
        "peak_bytes": peak,
        "times_softmax": peak / softmax,
        "times_flash_2": (flash_2 if kind == "softmax" else peak) / flash_2,
    }


def peak_bytes(kind: str, context: int, heads: int, head_dim: int) -> int:
    """Count the most bytes that a layer of this kind holds, with the gradients of its input and its weights."""
    width = heads * head_dim
    layer = build_attention(kind, width, heads).bfloat16()
    rotary = rotary_table(torch.arange(context), head_dim, 10_000.0)
    x, do = torch.zeros(2, 1, context, width, dtype=torch.bfloat16).unbind()
    inputs = [x.requires_grad_(), *layer.parameters()]

    def forward_backward() -> None:
        torch.autograd.grad(layer(x, rotary), inputs, do, allow_unused=True)

    with kernels_left_out():
        if context > (few := 512):  # what is kept from the first call on, such as tables
            deepcopy(layer)(x[:, :few], tuple(table[:few] for table in rotary)).sum().backward()
        return most_allocated_bytes(forward_backward)


if __name__ == "__main__":
    sys.exit(main())
