"""Run lcpt/commands/lm_eval_harness.py."""

import sys

from lcpt.commands.lm_eval_harness import main

if __name__ == "__main__":
    sys.exit(main())
