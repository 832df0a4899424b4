"""Run lcpt/commands/benchmark_attention.py."""

import sys

from lcpt.commands.benchmark_attention import main

if __name__ == "__main__":
    sys.exit(main())
