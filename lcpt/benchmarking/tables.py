"""Format the rows of a benchmark (see docs/contract.md) as a Markdown table that also reads well as plain text."""

from __future__ import annotations

from lcpt.benchmarking.attention_baselines import SOFTMAX


def table(rows: list[dict]) -> str:
    """Format rows of attention or of training steps; empty columns are left out. "times as fast as" and "x fastest
    softmax" divide the other method's time by the row's."""
    return _markdown(_columns(rows)) if rows else "no rows"


SHORT = {  # titles and modes in a terminal
    "median ms": "ms",
    "peak MiB": "MiB",
    "% of peak FLOP/s": "% FLOP/s",
    "% of bandwidth": "% bytes/s",
    "x fastest softmax": "x softmax",
    "forward_backward": "fwd + bwd",
}


def short_table(rows: list[dict]) -> str:
    """Format the rows for a terminal of 120 columns: what is the same in all of them stands in a line above."""
    if not rows:
        return "no rows"
    columns = _columns(rows)
    if "x fastest softmax" in columns:
        columns.pop("times as fast as", None)
    same = {title: columns[title][0] for title in ("batch", "backend", "passes") if len(set(columns[title])) == 1}
    above = ", ".join(f"{title} {value}" for title, value in same.items())
    shown = _markdown(
        {
            SHORT.get(title, title): [SHORT.get(cell, cell) for cell in cells]
            for title, cells in columns.items()
            if title not in same
        }
    )
    return f"{above}\n{shown}" if above else shown


def _columns(rows: list[dict]) -> dict[str, list[str]]:
    """Return title -> a cell for each row, without columns of which nothing is known."""
    columns = {
        "context": [f"{row['context']:,}" for row in rows],
        "batch": [str(row["batch"]) for row in rows],
        "mode": [row["mode"] for row in rows],
        "method": [row["method"] for row in rows],
        "backend": [row["backend"] for row in rows],
        "median ms": [number(row["milliseconds"]["p50"]) for row in rows],
        "p10": [number(row["milliseconds"]["p10"]) for row in rows],
        "p90": [number(row["milliseconds"]["p90"]) for row in rows],
        "passes": [str(row["repeats"]) for row in rows],
        "tokens/s": [f"{1e3 * row['batch'] * row['context'] / row['milliseconds']['p50']:,.0f}" for row in rows],
        "peak MiB": [f"{row['peak_memory_bytes'] / 2**20:,.1f}" for row in rows],
        "% of peak FLOP/s": [percent(row, "flops") for row in rows],
        "% of bandwidth": [percent(row, "bytes") for row in rows],
        "x fastest softmax": [ratio(fastest_softmax(row, rows), row) for row in rows],
        "times as fast as": [", ".join(f"{name}: {x:.2f}" for name, x in row["speedup"].items()) for row in rows],
    }
    return {title: cells for title, cells in columns.items() if any(cells)}


def _markdown(columns: dict[str, list[str]]) -> str:
    last = list(columns)[-1]
    lines = [[title, *cells] for title, cells in columns.items()]
    width = {column[0]: 0 if column[0] == last else max(map(len, column)) for column in lines}
    left = {"mode", "method", "backend", last}
    padded = [
        [x.ljust(width[title]) if title in left else x.rjust(width[title]) for x in (title, *cells)]
        for title, cells in columns.items()
    ]
    padded = [
        [first, ("-" * max(1, len(first) - 1)) + ("-" if title in left else ":"), *rest]
        for title, (first, *rest) in zip(columns, padded, strict=True)
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in zip(*padded, strict=True))


def fastest_softmax(row: dict, rows: list[dict]) -> dict | None:
    """Find the fastest row of softmax over all earlier tokens at row's context and mode."""
    rivals = [
        other
        for other in rows
        if other["method"] in SOFTMAX and (other["context"], other["mode"]) == (row["context"], row["mode"])
    ]
    return min(rivals, key=lambda other: other["milliseconds"]["p50"], default=None)


def number(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.3f}"


def percent(row: dict, of: str) -> str:
    known = row.get("percent_of_peak")
    return "" if known is None else f"{known[of]:.0f}"


def ratio(other: dict | None, row: dict) -> str:
    return "" if other is None else f"{other['milliseconds']['p50'] / row['milliseconds']['p50']:.2f}"
