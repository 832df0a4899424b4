"""Measure time and memory of attention alone, method beside method in one run.

A kind of attention is timed as the model runs it: sketch, feature maps, pooling and gate are inside. "squared" is
polysketch's kernel on sketches that are given. Before it is timed, each method is compared with its definition: one
that is wrong is named and left out, and the exit code is 1. A baseline that this machine does not have is left out too.
Without a GPU it is the CPU time of one thread, which the other users of a shared machine disturb least.

Contexts are measured in the order given, all in the first mode, then in the next. OUT.json, and OUT.md, the same as a
table, are written anew after each; OUT.png, times over contexts, at the end, where matplotlib is installed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import cast

import torch

from lcpt.attention import AttentionConfig
from lcpt.benchmarking.attention_benchmark import DTYPES, MODES, WrongResult, check, measure
from lcpt.benchmarking.attention_layer import Layer, Method
from lcpt.benchmarking.attention_methods import baselines, known, methods
from lcpt.benchmarking.peaks import measured_peaks
from lcpt.benchmarking.tables import short_table, table
from lcpt.commands.arguments import check_output, check_ranges, whole_numbers, words
from lcpt.commands.one_line_errors import one_line_errors
from lcpt.parallel import groups
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.errors import first_line, typed_first_line
from lcpt.utils.progress import progress_bar
from lcpt.utils.provenance import report_header

EXAMPLE = """example:
  lcpt benchmark attention --methods polysketch,flurka,softmax --contexts 8192,16384 --output attention.json
  lcpt benchmark attention --methods squared,sdpa_cpu --contexts 16384 --device cpu --dtype bf16 \\
      --mode forward_backward --set polysketch.size=32 block_size=256 --output squared.json
  lcpt benchmark attention --methods polysketch,squared --contexts 8192,32768 --tokens 65536 --heads 12 \\
      --dtype bf16 --output gpu.json"""


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods",
        required=True,
        nargs="+",
        metavar="A,B",
        help=f"{', '.join(known(groups.device()))}; where no baseline is named, all are timed too",
    )
    parser.add_argument("--contexts", nargs="+", required=True, metavar="N,N", help="tokens a sequence")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=groups.device().type)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--mode", nargs="+", default=list(MODES), metavar="A,B", help=f"({','.join(MODES)})")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (1)")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="in all sequences together, in place of --batch; at least one sequence"
    )
    parser.add_argument("--heads", type=int, default=4, metavar="H", help="(4)")
    parser.add_argument("--head-dim", type=int, default=64, metavar="D", help="(64)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed passes of each, in turn (5)")
    parser.add_argument(
        "--budget",
        type=float,
        default=60,
        metavar="SECONDS",
        help="after which a method is not repeated at this context, but timed once (60)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="other than the defaults of model.attention: polysketch.size=16 block_size=512",
    )
    parser.add_argument("--output", required=True, metavar="OUT.json")
    args = parser.parse_args()
    contexts, modes, layer, chosen, left_out = read_arguments(args)
    check_output(args.output, ".md", ".png")
    wrong = benchmark(args, contexts, modes, layer, chosen, left_out)
    return 1 if wrong else 0


def read_arguments(args: argparse.Namespace) -> tuple[list[int], list[str], Layer, dict[str, Method], dict[str, str]]:
    """Read contexts, modes, layer, methods by name, and baselines that are not installed. ValueError in one line."""
    contexts, modes = whole_numbers("contexts", args.contexts), words(args.mode)
    if not set(modes) <= set(MODES):
        raise ValueError(f"--mode {','.join(modes)} is neither {' nor '.join(MODES)}, nor both")
    check_ranges(args, dict.fromkeys(("batch", "heads", "head_dim", "repeats", "tokens"), 1) | {"budget": 0})
    if args.head_dim % 2:
        raise ValueError(f"--head-dim {args.head_dim} must be even, for rotary positions")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here; take cpu")
    device = groups.device() if args.device == "cuda" else torch.device("cpu")
    layer = Layer(batch=args.batch, heads=args.heads, head_dim=args.head_dim, dtype=DTYPES[args.dtype], device=device)
    names = list(dict.fromkeys(words(args.methods)))
    if not set(names) & baselines(device).keys():
        names += baselines(device)
    torch.manual_seed(0)
    return contexts, modes, layer, *methods(names, read_config(args.set), layer)


def read_config(settings: list[str]) -> AttentionConfig:
    if not settings:
        return AttentionConfig()
    from omegaconf import OmegaConf  # a GPU's image may lack it, and defaults need none
    from omegaconf.errors import OmegaConfBaseException

    try:
        given = OmegaConf.from_dotlist(settings)
        return cast(AttentionConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(AttentionConfig), given)))
    except OmegaConfBaseException as error:
        raise ValueError(f"--set {' '.join(settings)}: {first_line(error)}") from error


def benchmark(
    args: argparse.Namespace,
    contexts: list[int],
    modes: list[str],
    layer: Layer,
    chosen: dict[str, Method],
    left_out: dict[str, str],
) -> bool:
    """Check, measure and write; returns whether a method that is no baseline was left out."""
    reasons = [{"method": name, "reason": reason} for name, reason in left_out.items()]
    bar = progress_bar(total=len(chosen) * (1 + len(contexts) * len(modes) * (args.repeats + 1)), unit="pass")

    def progress(name: str) -> None:
        bar.set_description(name)
        bar.update()

    def leave_out(name: str, reason: str, **where) -> None:
        bar.write(f"left out: {name}: {reason}", file=sys.stderr)
        reasons.append({"method": name, "reason": reason} | where)

    with bar:
        for name, reason in left_out.items():
            bar.write(f"left out: {name}: {reason}", file=sys.stderr)
        backends = checked(chosen, layer, progress, leave_out)
        right = {name: chosen[name] for name in backends}
        peaks = measured_peaks(layer.device) if layer.device.type == "cuda" else None
        report = report_header(layer.device) | {"measured_peaks": peaks, "left_out": reasons, "rows": []}
        for mode, context in product(modes, contexts):
            batch = layer.batch if args.tokens is None else max(1, args.tokens // context)
            rows, failed = measure(
                right,
                backends,
                replace(layer, batch=batch),
                context,
                mode,
                repeats=args.repeats,
                budget=args.budget,
                peaks=peaks,
                progress=progress,
            )
            for name, reason in failed.items():
                leave_out(name, reason, context=context, mode=mode)
            report["rows"] = sorted(
                report["rows"] + rows, key=lambda row: (contexts.index(row["context"]), MODES.index(row["mode"]))
            )
            write(report, Path(args.output))
    print(
        f"{short_table(report['rows'])}\npeak: beyond a pass's inputs\n"
        f"written to {args.output}, .md{' and .png' if draw(report, Path(args.output)) else ''}"
    )
    return any(reason["method"] not in baselines(layer.device) for reason in reasons)


def checked(
    chosen: dict[str, Method], layer: Layer, progress: Callable[[str], None], leave_out: Callable[[str, str], None]
) -> dict[str, str]:
    """Check the methods; returns those that are right, each with the backend that computes it."""
    block = max(method.settings.get("block_size", 1) for method in chosen.values())
    window = max(method.settings.get("window") or 0 for method in chosen.values())
    backends = {}
    for name, method in chosen.items():
        progress(name)
        try:
            backends[name] = check(name, method, layer, tokens=max(3 * block, 2 * window) + 17)
        except WrongResult as error:
            leave_out(name, str(error))
        except Exception as error:  # compilers and other libraries raise what they like
            leave_out(name, typed_first_line(error))
    return backends


def write(report: dict, output: Path) -> None:
    replace_text(output, json.dumps(report, indent=1) + "\n")
    replace_text(output.with_suffix(".md"), table(report["rows"]) + "\n")


def draw(report: dict, output: Path) -> bool:
    """Draw a picture beside OUT.json, where matplotlib is installed; returns whether there is one."""
    if not report["rows"] or find_spec("matplotlib") is None:
        return False
    from lcpt.benchmarking.attention_report import draw  # it takes a second: after everything is measured

    draw(report["rows"], report["device"], output.with_suffix(".png"))
    return True


if __name__ == "__main__":
    sys.exit(main())
