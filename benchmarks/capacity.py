"""Measure how many pairs a polysketch state holds: recall over the number of pairs, for sketches of several sizes r.

Every cell trains a model of two layers on pairs that fill a quarter of the context, then asks for all of them; the best
share of right answers counts. Finished cells are rows of the output and are not made again. A state of one head has
r (r + 1)/2 features for values of 32 numbers. It draws OUT.png."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

from lcpt.config import ConfigError, load_config
from lcpt.data import DataError
from lcpt.evaluation.result_rows import append_row, has_row, read_rows
from lcpt.training.learn_recall import learn
from lcpt.utils.figures import Heading, name_beside, new_figure, save
from lcpt.utils.progress import progress_bar
from lcpt.utils.provenance import report_header

CONFIG = Path(__file__).parents[1] / "configs/compare/recall.yaml"
PAIRS, SIZES, BLOCK, VOCABULARY = (4, 8, 16, 32), (4, 8, 16, 32), 8, 128
STEPS, BATCH_TOKENS = 600, 4096
EXAMPLE = """example:
  python benchmarks/capacity.py --pairs 8 16 --sizes 8 16 --output capacity.jsonl"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", nargs="+", type=int, default=PAIRS, metavar="N", help="(4 8 16 32)")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="R", help="(4 8 16 32)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--output", required=True, metavar="OUT.jsonl", help="rows are added to it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        output = Path(args.output)
        for pairs, size in progress_bar(list(itertools.product(args.pairs, args.sizes)), unit="run"):
            key = {"pairs": pairs, "size": size, "context": 8 * pairs, "seed": args.seed}
            if not has_row(read_rows(output), **key):
                found = learn(load_config(CONFIG, changes(pairs, size, args.seed)))
                append_row(output, report_header(torch.device("cpu")) | key | found)
        rows = read_rows(output)
        draw(rows, output.with_suffix(".png"))
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(rows)
    return 0


def changes(pairs: int, size: int, seed: int) -> list[str]:
    return [
        f"data.synthetic.items={pairs}",
        f"data.context={8 * pairs}",
        f"model.vocab_size={VOCABULARY}",
        f"model.attention.block_size={BLOCK}",
        f"model.attention.polysketch.size={size}",
        f"training.global_batch_tokens={BATCH_TOKENS}",
        f"training.stop_after_steps={STEPS}",
        "training.micro_batch=1",
        f"run.seed={seed}",
    ]


def by_size(rows: list[dict]) -> dict[int, dict[int, float]]:
    """Arrange rows as size -> pairs -> best accuracy."""
    found: dict[int, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: (row["size"], row["pairs"])):
        found.setdefault(row["size"], {})[row["pairs"]] = row["best_accuracy"]
    return found


def draw(rows: list[dict], output: Path) -> None:
    heading = Heading("Pairs that a state remembers", rows[0]["device"], "fp32", f"best of {STEPS} steps")
    figure, axes = new_figure(heading, "pairs to remember, in eight times as many tokens", "share of right answers")
    lines = {f"r = {size}: {size * (size + 1) // 2} features": cells for size, cells in by_size(rows).items()}
    colours = name_beside(axes, lines)
    for name, cells in lines.items():
        axes.plot(list(cells), list(cells.values()), "o-", color=colours[name])
    axes.set_ylim(-0.03, 1.05)
    save(figure, output)


def print_table(rows: list[dict]) -> None:
    cells = by_size(rows)
    pairs = sorted({n for row in cells.values() for n in row})
    print(f"{'best share of right answers':28}" + "".join(f"{f'{n} pairs':>10}" for n in pairs))
    for size, row in cells.items():
        line = "".join(f"{row[n]:>10.1%}" if n in row else f"{'-':>10}" for n in pairs)
        print(f"{f'r = {size}':28}{line}")


if __name__ == "__main__":
    sys.exit(main())
