"""Report what features of attention cost and lose, for one head: dimensions, bytes of state, FLOPs and where they cross
below softmax's, a sketch's error beside its theory, ranks of score matrices. With --checkpoint: a model's own heads."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lcpt.analysis.feature_report import checkpoint_report, feature_report
from lcpt.commands.arguments import CHECKPOINT, check_output
from lcpt.commands.one_line_errors import one_line_errors
from lcpt.model.pretrained import open_pretrained
from lcpt.parallel import groups
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.provenance import report_header

EXAMPLE = """example:
  lcpt report features --head-dim 64 --degree 4 --sketch-size 32
  lcpt report features --checkpoint runs/demo --data data/sample/valid.jsonl.xz --output features.json"""


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dim", type=int, default=64, metavar="D", help="(64)")
    parser.add_argument("--degree", type=int, default=4, metavar="P", help="of the exact polynomial (4)")
    parser.add_argument("--sketch-size", type=int, default=32, metavar="R", help="numbers of a sketch (32)")
    parser.add_argument("--block-size", type=int, default=256, metavar="C", help="tokens a block (256)")
    parser.add_argument("--checkpoint", **CHECKPOINT)
    parser.add_argument("--data", metavar="FILE|DIR", help="what the checkpoint reads: text, or a prepared folder")
    parser.add_argument("--output", metavar="OUT.json")
    args = parser.parse_args()
    device = groups.device()
    if (args.checkpoint is None) != (args.data is None):
        raise ValueError("--checkpoint and --data are given together or not at all")
    check_output(args.output)
    trained = open_pretrained(args.checkpoint) if args.checkpoint else None
    found = feature_report(args.head_dim, args.degree, args.sketch_size, args.block_size)
    if trained:
        found["checkpoint"] = checkpoint_report(trained, args.data, device)
    print_report(found)
    if args.output:
        replace_text(Path(args.output), json.dumps(report_header(device) | found, indent=1) + "\n")
        print(f"\nwritten to {args.output}")
    return 0


def print_report(report: dict) -> None:
    settings = report["settings"]
    print("one head, " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    print_dimensions(report["dimensions"])
    print_costs(report["costs"])
    print_sketch_error(report["sketch_error"])
    print_ranks(report["ranks"])
    if "checkpoint" in report:
        print_heads(report["checkpoint"])


def print_dimensions(rows: list[dict]) -> None:
    print(f"\n{'features':20}{'degree':>8}{'dimension':>16}{'state bytes':>18}")
    for row in rows:
        print(f"{row['features']:20}{row['degree']:>8}{row['dimension']:>16,}{row['state_bytes']:>18,}")


def print_costs(rows: list[dict]) -> None:
    contexts = [at["context"] for at in rows[0]["at"]]
    print("\nMFLOPs a token without the layer's matrices; where they are fewer than softmax's; MiB of state")
    print(f"{'':16}{'forward':>24}{'below':>9}{'forward+backward':>24}{'below':>9}{'state':>24}")
    figures = "".join(f"{n:>8}" for n in contexts)
    print(f"{'context':16}{figures}{'softmax':>9}{figures}{'softmax':>9}{figures}")
    for row in rows:
        line = f"{row['kind']:16}"
        for mode in ("forward", "forward_backward"):
            from_context = row["crossover"][mode]
            line += "".join(f"{at[mode] / 1e6:8.3f}" for at in row["at"])
            line += f"{'-' if from_context is None else f'{from_context:,}':>9}"
        print(line + "".join(f"{at['state_bytes'] / 2**20:8.3f}" for at in row["at"]))


def print_sketch_error(rows: list[dict]) -> None:
    print("\nS(q)·S(k) against (scale·q·k + shift)²: relative RMSE, measured (theory); by what its square is too heavy")
    sizes = sorted({row["size"] for row in rows})
    print(f"{'sketch':10}{'shift':>6}{'cosine':>8}" + "".join(f"{f'r = {size}':>22}" for size in sizes))
    for kind, shift, cosine in sorted({(row["sketch"], row["shift"], row["cosine"]) for row in rows}):
        cells = [row for row in rows if (row["sketch"], row["shift"], row["cosine"]) == (kind, shift, cosine)]
        line = f"{kind:10}{shift:>6}{cosine:>8}"
        for row in cells:
            error = f"{row['relative_rmse']:.2f} ({row['theory']:.2f})"
            line += f"{error:>15}{row['weight_ratio']:>6.1f}x"
        print(line)


def print_ranks(ranks: dict) -> None:
    print(f"\nranks of f(QKᵀ/√d), {ranks['rows']} Gaussian q and k of dimension {ranks['head_dim']}")
    print(f"{'f':12}{'rank':>8}{'at most':>10}{'stable rank':>14}")
    for row in ranks["functions"]:
        bound = "-" if row["bound"] is None else row["bound"]
        print(f"{row['function']:12}{row['rank']:>8}{bound:>10}{row['stable_rank']:>14.2f}")


def print_heads(report: dict) -> None:
    rows = report["heads"]
    names = [row["function"] for row in rows[0]["ranks"]]
    print(f"\n{report['checkpoint']} on {report['tokens']:,} tokens of {report['data']}")
    print("rank / stable rank of f(QKᵀ/√d)")
    print(f"{'layer':>5}{'head':>5} {'kind':12}" + "".join(f"{name:>12}" for name in names))
    for row in rows:
        cells = (f"{rank['rank']} / {rank['stable_rank']:.1f}" for rank in row["ranks"])
        print(f"{row['layer']:>5}{row['head']:>5} {row['kind']:12}" + "".join(f"{cell:>12}" for cell in cells))
    sketched = [row for row in rows if row["sketch_error"]]
    if sketched:
        print(
            "\nfar weights of the sketch against (scale·q·k + shift)⁴: relative error, at the best scale; error of "
            "their sums a query, median ratio"
        )
    for row in sketched:
        error = row["sketch_error"]
        print(
            f"{row['layer']:>5}{row['head']:>5} {row['kind']:12}{error['relative_error']:>12.3f}"
            f"{error['best_scale_error']:>12.3f}{error['row_mass_error']:>12.3f}{error['row_mass_ratio']:>12.3g}"
        )


if __name__ == "__main__":
    sys.exit(main())
