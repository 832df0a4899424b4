"""Lay out a comparison as tables: as text, as Markdown and as CSV."""

from __future__ import annotations

import csv
import html
import io
import re
from dataclasses import dataclass, field

COLUMNS = {  # of the table of settings: figure -> (heading, factor, format)
    "parameters": ("M param.", 1e-6, ".2f"),
    "tokens": ("M tokens", 1e-6, ".2f"),
    "loss": ("loss", 1, ".3f"),
    "valid_loss": ("valid", 1, ".3f"),
    "evaluation_bits_per_byte": ("bits/byte", 1, ".3f"),
    "loss_last_quarter": ("last quarter", 1, ".3f"),
    "context_gain": ("context gain", 1, ".3f"),
    "loss_repeated_bigrams": ("repeated bigrams", 1, ".3f"),
    "loss_rare_bigrams": ("rare bigrams", 1, ".3f"),
    "loss_other_tokens": ("other tokens", 1, ".3f"),
    "recall": ("recall %", 100, ".1f"),
    "retrieval": ("retrieval %", 100, ".1f"),
    "step_milliseconds": ("ms/step", 1, ",.0f"),
    "tokens_per_second": ("tokens/s", 1, ",.0f"),
    "state_bytes": ("state KiB", 2**-10, ",.0f"),
}
WIDTH = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Holds cells of text; the first `names` columns name their row."""

    head: list[str]
    rows: list[list[str]]
    names: int = 1
    notes: list[str] = field(default_factory=list)


def settings_table(report: dict) -> Table:
    """Show what each setting cost and reached, mean ± standard deviation over seeds; nothing that nobody measured."""
    used = [figure for figure in COLUMNS if any(row[figure]["mean"] is not None for row in report["rows"])]
    rows = [
        [row["name"] + _counts(row), row["kinds"], *(_mean_and_spread(row[figure], figure) for figure in used)]
        for row in report["rows"]
    ]
    return Table(head=["", "kinds", *(COLUMNS[figure][0] for figure in used)], rows=rows, names=2)


def differences_table(report: dict) -> Table | None:
    """Show each setting's loss minus the first one's, on the same documents; None where nothing was to be paired."""
    if not report["paired"]:
        return None
    head = ["", "bits/byte", "95 % of documents", "p", "documents", "over seeds", "nats/token", "95 % of documents"]
    rows, notes = [], []
    for row in report["paired"]:
        if row["refused"]:
            notes.append(f"{row['setting']} minus {row['minus']}: {row['refused']}")
            continue
        in_bytes, in_tokens = row["bits_per_byte"], row["nats_per_token"]
        cells = [_signed(in_bytes["mean"]), _interval(in_bytes), f"{row['p']:.2g}", f"{row['documents']:,}"]
        cells += [_over_seeds(row), *((_signed(in_tokens["mean"]), _interval(in_tokens)) if in_tokens else "--")]
        rows.append([row["setting"], *cells])
        if row["few"]:
            count = f"{row['documents']} document{'s' * (row['documents'] != 1)}"
            notes.append(f"{row['setting']} minus {row['minus']}: {count}, too few to rely on an interval or p")
    return Table(head=[f"minus {report['paired'][0]['minus']}", *head[1:]], rows=rows, notes=notes)


def _counts(row: dict) -> str:
    """Say how many seeds a row stands for, or runs of a single one."""
    seeds, runs = len(row["seeds"]), row["runs"]
    return f" ({seeds} seeds)" if seeds > 1 else f" ({runs} runs of a seed)" * (runs > 1)


def _mean_and_spread(figure: dict, name: str) -> str:
    """Format the mean, and the spread where it is not 0."""
    _, factor, form = COLUMNS[name]
    if figure["mean"] is None:
        return "-"
    mean, spread = (format(factor * (value or 0), form) for value in (figure["mean"], figure["spread"]))
    return f"{mean} ± {spread}" if figure["spread"] else mean


def _over_seeds(row: dict) -> str:
    figure = row["bits_per_byte"]
    if figure["seeds_mean"] is None:
        return "1 seed" if row["seeds"] else "none in common"
    return f"{_signed(figure['seeds_mean'])} ± {figure['seeds_spread']:.4f} ({len(row['seeds'])})"


def _interval(figure: dict) -> str:
    return "{} to {}".format(*map(_signed, figure["interval"])) if figure["interval"] else "-"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def as_text(table: Table) -> str:
    """Lay a table out for a terminal, in blocks below each other where it is wider than WIDTH."""
    widths = [max(map(len, column)) for column in zip(table.head, *table.rows, strict=True)]
    blocks: list[list[int]] = [[]]
    used = start = sum(width + 2 for width in widths[: table.names])
    for column in range(table.names, len(widths)):
        if used + widths[column] > WIDTH and blocks[-1]:
            blocks.append([])
            used, start = start, sum(width + 2 for width in widths[:1])
            used = start
        blocks[-1].append(column)
        used += widths[column] + 2
    texts = []
    for number, block in enumerate(blocks):
        columns = [*range(1 if number else table.names), *block]
        lines = (
            "  ".join(row[n].ljust(widths[n]) if n < table.names else row[n].rjust(widths[n]) for n in columns).rstrip()
            for row in (table.head, *table.rows)
        )
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def as_markdown(table: Table) -> str:
    lines = [table.head, ["---"] * table.names + ["---:"] * (len(table.head) - table.names), *table.rows]
    escaped = [[cell if number == 1 else escape_markdown(cell) for cell in line] for number, line in enumerate(lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def escape_markdown(text: str) -> str:
    """Escape what Markdown or HTML in it would read as markup."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(text, quote=False)).replace("\n", " ")


