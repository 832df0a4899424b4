"""Compare runs: what each cost and reached, as a table, as JSON and as pictures.

Runs that differ in run.seed alone are one line, mean ± standard deviation. Of a run folder it reads config.yaml and
metrics.jsonl, and evaluation.json and recall.json if tools/evaluate.py wrote them there."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lcpt.checkpoint import CheckpointError
from lcpt.data import DataError
from lcpt.evaluation import plots
from lcpt.evaluation.comparison import Run, compare, group_by_setting, loss_over, read_run, repeated_bigrams
from lcpt.utils.atomic_files import replace_text

EXAMPLE = """example:
  python tools/compare.py runs/softmax runs/polysketch --output runs/comparison"""

COLUMNS = {  # of the table: figure -> (heading, factor, format)
    "parameters": ("M param.", 1e-6, ".2f"),
    "tokens": ("M tokens", 1e-6, ".2f"),
    "loss": ("loss", 1, ".3f"),
    "valid_loss": ("valid", 1, ".3f"),
    "evaluation_bits_per_byte": ("bits/byte", 1, ".3f"),
    "loss_last_quarter": ("last quarter", 1, ".3f"),
    "loss_repeated_bigrams": ("repeated bigrams", 1, ".3f"),
    "loss_rare_bigrams": ("rare bigrams", 1, ".3f"),
    "loss_other_tokens": ("other tokens", 1, ".3f"),
    "recall": ("recall %", 100, ".1f"),
    "step_milliseconds": ("ms/step", 1, ",.0f"),
    "tokens_per_second": ("tokens/s", 1, ",.0f"),
    "state_bytes": ("state KiB", 2**-10, ",.0f"),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument("--output", metavar="DIR", help="for comparison.json and the pictures")
    args = parser.parse_args()
    try:
        runs = [read_run(folder) for folder in args.runs]
        report = compare(runs)
        if args.output:
            folder = Path(args.output)
            folder.mkdir(parents=True, exist_ok=True)
            replace_text(folder / "comparison.json", json.dumps(report, indent=2) + "\n")
            draw(runs, folder)
    except (CheckpointError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(report)
    if args.output:
        print(f"\nwritten to {', '.join(str(path) for path in sorted(folder.glob('*.*')))}")
    return 0


def draw(runs: list[Run], folder: Path) -> None:
    named = [(name, run) for name, group in group_by_setting(runs).items() for run in group]
    for wall_time, x, file in ((False, "tokens", "tokens"), (True, "seconds of training steps", "time")):
        lines = [(name, *loss_over(run, wall_time)) for name, run in named]
        plots.curves(lines, x, "training loss (nats), running mean", folder / f"loss_over_{file}.png")
    if lines := [(name, run.evaluation["loss_by_position"]) for name, run in named if run.evaluation]:
        plots.steps(
            lines,
            "loss",
            "tokens of context before the predicted one",
            "loss (nats a token)",
            folder / "loss_by_position.png",
        )
    for n, which in enumerate(("repeated", "rare")):
        parts = [(name, repeated_bigrams(run)[n].get("by_distance")) for name, run in named]
        if lines := [(name, bins) for name, bins in parts if bins]:
            plots.steps(
                lines,
                "loss",
                "tokens since the bigram was last seen",
                f"loss on {which} bigrams (nats a token)",
                folder / f"loss_on_{which}_bigrams.png",
            )
    if lines := [(name, run.recall["recall_by_distance"]) for name, run in named if run.recall]:
        plots.steps(
            lines,
            "accuracy",
            "tokens from the answer to its question",
            "right answers",
            folder / "recall_by_distance.png",
        )


def print_table(report: dict) -> None:
    used = [figure for figure in COLUMNS if any(row[figure]["mean"] is not None for row in report["rows"])]
    lines = [["", "kinds", *(COLUMNS[figure][0] for figure in used)]]
    for row in report["rows"]:
        different = len(set(row["seeds"]))
        seeds = f" ({different} seeds)" if different > 1 else f" ({len(row['seeds'])} runs)" * bool(row["seeds"][1:])
        lines.append([row["name"] + seeds, row["kinds"], *(cell(row[figure], figure) for figure in used)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        words = [
            word.ljust(width) if n < 2 else word.rjust(width)
            for n, (word, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(words).rstrip())
    for warning in report["warnings"]:
        print(f"warning: {warning}")


def cell(figure: dict, name: str) -> str:
    """Format the mean, and the spread where it is not 0."""
    _, factor, form = COLUMNS[name]
    if figure["mean"] is None:
        return "-"
    mean, spread = (format(factor * (value or 0), form) for value in (figure["mean"], figure["spread"]))
    return f"{mean} ± {spread}" if figure["spread"] else mean


if __name__ == "__main__":
    sys.exit(main())
