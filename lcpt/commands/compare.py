"""Compare runs: what each cost and reached, and by how much their losses differ on the same documents.

Runs that differ in run.seed alone are one setting, mean ± standard deviation over seeds; each setting is compared with
the first. Of a run folder it reads config.yaml and metrics.jsonl, and evaluation.json, evaluation.documents.jsonl,
recall.json and retrieval.json if they were written there. With --output it writes tables, pictures and
comparison.html, one page that needs no other file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lcpt.commands.one_line_errors import one_line_errors
from lcpt.evaluation import comparison_tables as tables
from lcpt.evaluation.compared_runs import Run, distinct, group_by_setting, read_run
from lcpt.evaluation.comparison import compare
from lcpt.evaluation.comparison_page import page
from lcpt.evaluation.comparison_pictures import draw
from lcpt.utils.atomic_files import replace_text

EXAMPLE = """example:
  lcpt compare runs/softmax runs/polysketch --output runs/comparison"""


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument("--output", metavar="DIR", help="for comparison.html, .md, .csv, .json and pictures")
    args = parser.parse_args()
    runs = [read_run(folder) for folder in args.runs]
    if args.output:
        Path(args.output).mkdir(parents=True, exist_ok=True)
    report = compare(runs)
    written = write(report, runs, Path(args.output)) if args.output else []
    print_tables(report)
    if args.output:
        print(f"\nwritten to {args.output}: {', '.join(written)}")
    return 0


def write(report: dict, runs: list[Run], folder: Path) -> list[str]:
    """Write a comparison into a folder in every form, and return the names of the files."""
    settings = group_by_setting(distinct(runs))
    pictures = draw(settings, folder)
    texts = {
        "comparison.html": page(report, settings, pictures),
        "comparison.md": tables.report_as_markdown(
            report, [(picture.title, picture.file.name) for picture in pictures]
        ),
        "comparison.csv": tables.settings_as_csv(report),
        "paired.csv": tables.differences_as_csv(report),
        "comparison.json": json.dumps(report, indent=2) + "\n",
    }
    for name, text in texts.items():
        replace_text(folder / name, text)
    return [*texts, *(picture.file.name for picture in pictures)]


def print_tables(report: dict) -> None:
    print(tables.as_text(tables.settings_table(report)))
    if differences := tables.differences_table(report):
        if differences.rows:
            print(f"\n{tables.as_text(differences)}")
        for note in differences.notes:
            print(f"note: {note}")
    for warning in report["warnings"]:
        print(f"warning: {warning}")


if __name__ == "__main__":
    sys.exit(main())
