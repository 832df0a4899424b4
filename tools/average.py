"""Run lcpt/commands/average.py."""

import sys

from lcpt.commands.average import main

if __name__ == "__main__":
    sys.exit(main())
