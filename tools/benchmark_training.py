"""Run lcpt/commands/benchmark_training.py."""

import sys

from lcpt.commands.benchmark_training import main

if __name__ == "__main__":
    sys.exit(main())
