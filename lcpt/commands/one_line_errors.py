"""End a command as a user expects: bad input is a line and exit code 2, an interruption 130, a closed pipe no error."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable

from lcpt.parallel.launchers import is_first

BAD_INPUT, INTERRUPTED = 2, 130


def one_line_errors(main: Callable[[], int]) -> Callable[[], int]:
    """Wrap the main function of a command. Of several ranks the first alone speaks.

    With LCPT_TRACEBACK=1 in the environment the traceback comes first, for those who look for a fault of lcpt.
    """

    @functools.wraps(main)
    def command() -> int:
        try:
            code = main()
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # as of `lcpt … | head`, which has read what it wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
            return 0
        except KeyboardInterrupt:
            return _say("interrupted", INTERRUPTED)
        except (ValueError, OSError, MemoryError) as error:
            if os.environ.get("LCPT_TRACEBACK") == "1":
                traceback.print_exc()
            return _say(" ".join(str(error).split()) or type(error).__name__, BAD_INPUT)

    return command


def _say(message: str, code: int) -> int:
    if is_first(os.environ):
        print(f"error: {message}", file=sys.stderr)
    return code
