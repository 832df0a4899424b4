"""Plot retrieval as maps over contexts and depths, one checkpoint or settings side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.ticker import PercentFormatter

from lcpt.utils.figures import Heading, new_panels, plain, save


def retrieval(heading: Heading, rows: list[dict], output: Path) -> None:
    """Plot rows of lcpt retrieval as PNG: for each task a map of accuracy over contexts and depths, and under it one
    of the nats that an answer gains by what was planted."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    contexts, depths = (sorted({row[name] for row in rows}) for name in ("context", "depth"))
    width, height = 1.5 + len(tasks) * (1.2 + 0.62 * len(contexts)), 3.2 + 0.7 * len(depths)
    figure, axes = new_panels(heading, 2, len(tasks), width=max(6, width), height=height, sharey=True)
    gains = [row["nats_without"] - row["nats"] for row in rows]
    most = max(1.0, *map(abs, gains))  # less than a nat is pale
    for task, column in zip(tasks, axes.T, strict=True):
        cell = {(row["depth"], row["context"]): row for row in rows if row["task"] == task}
        chance = next(iter(cell.values()))["chance"]
        maps: list[tuple[str, Any, str, dict]] = [
            (f"{task}\nright (chance {chance:.0%})", lambda row: row["accuracy"], "{:.0%}", dict(vmin=0, vmax=1)),
            ("nats gained", lambda row: row["nats_without"] - row["nats"], "{:+.2f}", dict(vmin=-most, vmax=most)),
        ]
        for ax, palette, (title, value, form, ends) in zip(column, ("viridis", "RdBu"), maps, strict=True):
            values = [[value(cell[depth, context]) for context in contexts] for depth in depths]
            ax.imshow(values, cmap=palette, aspect="auto", alpha=0.7, **ends)
            for y, line in enumerate(values):
                for x, number in enumerate(line):
                    ax.text(x, y, form.format(round(number, 2) + 0.0), ha="center", va="center", fontsize="small")
            ax.set_title(title, fontsize="medium", loc="left")
            ax.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts], rotation=45)
            ax.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
        column[1].set_xlabel("tokens of context")
    for ax in axes[:, 0]:
        ax.set_ylabel("depth")
    save(figure, output)


def accuracy_maps(heading: Heading, panels: list[tuple[str, list[dict]]], output: Path) -> None:
    """Plot panels (name, cells {context, depth, accuracy}) beside each other as PNG: depth below, context to the right.

    A cell without a depth fills its column; the colours go from 0 to 100 % in every panel.
    """
    contexts = sorted({cell["context"] for _, cells in panels for cell in cells})
    depths = sorted({-1.0 if cell["depth"] is None else cell["depth"] for _, cells in panels for cell in cells})
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    width, height = 1.6 + across * max(2.2, 0.75 * len(contexts)), 0.8 + down * (1.1 + 0.42 * max(2, len(depths)))
    figure, axes = new_panels(heading, down, across, width=width, height=height, sharex=True, sharey=True)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (name, cells) in zip(axes.flat, panels, strict=False):
        values = {
            (-1.0 if cell["depth"] is None else cell["depth"], cell["context"]): cell["accuracy"] for cell in cells
        }
        grid = [[values.get((depth, context), float("nan")) for context in contexts] for depth in depths]
        image = ax.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for row, line in enumerate(grid):
            for column, value in enumerate(line):
                text = "–" if value != value else f"{100 * value:.0f}"
                colour = "black" if value > 0.6 or value != value else "white"
                ax.text(column, row, text, ha="center", va="center", fontsize="small", color=colour)
        ax.set_title(plain(name), fontsize="medium")
        ax.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
        ax.set_yticks(range(len(depths)), ["" if depth < 0 else f"{depth:.0%}" for depth in depths])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("tokens of context")
    if depths != [-1.0]:
        for ax in axes[:, 0]:
            ax.set_ylabel("depth")
    figure.colorbar(image, ax=axes, format=PercentFormatter(1), label="right answers", pad=0.02)
    save(figure, output)
