"""Train, evaluate and compare kinds of attention on books: variants over seeds, from one config.

A run is launch/pretrain.py, then lcpt evaluate on the validation books. Every finished run is at once a row of the
output; a run that has a row for these training data is not made again, and one that was interrupted goes on. The table
at the end compares every variant with the first one on the same books and seeds, with 95 % intervals."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lcpt.config import ConfigError, load_config
from lcpt.data import DataError
from lcpt.data.manifest import fingerprint_of, load_manifest
from lcpt.evaluation.quality_rows import print_table, row_of
from lcpt.evaluation.quality_runs import train_and_evaluate
from lcpt.evaluation.result_rows import append_row, has_row, read_rows
from lcpt.evaluation.variants import read_variants
from lcpt.parallel import groups
from lcpt.utils.progress import progress_bar
from lcpt.utils.provenance import report_header

LIST = Path(__file__).parents[1] / "configs/compare/variants.txt"
EXAMPLE = """example:
  python benchmarks/books.py --config configs/compare/books.yaml --variants softmax polysketch --output books.jsonl"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="X.yaml", help="what every variant changes")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="of the list (all)")
    parser.add_argument("--list", default=LIST, type=Path, metavar="X.txt", help="(configs/compare/variants.txt)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(0 1 2)")
    parser.add_argument("--data", metavar="FOLDER", help="has train/ and valid/, prepared (those of the config)")
    parser.add_argument("--runs", default="runs/compare", metavar="FOLDER", help="for run folders (runs/compare)")
    parser.add_argument("--output", required=True, metavar="OUT.jsonl", help="rows are added to it")
    args = parser.parse_args()
    output, failed = Path(args.output), []
    try:
        variants = read_variants(args.list, args.variants)
        data = data_of(args.data)
        fingerprint = fingerprint_of(load_manifest(load_config(args.config, data).data.path))
        wanted = [(variant, seed) for seed in args.seeds for variant in variants]
        for variant, seed in progress_bar(wanted, unit="run"):
            if has_row(read_rows(output), variant=variant, seed=seed, fingerprint=fingerprint):
                continue
            run = Path(args.runs) / Path(args.config).stem / f"{variant}-{seed}"
            changes = [*data, *variants[variant], f"run.dir={run}", f"run.seed={seed}"]
            config = load_config(args.config, changes)  # an error names the variant's key before anything starts
            if train_and_evaluate(args.config, changes, run, {"evaluation": config.data.valid_path or ""}):
                row = row_of(run, variant, variants[variant], report_header(groups.device()))
                append_row(output, row)
            else:
                failed.append(run.name)
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table([row for row in read_rows(output) if row["fingerprint"] == fingerprint and row["variant"] in variants])
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def data_of(folder: str | None) -> list[str]:
    """Return the overrides that take training and validation data from a folder."""
    if folder is None:
        return []
    vocab_size = load_manifest(Path(folder) / "valid")["vocab_size"]
    return [f"data.path={folder}/train", f"data.valid_path={folder}/valid", f"model.vocab_size={vocab_size}"]


if __name__ == "__main__":
    sys.exit(main())
