"""Make a row of what a trained and evaluated run reached, and a table that compares rows pair by pair."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from lcpt.evaluation.compared_runs import read_run
from lcpt.evaluation.comparison import figures, kinds
from lcpt.evaluation.paired import Difference, paired_difference

COLUMNS = {  # of a row -> heading of the table
    "evaluation_loss": "loss",
    "loss_last_quarter": "last quarter",
    "loss_repeated_bigrams": "repeated",
    "loss_rare_bigrams": "rare repeated",
    "loss_other_tokens": "other",
}


def row_of(run: Path, variant: str, changes: list[str], header: dict) -> dict:
    """Collect the figures of a run folder with evaluation.json and evaluation.documents.jsonl."""
    found = read_run(run)
    assert found.evaluation is not None
    documents = [json.loads(line) for line in (run / "evaluation.documents.jsonl").read_text().splitlines()]
    names = ("loss_by_position", "repeated_bigrams", "window", "stride")
    return {
        **header,
        "variant": variant,
        "seed": found.config["run"]["seed"],
        "changes": changes,
        "kinds": kinds(found),
        "fingerprint": found.fingerprint,
        "evaluation_fingerprint": found.evaluation["fingerprint"],
        **figures(found),
        **{name: found.evaluation[name] for name in names},
        "documents": documents,
    }


def print_table(rows: list[dict]) -> None:
    """Print the mean of each variant over its seeds, and its paired difference to the first variant's loss."""
    variants: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        variants.setdefault(row["variant"], []).append(row)
    if not variants:
        print("there are no rows yet")
        return
    first, width = next(iter(variants)), max(map(len, variants))
    print(f"{'':{width}}  seeds" + "".join(f"{heading:>15}" for heading in COLUMNS.values()) + f"   loss − {first}'s")
    for name, group in variants.items():
        line = f"{name:{width}}  {len(group):5}"
        for column in COLUMNS:
            values = [row[column] for row in group if row[column] is not None]
            line += f"{statistics.fmean(values):15.4f}" if values else f"{'-':>15}"
        difference = None if name == first else difference_of(group, variants[first])
        print(line + ("" if difference is None else f"   {describe(difference)}"))


def difference_of(group: list[dict], baseline: list[dict]) -> Difference | None:
    """Compute the paired difference over the seeds that both have; None where there is none."""
    both = {row["seed"] for row in group} & {row["seed"] for row in baseline}
    if not both:
        return None
    of_group, of_baseline = (
        {row["seed"]: row["documents"] for row in rows if row["seed"] in both} for rows in (group, baseline)
    )
    return paired_difference(of_group, of_baseline, per="tokens")


def describe(difference: Difference) -> str:
    """Format the mean, its interval over documents, and how far seeds differ where there are several."""
    text = f"{difference.mean:+.4f}"
    if difference.interval:
        text += f" ({difference.interval[0]:+.4f} to {difference.interval[1]:+.4f})"
    if difference.over_seeds:
        text += f", seeds ± {difference.over_seeds[1]:.4f}"
    return text
