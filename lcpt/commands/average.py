"""Average the weights of checkpoints into one export, for the end of a run or for its branches.

Each is a step folder, or a run, of which it takes the newest step. Tensors are summed in float64."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lcpt.commands.one_line_errors import one_line_errors
from lcpt.model.averaging import write_average

EXAMPLE = """example:
  lcpt average runs/mine/checkpoints/step-0000{8000,9000} runs/mine --output exports/mean

The output is what lcpt export writes, and serves where its exports do. config.json lists the checkpoints."""


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", metavar="STEP", help="a step folder, or a run folder")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    args = parser.parse_args()
    content = write_average(args.checkpoints, args.output)
    print_table(content, Path(args.output))
    return 0


def print_table(content: dict, output: Path) -> None:
    rows = [("parameters", f"{content['parameters']:,}")]
    rows += [("mean of", f"{of['run']}, step {of['step']:,}") for of in content["mean_of"]]
    for name, value in [*rows, ("written to", output)]:
        print(f"{name:<21}{value}")


if __name__ == "__main__":
    sys.exit(main())
