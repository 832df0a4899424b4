"""Find and name damage to any file of a prepared folder."""

import argparse
import sys

from lcpt.commands.one_line_errors import one_line_errors
from lcpt.data import verify

EXAMPLE = """example:
  lcpt verify runs/data/train

Exit code 0: whole; 1: damaged, with a line for each damaged file; 2: not a folder."""


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", help="what prepare_data.py wrote")
    args = parser.parse_args()
    found = verify(args.folder)
    for name, damage in found.items():
        print(f"{name:<32}{'DAMAGED' if damage else 'whole'}")
    for damage in filter(None, found.values()):
        print(f"error: {damage}", file=sys.stderr)
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
