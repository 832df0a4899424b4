"""Run lcpt/commands/evaluate.py."""

import sys

from lcpt.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
