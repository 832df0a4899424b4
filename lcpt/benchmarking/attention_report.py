"""Plot the rows of an attention benchmark."""

from __future__ import annotations

from pathlib import Path

from lcpt.benchmarking.cost_plots import over_contexts
from lcpt.benchmarking.tables import fastest_softmax
from lcpt.utils.figures import Heading


def draw(rows: list[dict], device: str, output: Path) -> None:
    """Plot, for each mode, over the context: the time of a token, and its ratio to the fastest softmax's."""
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in rows))
    heading = Heading("Attention over tokens of context", device, dtypes, "medians of repeated runs in turn")
    panels = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        times: dict[str, list[tuple[int, float]]] = {}
        ratios: dict[str, list[tuple[int, float]]] = {}
        for row in (row for row in rows if row["mode"] == mode):
            milliseconds, best = row["milliseconds"]["p50"], fastest_softmax(row, rows)
            of_token = 1e3 * milliseconds / (row["batch"] * row["context"])
            times.setdefault(row["method"], []).append((row["context"], of_token))
            if best is not None:
                ratio = best["milliseconds"]["p50"] / milliseconds
                ratios.setdefault(row["method"], []).append((row["context"], ratio))
        for title, points in (("µs a token", times), ("times as fast as the fastest softmax", ratios)):
            if points:
                panels.append(
                    (
                        f"{mode}: {title}",
                        [(name, [x for x, _ in of_one], [y for _, y in of_one]) for name, of_one in points.items()],
                    )
                )
    over_contexts(heading, panels, output)
