"""Print what was measured of every variant as one table in Markdown: its start, recall, books, cost.

It reads the rows that benchmarks/quality.sh keeps in benchmarks/results/, and measures each kind's weights at
initialisation (lcpt.analysis.trainability), which takes seconds a variant."""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

from lcpt.analysis.trainability import trainability
from lcpt.config import load_config
from lcpt.data import DataError
from lcpt.evaluation.quality_rows import describe, difference_of
from lcpt.evaluation.result_rows import read_rows
from lcpt.evaluation.variants import read_variants
from lcpt.model.cost import model_cost

ROOT = Path(__file__).parents[1]
CONFIGS, RESULTS = ROOT / "configs/compare", ROOT / "benchmarks/results"
CONTEXT, HEAD_DIM = 2048, 64
EXAMPLE = """example:
  python benchmarks/quality_table.py > benchmarks/results/quality-cpu.md"""


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_num_threads(1)
    try:
        recall, books = (read_rows(RESULTS / f"{name}-cpu.jsonl") for name in ("recall", "books"))
        variants = read_variants(CONFIGS / "variants.txt")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    measured = {row["variant"] for row in (*recall, *books)}
    tasks = [task for task in read_variants(CONFIGS / "tasks.txt") if any(row["task"] == task for row in recall)]
    print(f"| variant | correlation | far/near | {' | '.join(tasks)} | books loss | − softmax's | state KiB |")
    print("|" + " --- |" * (6 + len(tasks)))
    baseline = [row for row in books if row["variant"] == "softmax"]
    for variant, changes in variants.items():
        if variant in measured:
            cells = [variant, *start(changes), *(steps(recall, task, variant) for task in tasks)]
            cells += of_books([row for row in books if row["variant"] == variant], baseline, variant, changes)
            print(f"| {' | '.join(cells)} |")
    return 0


def start(changes: list[str]) -> tuple[str, str]:
    """Measure correlation and far/near at a head of 64, blocks of 256 and a sketch of 32 features."""
    sizes = ["model.attention.block_size=256", "model.attention.polysketch.size=32"]
    sizes += ["model.attention.flurka.summaries.number=null", "model.attention.lowrank.summaries.number=null"]
    config = load_config(CONFIGS / "recall.yaml", [*changes, *sizes]).model.attention
    if config.pattern:
        return "-", "-"
    found = trainability(config.kind, CONTEXT, HEAD_DIM, config=config)
    return f"{found.correlation:+.2f}", "-" if found.far_near is None else f"{found.far_near:.2f}"


def steps(rows: list[dict], task: str, variant: str) -> str:
    """List the steps to 90 % of each seed, in brackets the best share where it was not reached; CPU s per 100 steps."""
    found = sorted(
        (row for row in rows if (row["task"], row["variant"]) == (task, variant)), key=lambda row: row["seed"]
    )
    if not found:
        return "-"
    seconds = statistics.median(100 * row["cpu_seconds"] / row["curve"][-1]["step"] for row in found)
    reached = " ".join(str(row["steps_to_90"] or f"[{row['best_accuracy']:.0%}]") for row in found)
    return f"{reached} ({seconds:.1f} s)"


def of_books(group: list[dict], baseline: list[dict], variant: str, changes: list[str]) -> list[str]:
    """Format loss, its paired difference to softmax's, and the state of a sequence in the model of books.yaml."""
    state = model_cost(load_config(CONFIGS / "books.yaml", changes).model, CONTEXT).state_bytes / 2**10
    if not group:
        return ["-", "-", f"{state:,.0f}"]
    difference = None if variant == "softmax" else difference_of(group, baseline)
    loss = statistics.fmean(row["evaluation_loss"] for row in group)
    seeds = "" if len(group) == 3 else f", {len(group)} seeds"
    return [f"{loss:.4f}{seeds}", "-" if difference is None else describe(difference), f"{state:,.0f}"]


if __name__ == "__main__":
    sys.exit(main())
