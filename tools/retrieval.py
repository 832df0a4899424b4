"""Run lcpt/commands/retrieval.py."""

import sys

from lcpt.commands.retrieval import main

if __name__ == "__main__":
    sys.exit(main())
