"""Train with documents apart and not, from the same weights on the same batches, and score every document alone.

Data are what benchmarks/prepare_documents.py writes. A run is launch/pretrain.py with data.mask_documents true
(masked) or false (unmasked), then lcpt evaluate on the held-out books and on the held-out articles. Every finished
run is at once a row of the output; a run that has a row for these data is not made again. The table at the end has
masked minus unmasked, seed by seed and their mean, with the 95 % interval over documents and the standard deviation
over seeds: books, and the articles that short documents were cut from."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from lcpt.config import ConfigError, load_config
from lcpt.data import DataError
from lcpt.data.manifest import fingerprint_of, load_manifest
from lcpt.evaluation.compared_runs import read_run
from lcpt.evaluation.comparison import figures, kinds
from lcpt.evaluation.paired import paired_difference
from lcpt.evaluation.quality_rows import describe
from lcpt.evaluation.quality_runs import train_and_evaluate
from lcpt.evaluation.result_rows import append_row, has_row, read_rows
from lcpt.evaluation.variants import read_variants
from lcpt.parallel import groups
from lcpt.utils.progress import progress_bar
from lcpt.utils.provenance import report_header

ROOT = Path(__file__).parents[1]
TEXTS = ("books", "articles")
EXAMPLE = """example:
  python benchmarks/documents.py --variants softmax --output documents.jsonl"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(ROOT / "configs/compare/documents.yaml"), metavar="X.yaml")
    parser.add_argument("--variants", nargs="+", default=["softmax"], metavar="NAME", help="of variants.txt (softmax)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(0 1 2)")
    parser.add_argument("--data", default="data/prepared/documents", metavar="FOLDER", help="(data/prepared/documents)")
    parser.add_argument("--runs", default="runs/documents", metavar="FOLDER", help="for run folders (runs/documents)")
    parser.add_argument("--output", required=True, metavar="OUT.jsonl", help="rows are added to it")
    args = parser.parse_args()
    output, failed = Path(args.output), []
    try:
        variants = read_variants(ROOT / "configs/compare/variants.txt", args.variants)
        fingerprint = [fingerprint_of(load_manifest(f"{args.data}/{text}-train")) for text in TEXTS]
        wanted = [(v, seed, masked) for v in variants for seed in args.seeds for masked in (True, False)]
        for variant, seed, masked in progress_bar(wanted, unit="run"):
            key = {"variant": variant, "seed": seed, "mask_documents": masked, "fingerprint": fingerprint}
            if has_row(read_rows(output), **key):
                continue
            run = Path(args.runs) / f"{variant}-{'masked' if masked else 'unmasked'}-{seed}"
            changes = [*data_of(args.config, args.data), *variants[variant]]
            changes += [f"data.mask_documents={masked}", f"run.seed={seed}", f"run.dir={run}"]
            load_config(args.config, changes)  # an error names the key before anything starts
            if train_and_evaluate(args.config, changes, run, {text: f"{args.data}/{text}-valid" for text in TEXTS}):
                append_row(output, {**report_header(groups.device()), **key, "changes": changes, **row_of(run)})
            else:
                failed.append(run.name)
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table([row for row in read_rows(output) if row["fingerprint"] == fingerprint and row["variant"] in variants])
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def data_of(config_path: str, folder: str) -> list[str]:
    """Return the overrides that take the config's sources, with their weights, from this folder."""
    sources = load_config(config_path).data.sources or []
    listed = ", ".join(f"{{path: {folder}/{Path(s.path).name}, weight: {s.weight}}}" for s in sources)
    return [f"data.sources=[{listed}]", f"model.vocab_size={load_manifest(f'{folder}/books-train')['vocab_size']}"]


def row_of(run: Path) -> dict:
    """Collect the figures of a run folder in which both texts were scored."""
    found = read_run(run)
    measured = figures(found)
    names = ("parameters", "tokens", "loss", "step_milliseconds", "tokens_per_second")
    return {
        "kinds": kinds(found),
        "source_epochs": found.rows[-1]["source_epochs"],
        **{name: measured[name] for name in names},
        **{text: scores_of(run, text) for text in TEXTS},
    }


def scores_of(run: Path, text: str) -> dict:
    report = json.loads((run / f"{text}.json").read_text())
    names = ("fingerprint", "window", "tokens_scored", "bytes_scored", "loss", "bits_per_byte", "loss_by_position")
    documents = [json.loads(line) for line in (run / f"{text}.documents.jsonl").read_text().splitlines()]
    return {**{name: report[name] for name in names}, "documents": joined(documents)}


def joined(documents: list[dict]) -> list[dict]:
    """Add up the short documents of each article: they resemble each other, so that one is no sample of its own."""
    sums: dict[str, dict] = {}
    for document in documents:
        identifier = document["id"].partition("#")[0]
        total = sums.setdefault(identifier, {"id": identifier, "tokens": 0, "bytes": 0, "nats": 0.0})
        for name in ("tokens", "bytes", "nats"):
            total[name] += document[name]
    return list(sums.values())


def print_table(rows: list[dict]) -> None:
    """Print, for each variant, the seeds that have both runs; nothing of one that has no such seed."""
    for variant in dict.fromkeys(row["variant"] for row in rows):
        runs = {(row["seed"], row["mask_documents"]): row for row in rows if row["variant"] == variant}
        seeds = [seed for seed, masked in sorted(runs) if masked and (seed, False) in runs]
        if not seeds:
            continue
        masked, unmasked = ([runs[seed, which] for seed in seeds] for which in (True, False))
        headings = "".join(f"{f'seed {seed}':>10}" for seed in seeds)
        print(f"{variant:32}{'masked':>10}{'unmasked':>10}   difference:{headings}{'mean':>10} (95 % over documents)")
        for text in TEXTS:
            first, second = ({row["seed"]: row[text]["documents"] for row in group} for group in (masked, unmasked))
            differences = [paired_difference(first, second, per=per) for per in ("tokens", "bytes")]
            for name, unit, difference in zip(
                ("loss", "bits a byte"), ("loss", "bits_per_byte"), differences, strict=True
            ):
                values = [[row[text][unit] for row in group] for group in (masked, unmasked)]
                print(line_of(f"{text}, {name}", *values) + f"   {describe(difference)}")
        positions = [[row["articles"]["loss_by_position"] for row in group] for group in (masked, unmasked)]
        for n, part in enumerate(positions[0][0]):
            name = f"articles, {part['start']} … {part['end'] - 1} before"
            print(line_of(name, *([parts[n]["loss"] for parts in group] for group in positions)))


def line_of(name: str, masked: list[float], unmasked: list[float]) -> str:
    differences = [a - b for a, b in zip(masked, unmasked, strict=True)]
    each = "".join(f"{x:+10.4f}" for x in differences)
    means = f"{statistics.fmean(masked):10.4f}{statistics.fmean(unmasked):10.4f}"
    return f"{name:32}{means}{'':14}{each}{statistics.fmean(differences):+10.4f}"


if __name__ == "__main__":
    sys.exit(main())