def report_as_markdown(report: dict, pictures: list[tuple[str, str]]) -> str:
    """Write a comparison with its pictures (title, file name beside it) as Markdown."""
    parts = ["# Comparison of runs", *(f"**Warning:** {escape_markdown(warning)}" for warning in report["warnings"])]
    parts.append(as_markdown(settings_table(report)))
    if differences := differences_table(report):
        parts.append("## Paired differences")
        parts += [as_markdown(differences)] if differences.rows else []
        parts += [escape_markdown(note) for note in differences.notes]
    parts += [f"## {title}\n\n![{title}]({file})" for title, file in pictures]
    return "\n\n".join(parts) + "\n"


def settings_as_csv(report: dict) -> str:
    """Write a row a setting, each figure in full and its standard deviation over seeds in FIGURE_spread."""
    figures = [name for name, value in report["rows"][0].items() if isinstance(value, dict)]
    head = ["name", "kinds", "seeds", "runs", *(part for name in figures for part in (name, f"{name}_spread"))]
    rows = [
        [row["name"], row["kinds"], " ".join(map(str, row["seeds"])), row["runs"]]
        + [row[name][part] for name in figures for part in ("mean", "spread")]
        for row in report["rows"]
    ]
    return _csv([head, *rows])


def differences_as_csv(report: dict) -> str:
    """Write a row a pair of settings, every figure in full, or why it was refused."""
    units = ("bits_per_byte", "nats_per_token")
    parts = [f"{unit}{part}" for unit in units for part in ("", "_low", "_high", "_seeds_mean", "_seeds_spread")]
    rows = []
    for row in report["paired"]:
        figures = [row.get(unit) or {} for unit in units]
        cells = [
            value
            for figure in figures
            for value in (
                figure.get("mean"),
                *(figure.get("interval") or (None, None)),
                figure.get("seeds_mean"),
                figure.get("seeds_spread"),
            )
        ]
        seeds = " ".join(map(str, row.get("seeds", [])))
        rows.append([row["setting"], row["minus"], row.get("documents"), seeds, row.get("p"), *cells, row["refused"]])
    return _csv([["setting", "minus", "documents", "seeds", "p", *parts, "refused"], *rows])


def _csv(rows: list[list]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
