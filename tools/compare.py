"""Run lcpt/commands/compare.py."""

import sys

from lcpt.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
