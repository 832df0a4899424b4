"""Run lcpt/commands/verify.py."""

import sys

from lcpt.commands.verify import main

if __name__ == "__main__":
    sys.exit(main())
