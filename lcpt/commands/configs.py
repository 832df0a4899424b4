"""List the configs that `lcpt train --config` takes by name, with the comment at their head."""

from __future__ import annotations

import argparse
import textwrap

from lcpt.commands.one_line_errors import one_line_errors
from lcpt.config import named_configs


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for name, file in named_configs().items():
        comment = first_comment(file.read_text(encoding="utf-8"))
        print(f"{name:<28}{textwrap.shorten(comment, 90, placeholder=' …')}")
    return 0


def first_comment(text: str) -> str:
    """Return the first sentence of the comment at the head of a file."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.strip("# "))
    return " ".join(lines).partition(". ")[0].rstrip(".")
