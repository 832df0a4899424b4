"""Run lcpt/commands/export.py."""

import sys

from lcpt.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
