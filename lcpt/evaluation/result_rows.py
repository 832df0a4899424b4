"""Keep measured figures as rows of a JSON lines file, a row a finished run. What has a row is not measured again: rows
travel with the repository, run folders do not."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lcpt.data import DataError


def read_rows(path: Path) -> list[dict]:
    """Read the rows of a file; none where there is no file. Raises DataError naming a line that is no row."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise DataError(f"{path}, line {number} is no JSON; remove that line, and its run is made again") from None
    return rows


def append_row(path: Path, row: dict) -> None:
    """Append a row and wait until the disk has it. A line that an earlier process left half-written is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def has_row(rows: list[dict], **key) -> bool:
    return any(all(row.get(name) == value for name, value in key.items()) for row in rows)
