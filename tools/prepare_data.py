"""Run lcpt/commands/prepare.py."""

import sys

from lcpt.commands.prepare import main

if __name__ == "__main__":
    sys.exit(main())
