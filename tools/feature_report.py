"""Run lcpt/commands/feature_report.py."""

import sys

from lcpt.commands.feature_report import main

if __name__ == "__main__":
    sys.exit(main())
