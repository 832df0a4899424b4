"""Compile every kernel, for GPUs that need not be here, and report registers, spills, shared memory, tensor-core
instructions, blocks a multiprocessor holds, and how many instructions a loop issues for each clock of its tensor cores.
Exit code 1, with the JSON written, where a kernel does not compile or one for sm_90 spills registers, waits for each
wgmma, or overwrites registers that an unfinished wgmma still reads."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, zip_longest
from pathlib import Path

import torch

from lcpt.commands.arguments import check_output, words
from lcpt.commands.one_line_errors import one_line_errors
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.progress import progress_bar
from lcpt.utils.provenance import report_header

TARGETS = "sm_80,sm_90,sm_100,gfx942"
EXAMPLE = """example:
  lcpt report kernels --targets sm_90,sm_100 --output kernels.json"""


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=[TARGETS], metavar="A,B", help=f"({TARGETS})")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="PTX and machine code of every row go there")
    parser.add_argument("--output", required=True, metavar="OUT.json")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("with TRITON_INTERPRET=1 nothing is compiled")
    try:
        from lcpt_kernels.triton.report import compile_report as report
    except ImportError as error:
        raise ValueError(str(error)) from error
    targets = words(args.targets)
    if unknown := [target for target in targets if target not in report.TARGETS]:
        raise ValueError(f"target {unknown[0]!r} is none of {', '.join(report.TARGETS)}")
    check_output(args.output)
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    top = report_header(torch.device("cpu"))

    def write(rows: list[dict]) -> None:
        replace_text(Path(args.output), json.dumps(top | {"rows": rows}, indent=1) + "\n")

    rows = compiled(report.rows, targets, args.keep, write)
    print_rows(rows, report.SIZES)
    print(f"\nwritten to {args.output}")
    faults = [(row, fault) for row in rows if (fault := report.fault(row))]
    for row, fault in faults:
        print(f"error: {row['kernel']} {row['settings']} for {row['target']}: {fault}", file=sys.stderr)
    return 1 if faults else 0


def compiled(rows_of, targets: list[str], keep: Path | None, write: Callable[[list[dict]], None]) -> list[dict]:
    """Compile with as many processes as there are cores -> rows in the order of the targets. `write` gets what is
    finished each time a process is; one that dies leaves a row with "error"."""
    cores = os.cpu_count() or 1
    parts = -(-cores // len(targets))
    with ProcessPoolExecutor(min(parts * len(targets), cores), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {
            target: [pool.submit(rows_of, target, part=part, parts=parts, keep=keep) for part in range(parts)]
            for target in targets
        }
        for _ in progress_bar(as_completed(chain(*futures.values())), total=parts * len(targets), desc="compiling"):
            rows = finished(futures)
            write(rows)
    return rows


def finished(futures: dict[str, list[Future]]) -> list[dict]:
    """Collect the finished rows, in the order of the targets and of their kernels."""
    found = []
    for target, of_target in futures.items():
        in_turn = zip_longest(*(rows_or_error(future, target) for future in of_target if future.done()))
        found += [row for row in chain(*in_turn) if row is not None]
    return found


def rows_or_error(future: Future, target: str) -> list[dict]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        return [{"kernel": "unknown", "settings": {}, "target": target, "error": f"a compiling process died: {error}"}]


def print_rows(rows: list[dict], sizes: tuple[str, ...]) -> None:
    before = None
    for row in rows:
        settings = dict(row["settings"])
        tiles = " ".join(f"{name}={settings.pop(name)}" for name in row["settings"] if name in sizes)
        title = ", ".join(f"{name} {value}" for name, value in settings.items())
        if (row["target"], title) != before:
            heads = f"{'registers':>10}{'spilled':>9}{'shared':>9}{'tensor':>8}{'wgmma':>12}{'blocks':>8}"
            print(f"\n{row['target']}: {title}\n{'':38}{heads}  {'issue/tensor':14}tiles")
            before = row["target"], title
        if "error" in row:
            print(f"{row['kernel']:38}{'does not compile':>18}  {tiles}")
            continue
        hazards = row["wgmma_hazards"]
        wgmma = "serialised" if row["wgmma_serialized"] else f"{hazards} hazards" if hazards else "-"
        occupancy = "-" if row["occupancy"] is None else row["occupancy"]
        ratios = " ".join(
            f"{loop['instructions'] / loop['tensor_clocks']:.1f}" for loop in row["loops"] if loop["tensor_clocks"]
        )
        print(
            f"{row['kernel']:38}{row['registers']:>10}{row['spill_bytes']:>9}{row['shared_bytes']:>9,}"
            f"{row['tensor_core_ops']:>8}{wgmma:>12}{occupancy:>8}  {ratios:14}{tiles}"
        )


if __name__ == "__main__":
    sys.exit(main())
