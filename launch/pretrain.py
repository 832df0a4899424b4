"""Run lcpt/commands/train.py."""

import sys

from lcpt.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
