"""Run lcpt/commands/plan.py."""

import sys

from lcpt.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
