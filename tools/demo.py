"""Run lcpt/commands/demo.py."""

import sys

from lcpt.commands.demo import main

if __name__ == "__main__":
    sys.exit(main())
