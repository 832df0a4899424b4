"""Count the steps that each kind of attention needs to learn to recall: on tasks, over seeds, on one CPU core.

Variants are those of configs/compare/variants.txt, tasks those of configs/compare/tasks.txt. Every finished run is at
once a row of the output; a run that has a row is not made again. The table at the end has, of each variant and task,
the steps to 90 % right answers of each seed, and where one never got there the best share that it reached."""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

from lcpt.config import ConfigError, load_config
from lcpt.data import DataError
from lcpt.evaluation.result_rows import append_row, has_row, read_rows
from lcpt.evaluation.variants import read_variants
from lcpt.training.learn_recall import learn
from lcpt.utils.progress import progress_bar
from lcpt.utils.provenance import report_header

CONFIGS = Path(__file__).parents[1] / "configs/compare"
EXAMPLE = """example:
  python benchmarks/recall.py --variants softmax polysketch --tasks mqar_4_32 --output recall.jsonl"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="(all)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="(all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(0 1 2)")
    parser.add_argument("--output", required=True, metavar="OUT.jsonl", help="rows are added to it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        output = Path(args.output)
        variants = read_variants(CONFIGS / "variants.txt", args.variants)
        tasks = read_variants(CONFIGS / "tasks.txt", args.tasks)
        missing = [
            (task, variant, seed)
            for task in tasks
            for seed in args.seeds
            for variant in variants
            if not has_row(read_rows(output), task=task, variant=variant, seed=seed)
        ]
        for task, variant, seed in progress_bar(missing, unit="run"):
            changes = [*tasks[task], *variants[variant]]
            config = load_config(CONFIGS / "recall.yaml", [*changes, f"run.seed={seed}"])
            row = {"task": task, "variant": variant, "seed": seed, "changes": changes, **learn(config)}
            append_row(output, report_header(torch.device("cpu")) | row)
        print_table(read_rows(output), list(tasks), list(variants))
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def print_table(rows: list[dict], tasks: list[str], variants: list[str]) -> None:
    widths = [max(map(len, ("variant", *variants))), *(max(len(task), 24) for task in tasks)]
    print("steps to 90 % right answers of each seed, [best share] where never reached (CPU s per 1,000 steps)")
    print("  ".join(word.ljust(width) for word, width in zip(("variant", *tasks), widths, strict=True)).rstrip())
    for variant in variants:
        cells = [cell([row for row in rows if (row["task"], row["variant"]) == (task, variant)]) for task in tasks]
        print("  ".join(word.ljust(width) for word, width in zip((variant, *cells), widths, strict=True)).rstrip())


def cell(rows: list[dict]) -> str:
    """Format the steps of each seed, and CPU seconds for a thousand steps."""
    if not rows:
        return "-"
    steps = [
        str(row["steps_to_90"] or f"[{row['best_accuracy']:.0%}]") for row in sorted(rows, key=lambda r: r["seed"])
    ]
    seconds = statistics.median(1e3 * row["cpu_seconds"] / row["curve"][-1]["step"] for row in rows)
    return f"{' '.join(steps)} ({seconds:,.0f} s)"


if __name__ == "__main__":
    sys.exit(main())
