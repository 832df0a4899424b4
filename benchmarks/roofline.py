"""Model how long the attention kernels take at least, and how long they likely take, on a GPU that is not here.

    python benchmarks/roofline.py --report benchmarks/results/kernel-report.json \\
        --output benchmarks/results/roofline-model.json

Nothing is measured. FLOPs and bytes are counted from the kernels (lcpt/benchmarking/kernel_work.py, which tests compare
with them), instructions from their machine code (tools/kernel_report.py). `roof`: a kernel takes the larger of its
FLOPs and its bytes at the peaks that programs of others reached on an H200: 790 TFLOP/s of bf16 products, 4.3 TB/s of a
copy. `issue`: the larger of its bytes, and of the clocks in which its warps issue instructions. `likely`: something is
issued in an assumed part of the clocks, 0.55, and a launch takes 4 µs. The rival is flash attention at one of three
speeds, since none was measured either: 350 TFLOP/s forward and 300 backward, 430 and 400, 550 and 450. "polysketch" has
the norms, positions, key shift and sketches before the kernels of "squared". Sparse attention is without the sorting of
tokens into lists.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from lcpt.benchmarking import head_work, interval_work, kernel_work
from lcpt.benchmarking.interval_work import IntervalSize, intervals_of, random_marks
from lcpt.benchmarking.kernel_work import FlurkaSize, Size, Work
from lcpt.benchmarking.roofline import Gpu, issue, roof, row_of, softmax_cost
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.errors import typed_first_line
from lcpt.utils.provenance import report_header

GPU = Gpu(flops=790e12, bytes=4.3e12, launch=4e-6, multiprocessors=132, clock=1.755e9)
ISSUED = 0.55  # of the clocks
FLASH = {  # FLOP/s of softmax attention
    "350/300": {"forward": 350e12, "backward": 300e12},
    "430/400": {"forward": 430e12, "backward": 400e12},
    "550/450": {"forward": 550e12, "backward": 450e12},
}
HEADS, HEAD_DIM, TOKENS = 12, 64, 65536
SKETCH, FEATURES = 32, 64  # of squared attention, of FLuRKA
CONTEXTS = (8192, 16384, 32768, 65536)


class Method(NamedTuple):
    works: Callable[[int], dict[str, list[Work]]]  # context -> of "forward" and "backward"
    settings: dict  # of the kernel report


def block_causal(size: type[Size], features: int) -> Callable[[int], dict[str, list[Work]]]:
    def works(context: int) -> dict[str, list[Work]]:
        s = size(tokens=context, head_dim=HEAD_DIM, features=features)
        return {"forward": kernel_work.forward(s), "backward": kernel_work.backward(s)}

    return works


def polysketch(context: int) -> dict[str, list[Work]]:
    s = Size(tokens=context, head_dim=HEAD_DIM, features=SKETCH)
    return {
        "forward": head_work.forward(s, HEADS) + kernel_work.forward(s),
        "backward": kernel_work.backward(s) + head_work.backward(s, HEADS),
    }


def sparse(**marks) -> Callable[[int], dict[str, list[Work]]]:
    def works(context: int) -> dict[str, list[Work]]:
        s = IntervalSize(intervals=intervals_of(context, random_marks(context, **marks)), head_dim=HEAD_DIM)
        return {"forward": interval_work.forward(s), "backward": interval_work.backward(s)}

    return works


SQUARED = {"of": "squared", "head_dim": HEAD_DIM, "features": SKETCH}
METHODS = {
    "squared": Method(block_causal(Size, SKETCH), SQUARED),
    "polysketch": Method(polysketch, SQUARED),  # with norms, positions, key shift and sketch
    "flurka": Method(block_causal(FlurkaSize, FEATURES), {"of": "flurka", "head_dim": HEAD_DIM, "features": FEATURES}),
    "sparse, 16 buckets": Method(sparse(buckets=16), {"of": "sparse", "head_dim": HEAD_DIM}),
    "sparse, half kept": Method(sparse(kept=0.5), {"of": "sparse", "head_dim": HEAD_DIM}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", required=True, metavar="REPORT.json", help="of tools/kernel_report.py, for sm_90")
    parser.add_argument("--output", required=True, metavar="OUT.json")
    args = parser.parse_args()
    try:
        report = json.loads(Path(args.report).read_text())["rows"]
        rows = [
            row(name, context, mode, report)
            for name in METHODS
            for mode in ("forward", "forward_backward")
            for context in CONTEXTS
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(
            f"error: {args.report} is not a kernel report of these kernels: {typed_first_line(error)}", file=sys.stderr
        )
        return 2
    written = report_header(torch.device("cpu")) | {
        "device": "model of an H200",
        "assumed": {"gpu": GPU._asdict(), "issued": ISSUED, "flash_flops_per_second": FLASH},
        "rows": rows,
    }
    try:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        replace_text(Path(args.output), json.dumps(written, indent=1) + "\n")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_rows(rows)
    print(f"written to {args.output}")
    return 0


def row(name: str, context: int, mode: str, report: list[dict]) -> dict:
    works, settings = METHODS[name]
    heads = HEADS * TOKENS // context
    parts = works(context)
    if mode == "forward":
        del parts["backward"]
    kernels = [kernel(work, heads, report, work.settings or settings) for part in parts.values() for work in part]
    softmax = {"forward": softmax_cost(heads, HEAD_DIM, context, "forward")[0]}
    softmax["backward"] = softmax_cost(heads, HEAD_DIM, context, "forward_backward")[0] - softmax["forward"]
    flash = {rival: 1e3 * sum(softmax[part] / speed[part] for part in parts) for rival, speed in FLASH.items()}
    taken = {
        "roof": 1e3 * sum(roof(part, heads, GPU) for part in parts.values()),
        "issue": sum(max(k["issue_milliseconds"], k["bytes_milliseconds"]) for k in kernels),
        "likely": sum(k["likely_milliseconds"] for k in kernels),
    }
    return {
        "method": f"{name} (model)",
        "settings": settings,
        "context": context,
        "batch": TOKENS // context,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "bf16",
        "device": "model",
        "mode": mode,
        "kernels": kernels,
        "model_milliseconds": taken,
        "flash_milliseconds": flash,
        "model_speedup": {rival: x / taken["likely"] for rival, x in flash.items()},
    }


def kernel(work: Work, heads: int, report: list[dict], settings: dict) -> dict:
    """Return what the model says of one launch."""
    issued = issue(work, row_of(report, work.kernel, settings), heads, GPU) if work.programs else 0.0
    moved = heads * work.bytes / GPU.bytes
    return {
        "kernel": work.kernel,
        "programs": heads * work.programs,
        "flops_a_token_head": work.flops * heads / (TOKENS * HEADS),
        "bytes_a_token_head": work.bytes * heads / (TOKENS * HEADS),
        "issue_milliseconds": 1e3 * issued,
        "bytes_milliseconds": 1e3 * moved,
        "likely_milliseconds": 1e3 * (max(issued / ISSUED, moved) + GPU.launch),
    }


def print_rows(rows: list[dict]) -> None:
    print(f"model, nothing measured: {HEADS} heads of {HEAD_DIM}, blocks of 256, bf16, {TOKENS:,} tokens in all")
    for r in rows:
        if (r["context"], r["mode"]) == (CONTEXTS[-1], "forward_backward"):
            print(f"\n{r['method']}, {r['context']:,} tokens of context\n{'':34}   issue   bytes  likely ms")
            for k in r["kernels"]:
                times = (k[f"{name}_milliseconds"] for name in ("issue", "bytes", "likely"))
                print(f"{k['kernel']:34}{''.join(f'{x:8.3f}' for x in times)}")
    heads = "".join(f"{rival:>9}" for rival in FLASH)
    print(f"\n{'method':28}{'mode':17}{'context':>8}{'roof':>8}{'issue':>8}{'likely ms':>11}{heads}  times flash")
    for r in rows:
        taken = r["model_milliseconds"]
        print(
            f"{r['method']:28}{r['mode']:17}{r['context']:8,}{taken['roof']:8.3f}{taken['issue']:8.3f}"
            f"{taken['likely']:11.3f}{''.join(f'{speedup:9.1f}' for speedup in r['model_speedup'].values())}"
        )


if __name__ == "__main__":
    sys.exit(main())
