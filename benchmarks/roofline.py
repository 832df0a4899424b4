"""Model how long squared attention takes at least, and how long it likely takes, on a GPU that is not here.

    python benchmarks/roofline.py --output benchmarks/results/roofline-model.json

Nothing is measured. FLOPs and bytes are counted from the kernels' loops (lcpt/benchmarking/roofline.py, which tests
compare with the kernels). `roof`: each kernel takes the larger of its FLOPs and its bytes at the peaks that programs of
others reached on an H200 (790 TFLOP/s of bf16 products, 4.3 TB/s of a copy). `likely`: products at an assumed part of
that peak, 0.5 forward and 0.4 backward, and 4 µs a launch. The rival is flash attention at one of three speeds, since
none was measured either: 350 TFLOP/s forward and 300 backward, 430 and 400, 550 and 450.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from lcpt.benchmarking.roofline import Gpu, Size, backward, forward, seconds, softmax_cost, squared_cost
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.provenance import report_header

ROOF = Gpu(flops=790e12, bytes=4.3e12, launch=0.0)
LIKELY = ROOF._replace(launch=4e-6)
EFFICIENCY = {"forward": 0.5, "backward": 0.4}
FLASH = {  # FLOP/s of softmax attention
    "350/300": {"forward": 350e12, "backward": 300e12},
    "430/400": {"forward": 430e12, "backward": 400e12},
    "550/450": {"forward": 550e12, "backward": 450e12},
}
HEADS, TOKENS = 12, 65536
CONTEXTS = tuple(2**n for n in range(11, 18))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sketch", type=int, default=32, metavar="r", help="(32)")
    parser.add_argument("--block-size", type=int, default=256, metavar="c", help="(256)")
    parser.add_argument("--head-dim", type=int, default=64, metavar="D", help="(64)")
    parser.add_argument("--output", required=True, metavar="OUT.json")
    args = parser.parse_args()
    if min(args.sketch, args.block_size, args.head_dim) < 1:
        print("error: --sketch, --block-size and --head-dim must be ≥ 1", file=sys.stderr)
        return 2
    rows = [
        row(context, mode, Size(tokens=context, head_dim=args.head_dim, sketch=args.sketch, block_size=args.block_size))
        for mode in ("forward", "forward_backward")
        for context in CONTEXTS
    ]
    report = report_header(torch.device("cpu")) | {
        "device": "model of an H200",
        "assumed": {
            "peaks": ROOF._asdict(),
            "launch_seconds": LIKELY.launch,
            "efficiency": EFFICIENCY,
            "flash_flops_per_second": FLASH,
        },
        "rows": rows,
    }
    try:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        replace_text(Path(args.output), json.dumps(report, indent=1) + "\n")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"model, nothing measured: H = {HEADS}, D = {args.head_dim}, r = {args.sketch}, c = {args.block_size}, bf16, "
        f"{TOKENS:,} tokens and at least one sequence"
    )
    print(
        f"{'context':>8} {'mode':17}{'kFLOP':>7}{'bytes':>7}{'roof ms':>9}{'likely ms':>11}"
        f"{''.join(f'{name:>9}' for name in FLASH)}  likely: times as fast as flash at so many TFLOP/s"
    )
    for r in rows:
        print(
            f"{r['context']:8,} {r['mode']:17}{r['flops_a_token_head'] / 1e3:7.0f}{r['bytes_a_token_head']:7.0f}"
            f"{r['model_milliseconds']['roof']:9.3f}{r['model_milliseconds']['likely']:11.3f}"
            f"{''.join(f'{speedup:9.1f}' for speedup in r['model_speedup']['likely'].values())}"
        )
    print(f"written to {args.output}")
    return 0


def row(context: int, mode: str, size: Size) -> dict:
    batch = max(1, TOKENS // context)
    heads = batch * HEADS
    parts = {"forward": forward(size)} | ({"backward": backward(size)} if mode == "forward_backward" else {})
    softmax = {"forward": softmax_cost(heads, size.head_dim, context, "forward")[0]}
    softmax["backward"] = softmax_cost(heads, size.head_dim, context, "forward_backward")[0] - softmax["forward"]
    flash = {name: sum(softmax[part] / speed[part] for part in parts) for name, speed in FLASH.items()}
    taken = {
        "roof": sum(seconds(kernels, heads, ROOF, 1.0) for kernels in parts.values()),
        "likely": sum(seconds(kernels, heads, LIKELY, EFFICIENCY[part]) for part, kernels in parts.items()),
    }
    flops, n_bytes = squared_cost(1, size, mode)
    return {
        "method": "squared (model)",
        "settings": {name: value for name, value in asdict(size).items() if name != "dtype"} | {"type": "bf16"},
        "context": context,
        "batch": batch,
        "heads": HEADS,
        "head_dim": size.head_dim,
        "dtype": "bf16",
        "device": "model",
        "mode": mode,
        "flops_a_token_head": flops / context,
        "bytes_a_token_head": n_bytes / context,
        "model_milliseconds": {name: 1e3 * x for name, x in taken.items()},
        "flash_milliseconds": {name: 1e3 * x for name, x in flash.items()},
        "model_speedup": {name: {rival: x / ours for rival, x in flash.items()} for name, ours in taken.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
