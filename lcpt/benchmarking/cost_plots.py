"""Plot what things cost: times over contexts, bytes over slices of a sequence, tables of cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.colors import LogNorm

from lcpt.utils.figures import Heading, log_y, name_beside, new_panels, powers_of_two, save, style


def over_contexts(
    heading: Heading, panels: list[tuple[str, list[tuple[str, list[int], list[float]]]]], output: Path
) -> None:
    """Plot panels (what the y axis shows, lines (name, contexts, values)) above each other as PNG, both axes
    logarithmic, lines of one name in one colour."""
    names = list(dict.fromkeys(name for _, lines in panels for name, *_ in lines))
    figure, axes = new_panels(heading, len(panels), height=0.6 + 4 * len(panels))
    for (y, lines), ax in zip(panels, axes[:, 0], strict=True):
        style(ax, "", y)
        colours = name_beside(ax, names)
        for name, *values in lines:
            ax.plot(*values, "o-", color=colours[name], label=name, markersize=4)
        powers_of_two(ax)
        ax.set_xticks(sorted({context for _, contexts, _ in lines for context in contexts}))
        log_y(ax)
    axes[-1, 0].set_xlabel("tokens of context")
    save(figure, output)


def over_slices(heading: Heading, lines: list[tuple[str, int, list[int], list[float], list[float]]], output: Path):
    """Plot lines (scheme, ranks, tokens of a slice, bytes, seconds) as PNG: a colour for each scheme, a dash for each
    number of ranks, all axes logarithmic."""
    schemes, ranks = list(dict.fromkeys(line[0] for line in lines)), list(dict.fromkeys(line[1] for line in lines))
    dashes: dict[int, Any] = dict(zip(ranks, ("-", "--", "-.", ":"), strict=False))
    figure, axes = new_panels(heading, 2, height=8)
    of_ranks = [pyplot.Line2D([], [], color="gray", linestyle=dashes[n], label=f"{n} ranks") for n in ranks]
    for ax, y in zip(axes[:, 0], ("MB that a rank sends for a layer", "ms by a model"), strict=True):
        style(ax, "tokens of a rank", y)
        colours = name_beside(ax, schemes, of_ranks)
        for scheme, count, tokens, n_bytes, seconds in lines:
            values = [n / 1e6 for n in n_bytes] if ax is axes[0, 0] else [1e3 * s for s in seconds]
            width = 1.2 + 0.6 * (len(schemes) - 1 - schemes.index(scheme))  # one that another covers shows beside it
            ax.plot(tokens, values, dashes[count], color=colours[scheme], linewidth=width)
        powers_of_two(ax)
        log_y(ax)
    axes[1, 0].get_legend().remove()
    save(figure, output)


Cell = tuple[float, str]  # a value and a text


def cells(heading: Heading, x: str, y: str, columns: list[str], rows: dict[str, dict[str, Cell]], output: Path) -> None:
    """Plot a table, row -> column -> cell, as PNG, coloured by the logarithm of the values; the first row is at the
    bottom. Rows may lack columns."""
    values = [[row[c][0] if c in row else float("nan") for c in columns] for row in rows.values()]
    width, height = 2 + 0.95 * len(columns), 2.4 + 0.5 * len(rows)
    figure, panels = new_panels(heading, 1, width=max(7, width), height=height)
    axes = panels[0, 0]
    axes.set_facecolor("0.93")
    axes.imshow(values, norm=LogNorm(), cmap="viridis", origin="lower", aspect="auto", alpha=0.6)
    for row, named in enumerate(rows.values()):
        for column, name in enumerate(columns):
            text = named[name][1] if name in named else "–"
            axes.text(column, row, text, ha="center", va="center", fontsize="small", linespacing=1.3)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save(figure, output)
