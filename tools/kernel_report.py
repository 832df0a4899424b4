"""Run lcpt/commands/kernel_report.py."""

import sys

from lcpt.commands.kernel_report import main

if __name__ == "__main__":
    sys.exit(main())
