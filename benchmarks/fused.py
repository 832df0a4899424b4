"""Measure what fusing gains around the attention kernels: the cross-entropy of the head, the norms of the residual
stream, gated activations, LayerNorm and rotary positions of heads, the learned sketch, feature maps, the pooling of
blocks; each in Triton beside the same in PyTorch. The cross-entropy is that of one sequence, in PyTorch both in chunks
and from all logits.

    python benchmarks/fused.py --output benchmarks/results/fused.json

Anywhere: the bytes that PyTorch's operators move, each operator's tensors once. On a GPU also, after each kernel has
shown that it is right (output and every gradient against float64, the same bits twice): times, in turn, of PyTorch as
it comes, of torch.compile (--compiled: it takes its time), and of the kernels. Exit code 1 where one is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from lcpt.benchmarking.attention_benchmark import MODES
from lcpt.benchmarking.attention_layer import Layer
from lcpt.benchmarking.fused_steps import Step, check, steps
from lcpt.benchmarking.kernel_cases import DTYPES
from lcpt.benchmarking.tables import number
from lcpt.benchmarking.timing import first_passes, time_in_turn
from lcpt.benchmarking.traffic import traffic
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.errors import typed_first_line
from lcpt.utils.progress import progress_bar
from lcpt.utils.provenance import report_header


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, metavar="N", help="in sequences of 8,192 (65536)")
    parser.add_argument("--heads", type=int, default=12, metavar="H", help="(12)")
    parser.add_argument("--head-dim", type=int, default=64, metavar="D", help="(64)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timed passes of each, in turn (20)")
    parser.add_argument("--compiled", default="", metavar="A,B", help="steps that torch.compile has a try at too")
    parser.add_argument("--only", default="", metavar="TEXT", help="steps whose names have it")
    parser.add_argument("--output", required=True, metavar="OUT.json")
    args = parser.parse_args()
    if args.tokens % 8192 or min(args.tokens, args.heads, args.head_dim, args.repeats) < 1 or args.head_dim % 2:
        print("error: --tokens is a multiple of 8192, --head-dim even, --heads and --repeats ≥ 1", file=sys.stderr)
        return 2
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "meta")
    layer = Layer(
        batch=args.tokens // 8192, heads=args.heads, head_dim=args.head_dim, dtype=DTYPES[args.dtype], device=device
    )
    torch.manual_seed(0)
    chosen = {name: step for name, step in steps(layer, 8192).items() if args.only in name}
    if not chosen:
        print(f"error: no step has {args.only!r} in its name", file=sys.stderr)
        return 2
    report = report_header(device if on_gpu else torch.device("cpu")) | {"wrong": {}, "rows": []}

    def write() -> None:
        replace_text(Path(args.output), json.dumps(report, indent=1) + "\n")

    try:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, step in progress_bar(chosen.items(), unit="step"):
        if on_gpu:
            try:
                check(step)
            except Exception as error:  # a compiler's or a GPU's; the others are still worth knowing
                report["wrong"][name] = typed_first_line(error)
                write()
                continue
        for row in rows(name, step, layer, args):
            report["rows"].append(row)
            write()
    print(table(report["rows"]))
    for name, reason in report["wrong"].items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    print(f"written to {args.output}" + ("" if on_gpu else "; bytes are counted, no GPU is here to take times"))
    return 1 if report["wrong"] else 0


def rows(name: str, step: Step, layer: Layer, args: argparse.Namespace) -> Iterator[dict]:
    """Yield a row for each backend and mode: the bytes it moves, and on a GPU its time."""
    functions = {backend: partial(step.function, backend=backend) for backend in ("torch", "triton")}
    moved = {backend: traffic(function, step.inputs) for backend, function in functions.items()}
    if layer.device.type == "cuda" and name in args.compiled.split(","):
        functions["compiled"] = torch.compile(functions["torch"], dynamic=False)
    for mode in MODES:
        figures = times(functions, step, mode, layer, args) if layer.device.type == "cuda" else {}
        medians = {backend: figure["milliseconds"]["p50"] for backend, figure in figures.items()}
        for backend in functions:
            if backend in moved or backend in figures:
                figure = figures.get(backend, {"milliseconds": None})
                yield {
                    "method": name,
                    "settings": {},
                    "context": 8192,
                    "batch": step.inputs[0].shape[0],
                    "heads": layer.heads,
                    "head_dim": layer.head_dim,
                    "dtype": args.dtype,
                    "device": layer.device.type,
                    "backend": backend,
                    "mode": mode,
                    **moved.get(backend, {}).get(mode, {}),
                    **figure,
                    "speedup": {
                        other: medians[other] / medians[backend]
                        for other in medians
                        if other != backend and backend in medians
                    },
                }


def times(functions: dict, step: Step, mode: str, layer: Layer, args: argparse.Namespace) -> dict[str, dict]:
    wanted = [x for x in step.inputs if x.requires_grad]
    given = [torch.randn_like(x) for x in step.function(*step.inputs, backend="torch") if x is not None]

    def forward(function: Callable) -> None:
        with torch.no_grad():
            function(*step.inputs)

    def forward_backward(function: Callable) -> None:
        torch.autograd.grad([x for x in function(*step.inputs) if x is not None], wanted, given)

    passes = {
        backend: partial(forward if mode == "forward" else forward_backward, function)
        for backend, function in functions.items()
    }
    for backend, reason in first_passes(passes, layer.device).items():
        tqdm.write(f"left out: {backend}: {reason}", file=sys.stderr)
        del passes[backend]
    return time_in_turn(passes, args.repeats, layer.device, budget=0.5)


def table(rows: list[dict]) -> str:
    """Format a line for each step and mode."""
    lines = [
        f"{'step':28}{'mode':18}{'MB, PyTorch':>13}{'Triton':>9}{'operators':>11}{'':>4}{'ms, PyTorch':>13}"
        f"{'compiled':>10}{'Triton':>9}"
    ]
    by_line = {}
    for row in rows:
        by_line.setdefault((row["method"], row["mode"]), {})[row["backend"]] = row
    for (name, mode), of in by_line.items():
        taken = [of.get(backend, {}).get("milliseconds") for backend in ("torch", "compiled", "triton")]
        taken = [number(x["p50"]) if x else "-" for x in taken]
        lines.append(
            f"{name:28}{mode:18}{of['torch']['bytes'] / 1e6:13.0f}{of['triton']['bytes'] / 1e6:9.0f}"
            f"{of['torch']['operators']:11}{of['triton']['operators']:4}{taken[0]:>13}{taken[1]:>10}{taken[2]:>9}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
