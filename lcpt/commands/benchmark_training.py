"""Measure time and memory of a training step, of configs side by side in one run.

Without a GPU it is the CPU time of one thread, which the other users of a shared machine disturb least. A config
that does not fit a GPU's memory at a context is named and left out there. OUT.json, and OUT.md, the same as a table,
are written anew after every context."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from torch.nn.attention import sdpa_kernel

from lcpt.benchmarking.attention_baselines import SDPA
from lcpt.benchmarking.tables import short_table, table
from lcpt.benchmarking.timing import first_passes, time_in_turn
from lcpt.benchmarking.training_step import training_step
from lcpt.commands.arguments import check_output, check_ranges, whole_numbers, words
from lcpt.commands.one_line_errors import one_line_errors
from lcpt.config import Config, ConfigError, load_config
from lcpt.parallel import groups
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.provenance import backend_of, report_header

EXAMPLE = """example:
  lcpt benchmark training --configs configs/demo.yaml --kinds softmax,polysketch --contexts 8192,16384 \\
      --output steps.json
  lcpt benchmark training --configs configs/gpt2-small-32k.yaml --kinds own,softmax --sdpa flash,cudnn \\
      --contexts 8192,32768 --tokens 65536 --output gpu.json"""
OWN = "own"  # in --kinds: as the config says


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", required=True, metavar="X.yaml,Y.yaml")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=[OWN],
        metavar="A,B",
        help="each config once with each of these in all layers; own: as is",
    )
    parser.add_argument(
        "--sdpa",
        nargs="+",
        default=[],
        metavar="A,B",
        help=f"each that has softmax layers once with each of PyTorch's kernels: {', '.join(SDPA)}",
    )
    parser.add_argument("--contexts", nargs="+", required=True, metavar="N,N", help="tokens a sequence")
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="in all sequences together, in place of the config's micro_batch; at least one sequence",
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed steps of each, in turn (5)")
    parser.add_argument("--output", required=True, metavar="OUT.json")
    args = parser.parse_args()
    contexts = whole_numbers("contexts", args.contexts)
    check_ranges(args, {"tokens": 1, "repeats": 1})
    check_output(args.output, ".md")
    variants = with_sdpa(read_configs(words(args.configs), words(args.kinds)), words(args.sdpa))

    report = report_header(groups.device()) | {"left_out": [], "rows": []}
    for context in contexts:
        rows, failed = measure(variants, context, args.tokens, args.repeats)
        for name, reason in failed.items():
            print(f"left out: {name} at {context}: {reason}", file=sys.stderr)
            report["left_out"].append({"method": name, "context": context, "reason": reason})
        report["rows"] += rows
        replace_text(Path(args.output), json.dumps(report, indent=2) + "\n")
        replace_text(Path(args.output).with_suffix(".md"), table(report["rows"]) + "\n")
    print(f"{short_table(report['rows'])}\nwritten to {args.output} and .md")
    return 1 if report["left_out"] else 0


def read_configs(paths: list[str], kinds: list[str]) -> dict[str, Config]:
    """Load configs by the name of their row: every file as it is, or once with each kind in all layers."""
    overrides = [
        [] if kind == OWN else [f"model.attention.kind={kind}", "model.attention.pattern=[]"] for kind in kinds
    ]
    configs = [(Path(path).stem, load_config(path, given)) for path in paths for given in overrides]
    return {f"{stem} {'+'.join(sorted(set(config.model.kinds)))}": config for stem, config in configs}


def with_sdpa(configs: dict[str, Config], backends: list[str]) -> dict[str, tuple[Config, str | None]]:
    """Repeat configs with softmax layers for each of PyTorch's kernels for it; None: PyTorch chooses."""
    if unknown := set(backends) - SDPA.keys():
        raise ConfigError(f"--sdpa {', '.join(unknown)} is none of {', '.join(SDPA)}")
    variants: dict[str, tuple[Config, str | None]] = {}
    for name, config in configs.items():
        if "softmax" in config.model.kinds and backends:
            variants |= {f"{name} ({backend})": (config, backend) for backend in backends}
        else:
            variants[name] = config, None
    return variants


def measure(
    variants: dict[str, tuple[Config, str | None]], context: int, tokens: int | None, repeats: int
) -> tuple[list[dict], dict[str, str]]:
    """Time the variants: a row each, and the reason for each variant that a GPU cannot run."""
    device = groups.device()
    batches = {
        name: config.training.micro_batch if tokens is None else max(1, tokens // context)
        for name, (config, _) in variants.items()
    }
    backends: dict[str, str] = {}
    steps = {
        name: recording_backend(
            backends, name, sdpa, training_step(config.model, batches[name], context, config.training.precision, device)
        )
        for name, (config, sdpa) in variants.items()
    }
    failed = first_passes(steps, device)
    for name in failed:
        del steps[name]
    figures = time_in_turn(steps, repeats, device)
    medians = {name: figure["milliseconds"]["p50"] for name, figure in figures.items()}
    rows = []
    for name in steps:
        config, sdpa = variants[name]
        rows.append(
            {
                "method": name,
                "settings": dataclasses.asdict(config.model) | ({} if sdpa is None else {"sdpa": sdpa}),
                "context": context,
                "batch": batches[name],
                "heads": config.model.n_heads,
                "head_dim": config.model.d_model // config.model.n_heads,
                "dtype": config.training.precision,
                "device": device.type,
                "backend": backends[name],
                "mode": "training_step",
                **figures[name],
                "tokens_per_second": 1e3 * batches[name] * context / medians[name],
                "speedup": {other: medians[other] / medians[name] for other in steps if other != name},
            }
        )
    return rows, failed


def recording_backend(backends: dict[str, str], name: str, sdpa: str | None, step: Callable) -> Callable[[], None]:
    """Wrap a step to run with PyTorch's kernel `sdpa` and to record its backend the first time."""

    def run() -> None:
        with nullcontext() if sdpa is None else sdpa_kernel([SDPA[sdpa]]):
            loss = step()
        if name not in backends:
            backends[name] = backend_of(loss)

    return run


if __name__ == "__main__":
    sys.exit(main())
