"""Run lcpt/commands/generate.py."""

import sys

from lcpt.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
