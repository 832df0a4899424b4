"""Check the kernels on this GPU: output and every gradient against the float64 definition, at real sizes and settings,
and the same bits each time, also beside another stream.

    python benchmarks/check_kernels.py --output benchmarks/results/kernels-right.json

Several processes take the cases in turn, the most valuable first. A process whose case raises an error is replaced: the
GPU's context may be broken. OUT.json is written anew after each case. Exit code 1 where one is wrong or did not end.
--small is for Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path

import torch

from lcpt.benchmarking.kernel_cases import Case, cases, smaller
from lcpt.benchmarking.kernel_check import check
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.errors import typed_first_line
from lcpt.utils.progress import progress_bar
from lcpt.utils.provenance import report_header


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="OUT.json")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="passes that must be the same bits (20)")
    parser.add_argument(
        "--limit", type=float, default=95, metavar="SECONDS", help="after which what is not done is named (95)"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--only", metavar="TEXT", help="cases whose names have it")
    parser.add_argument("--small", action="store_true", help="sizes for Triton's interpreter")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        print("error: PyTorch finds no GPU here; TRITON_INTERPRET=1 with --small goes without one", file=sys.stderr)
        return 2
    chosen = [case for case in cases() if args.only is None or args.only in case.name]
    if args.small:
        chosen = list(dict.fromkeys(map(smaller, chosen)))
    if not chosen:
        print(f"error: no case has {args.only!r} in its name", file=sys.stderr)
        return 2
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    report = report_header(device) | {"rows": []}

    def write(row: dict) -> None:
        report["rows"].append(row)
        replace_text(Path(args.output), json.dumps(report, indent=1) + "\n")

    for row in progress_bar(checked(chosen, device, args), total=len(chosen), unit="case"):
        write(row)
    done = {row["case"] for row in report["rows"]}
    for case in chosen:
        if case.name not in done:
            write(failed(case, f"not done within {args.limit:g} seconds"))
    return finish(report["rows"], args.output)


def checked(chosen: list[Case], device: torch.device, args: argparse.Namespace) -> Iterator[dict]:
    """Yield a row for each case as soon as it is done; those that are not done within the limit have none."""
    waiting, end = deque(chosen), time.monotonic() + args.limit
    processes: dict[Connection, tuple[multiprocessing.Process, Case]] = {}

    def give(connection: Connection, process: multiprocessing.Process) -> None:
        processes[connection] = process, (case := waiting.popleft())
        with suppress(ConnectionError):  # it has died since: its end of the pipe says so below
            connection.send(case)

    try:
        while (processes or waiting) and time.monotonic() < end:
            while waiting and len(processes) < args.processes:
                give(*started(device, args.repeats))
            for connection in wait_for(list(processes), timeout=max(0.0, end - time.monotonic())):
                process, case = processes.pop(connection)
                try:
                    row = connection.recv()
                except (EOFError, ConnectionError):
                    process.join(timeout=5)
                    row = failed(case, f"its process died, exit code {process.exitcode}")
                yield row
                if "error" not in row and waiting:
                    give(connection, process)
                else:
                    connection.close()  # which ends the process
    finally:
        for process, _ in processes.values():
            process.kill()


def started(device: torch.device, repeats: int) -> tuple[Connection, multiprocessing.Process]:
    """Start a process that answers cases with rows."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=answer, args=(theirs, device, repeats), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def answer(connection: Connection, device: torch.device, repeats: int) -> None:
    """Answer cases until the other end of the pipe is closed."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*deterministic")  # deterministic algorithms are on for their NaN
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        try:
            row = check(case, device, repeats)
        except Exception as error:  # a compiler's or a GPU's; the others are still worth knowing
            row = failed(case, typed_first_line(error))
        connection.send(row)


def failed(case: Case, error: str) -> dict:
    return {"case": case.name, "settings": asdict(case), "passed": False, "error": error}


def finish(rows: list[dict], output: str) -> int:
    for row in rows:
        if "errors" in row:
            name, error = max(row["errors"].items(), key=lambda item: item[1])
            said = f"{error:.1e} ({name}), {row['differing_repeats']} of the repeats differ, {row['seconds']:.1f} s"
        else:
            said = row["error"]
        print(f"{'right' if row['passed'] else 'WRONG':6} {row['case']}: {said}")
    wrong = [row["case"] for row in rows if not row["passed"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} cases are right; written to {output}")
    if wrong:
        print(f"error: wrong: {'; '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
