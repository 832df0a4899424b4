"""Plot a run, and runs side by side: loss over tokens, time and positions, recall over distances."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # before pyplot is imported
from matplotlib import pyplot
from matplotlib.colors import LogNorm
from matplotlib.ticker import PercentFormatter


def loss_curve(metrics: Path, output: Path) -> None:
    """Plot training and validation loss of a metrics.jsonl over tokens, as PNG."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = _axes("tokens", "loss (nats a token)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    keys = list(dict.fromkeys(key for row in rows for key in row if key.startswith("valid_loss")))
    lines = {"loss": "training"}
    lines |= {key: f"validation: {key.partition('/')[2]}" for key in keys[1:]} or {"valid_loss": "validation"}
    for key, label in lines.items():
        measured = [r for r in rows if key in r]  # at step 0 there is a validation alone
        line = "-" if key == "loss" else "o-"
        axes.plot([r["tokens"] for r in measured], [r[key] for r in measured], line, label=label)
    axes.legend(frameon=False)
    _save(figure, output)


def loss_by_position(report: dict, output: Path) -> None:
    """Plot the loss_by_position of an evaluation, as PNG: it falls as long as more context helps.

    Bands are 95 % intervals over documents. Where the text of all bins is alike, the unigram is flat.
    """
    figure, axes = _axes("tokens of context before the predicted one", "loss (nats a token)")
    bins = report["loss_by_position"]
    edges = _log_edges(bins)
    axes.stairs([b["loss"] for b in bins], edges, color="tab:blue", baseline=None, label="model")
    if all(b.get("interval") for b in bins):
        low, high = ([b["interval"][end] for b in bins] for end in (0, 1))
        axes.stairs(high, edges, baseline=low, fill=True, color="tab:blue", alpha=0.2)
    if all("unigram" in b for b in bins):
        axes.stairs([b["unigram"] for b in bins], edges, color="tab:gray", baseline=None, label="unigram: no context")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.axhline(report["loss"], color="gray", linestyle=":", label=f"mean {report['loss']:.3f}")
    axes.legend(frameon=False)
    _save(figure, output)


def recall_by_distance(lines: list[tuple[str, list[dict]]], chance: float, output: Path) -> None:
    """Plot lines (name, recall_by_distance of an evaluation) and what a guess is worth, as PNG."""
    figure, axes = _axes("tokens from the answer to its question", "answers that are right")
    for number, (name, parts) in enumerate(lines):
        width = 1.5 * (len(lines) - number)  # one that another covers shows beside it
        axes.stairs([part["accuracy"] for part in parts], _log_edges(parts), baseline=None, linewidth=width, label=name)
    axes.axhline(chance, color="gray", linestyle=":", label=f"chance, {100 * chance:.1f} %")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(-0.03, 1.05)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(0, 0.4))
    _save(figure, output)


def curves(
    lines: Sequence[tuple[str, Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]],
    x: str,
    y: str,
    output: Path,
) -> None:
    """Plot lines (name, x values, y values) as PNG, those of one name in one colour; their first tenth, where a loss
    falls from far above, may leave the picture."""
    figure, axes, colours = _wide_axes(x, y, [name for name, *_ in lines])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    for name, *values in lines:
        axes.plot(*values, color=colours[name], linewidth=1)
    axes.set_ylim(*_limits([value for _, _, values in lines for value in values[len(values) // 10 :]]))
    _save(figure, output)


def steps(lines: list[tuple[str, list[dict]]], key: str, x: str, y: str, output: Path) -> None:
    """Plot lines (name, parts {start, end, <key>}) over a logarithmic axis as PNG, those of one name in one colour."""
    figure, axes, colours = _wide_axes(x, y, [name for name, _ in lines])
    for number, (name, parts) in enumerate(lines):
        width = min(6.0, 1.2 + 1.3 * (len(lines) - 1 - number))  # one that another covers shows beside it
        edges = _log_edges(parts)
        axes.stairs([part[key] for part in parts], edges, color=colours[name], baseline=None, linewidth=width)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _save(figure, output)


def over_contexts(panels: list[tuple[str, list[tuple[str, list[int], list[float]]]]], output: Path) -> None:
    """Plot panels (what the y axis shows, lines (name, contexts, values)) above each other as PNG, both axes
    logarithmic, lines of one name in one colour."""
    names = list(dict.fromkeys(name for _, lines in panels for name, *_ in lines))
    colours = {name: pyplot.get_cmap("tab20")(number % 20) for number, name in enumerate(names)}
    figure, axes = pyplot.subplots(len(panels), figsize=(9, 4 * len(panels)), layout="constrained", squeeze=False)
    for (y, lines), ax in zip(panels, axes[:, 0], strict=True):
        _style(ax, "tokens of context", y)
        for name, *values in lines:
            ax.plot(*values, "o-", color=colours[name], label=name, markersize=4)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, output)


def over_slices(title: str, lines: list[tuple[str, int, list[int], list[float], list[float]]], output: Path) -> None:
    """Plot lines (scheme, ranks, tokens of a slice, bytes, seconds) as PNG: a colour for each scheme, a dash for each
    number of ranks, all axes logarithmic."""
    schemes, ranks = list(dict.fromkeys(line[0] for line in lines)), list(dict.fromkeys(line[1] for line in lines))
    colours = {name: f"C{number}" for number, name in enumerate(schemes)}
    dashes: dict[int, Any] = dict(zip(ranks, ("-", "--", "-.", ":"), strict=False))
    figure, axes = pyplot.subplots(2, figsize=(9, 8), layout="constrained")
    for ax, y in zip(axes, ("MB that a rank sends for a layer", "ms by a model"), strict=True):
        _style(ax, "tokens of a rank", y)
        for scheme, count, tokens, n_bytes, seconds in lines:
            values = [n / 1e6 for n in n_bytes] if ax is axes[0] else [1e3 * s for s in seconds]
            width = 1.2 + 0.6 * (len(schemes) - 1 - schemes.index(scheme))  # one that another covers shows beside it
            ax.plot(tokens, values, dashes[count], color=colours[scheme], linewidth=width)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.yaxis.set_major_formatter("{x:g}")
    axes[0].set_title(title, fontsize="medium", loc="left")
    handles = [pyplot.Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    handles += [pyplot.Line2D([], [], color="gray", linestyle=dashes[n], label=f"{n} ranks") for n in ranks]
    axes[0].legend(handles=handles, frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, output)


Cell = tuple[float, str]  # a value and a text


def cells(title: str, x: str, y: str, columns: list[str], rows: dict[str, dict[str, Cell]], output: Path) -> None:
    """Plot a table, row -> column -> cell, as PNG, coloured by the logarithm of the values; the first row is at the
    bottom. Rows may lack columns."""
    values = [[row[c][0] if c in row else float("nan") for c in columns] for row in rows.values()]
    size = (2 + 0.95 * len(columns), 1.6 + 0.5 * len(rows))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
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
    axes.set_title(title, fontsize="medium", loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _save(figure, output)


def retrieval(rows: list[dict], output: Path) -> None:
    """Plot rows of tools/retrieval.py as PNG: for each task a map of accuracy over contexts and depths, and under it
    one of the nats that an answer gains by what was planted."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    contexts, depths = (sorted({row[name] for row in rows}) for name in ("context", "depth"))
    size = (1.5 + len(tasks) * (1.2 + 0.62 * len(contexts)), 2.6 + 0.7 * len(depths))
    figure, axes = pyplot.subplots(2, len(tasks), figsize=size, layout="constrained", squeeze=False, sharey=True)
    gains = [row["nats_without"] - row["nats"] for row in rows]
    most = max(1.0, *map(abs, gains))  # less than a nat is pale
    for task, column in zip(tasks, axes.T, strict=True):
        cell = {(row["depth"], row["context"]): row for row in rows if row["task"] == task}
        chance = next(iter(cell.values()))["chance"]
        maps: list[tuple[str, Any, str, dict]] = [
            (f"{task}\nright (chance {chance:.0%})", lambda row: row["accuracy"], "{:.0%}", dict(vmin=0, vmax=1)),
            ("nats gained", lambda row: row["nats_without"] - row["nats"], "{:+.2f}", dict(vmin=-most, vmax=most)),
        ]
        for ax, palette, (title, value, form, limits) in zip(column, ("viridis", "RdBu"), maps, strict=True):
            values = [[value(cell[depth, context]) for context in contexts] for depth in depths]
            ax.imshow(values, cmap=palette, aspect="auto", alpha=0.7, **limits)
            for y, line in enumerate(values):
                for x, number in enumerate(line):
                    ax.text(x, y, form.format(round(number, 2) + 0.0), ha="center", va="center", fontsize="small")
            ax.set_title(title, fontsize="medium", loc="left")
            ax.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts], rotation=45)
            ax.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
        column[1].set_xlabel("tokens of context")
    for ax in axes[:, 0]:
        ax.set_ylabel("depth")
    _save(figure, output)


def _log_edges(parts: list[dict]) -> list[float]:
    """List the edges of parts {start, end}; the first is half of the first end, for a logarithm has no 0."""
    return [max(part["start"], parts[0]["end"] / 2) for part in parts] + [parts[-1]["end"]]


def _wide_axes(x: str, y: str, names: list[str]):
    """Make (figure, axes, name -> colour), with the names beside the axes."""
    figure, axes = _axes(x, y)
    figure.set_size_inches(9, 5)
    return figure, axes, _name_beside(axes, names)


def _name_beside(axes, names: list[str]) -> dict:
    """Give each name a colour, and list them beside the axes."""
    names = list(dict.fromkeys(names))
    palette = pyplot.get_cmap("tab10" if len(names) <= 10 else "tab20")
    colours = {name: palette(number % palette.N) for number, name in enumerate(names)}
    handles = [pyplot.Line2D([], [], color=colour, label=_plain(name)) for name, colour in colours.items()]
    axes.legend(handles=handles, frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return colours


def _plain(name: str) -> str:
    """Make a name readable: a dollar begins a formula, an underscore before it hides a line from the legend."""
    return name.replace("$", r"\$").replace("_", "\u200b_", 1) if name.startswith("_") else name.replace("$", r"\$")


def _axes(x: str, y: str):
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    _style(axes, x, y)
    return figure, axes


def _style(axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _save(figure, output: Path) -> None:
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


FIRST_TOKENS = 16  # of a window, whose loss says nothing of far context


def bins_with_intervals(lines: list[tuple[str, list[dict]]], unigram: list[dict], x: str, y: str, output: Path) -> None:
    """Plot lines (name, bins {start, end, loss, interval}) over a logarithmic axis as PNG, intervals shaded.

    Bins {start, end, unigram} of a model that sees no context are drawn above, a nat as high as below: what moves there
    is the choice of texts. The first tokens, whose loss is far above, are left out.
    """
    late = any(part["start"] >= FIRST_TOKENS for _, parts in lines for part in parts)
    shown = [part for _, parts in lines for part in parts if not late or part["start"] >= FIRST_TOKENS]
    low, high = _limits([end for part in shown for end in part.get("interval") or [part["loss"]]])
    lowest, highest = _limits([part["unigram"] for part in unigram if not late or part["start"] >= FIRST_TOKENS])
    share = min(1.0, max(1 / 3, (highest - lowest) / (high - low)))  # of the height below
    figure, both = pyplot.subplots(
        2 if unigram else 1,
        figsize=(9, 5 + 4 * share * bool(unigram)),
        layout="constrained",
        sharex=True,
        squeeze=False,
        height_ratios=(share, 1) if unigram else None,
    )
    above, axes = both[0, 0], both[-1, 0]
    colours = _name_beside(axes, [name for name, _ in lines])
    if unigram:
        above.stairs([part["unigram"] for part in unigram], _log_edges(unigram), color="dimgray", baseline=None)
        _style(above, "", "unigram")
        middle, reach = (lowest + highest) / 2, share * (high - low) / 2
        above.set_ylim(middle - reach, middle + reach)
    for name, parts in lines:
        edges, (lows, highs) = _log_edges(parts), _ends(parts, "interval")
        axes.stairs([part["loss"] for part in parts], edges, color=colours[name], baseline=None, linewidth=1.5)
        shade = {"step": "post", "color": colours[name], "alpha": 0.13, "linewidth": 0}
        axes.fill_between(edges, [*lows, lows[-1]], [*highs, highs[-1]], **shade)
    _style(axes, x, y)
    axes.set_ylim(low, high)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if late:
        axes.set_xlim(left=FIRST_TOKENS / 2)
    _save(figure, output)


def _limits(values: list[float]) -> tuple[float, float]:
    """Return the ends of an axis that shows all values."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def over_contexts_with_intervals(
    panels: list[tuple[str, str, str]], lines: list[tuple[str, list[dict]]], output: Path
) -> None:
    """Plot panels (what the y axis shows, its field, the field of its interval) below each other as PNG, each with the
    lines (name, parts {context, …}). Lines stand a little beside each other, so that no interval covers another."""
    figure, axes = pyplot.subplots(len(panels), figsize=(9, 4 * len(panels)), layout="constrained", sharex=True)
    contexts = sorted({part["context"] for _, parts in lines for part in parts})
    for (y, key, interval), ax in zip(panels, axes, strict=True):
        colours = _name_beside(ax, [name for name, _ in lines])
        for number, (name, parts) in enumerate(lines):
            x = [part["context"] * 2 ** (0.05 * (number - (len(lines) - 1) / 2)) for part in parts]
            values, (low, high) = np.array([part[key] for part in parts], dtype=float), _ends(parts, interval)
            reach = np.maximum((values - low, high - values), 0)
            ax.errorbar(x, values, reach, fmt="o-", color=colours[name], markersize=4, linewidth=1.2, capsize=2)
        _style(ax, "", y)
        ax.set_xscale("log", base=2)
        ax.set_xticks(contexts, [f"{context:,}" for context in contexts])
        ax.minorticks_off()
    axes[-1].set_xlabel("tokens of context")
    _save(figure, output)


def heat_maps(panels: list[tuple[str, list[dict]]], output: Path) -> None:
    """Plot panels (name, cells {context, depth, accuracy}) beside each other as PNG: depth below, context to the right.

    A cell without a depth fills its column; the colours go from 0 to 100 % in every panel.
    """
    contexts = sorted({cell["context"] for _, cells in panels for cell in cells})
    depths = sorted({-1.0 if cell["depth"] is None else cell["depth"] for _, cells in panels for cell in cells})
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    size = (1.6 + across * max(2.2, 0.75 * len(contexts)), down * (1.1 + 0.42 * max(2, len(depths))))
    figure, axes = pyplot.subplots(
        down, across, figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True
    )
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
        ax.set_title(_plain(name), fontsize="medium")
        ax.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
        ax.set_yticks(range(len(depths)), ["" if depth < 0 else f"{depth:.0%}" for depth in depths])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    figure.supxlabel("tokens of context", fontsize="medium")
    if depths != [-1.0]:
        figure.supylabel("depth", fontsize="medium")
    figure.colorbar(image, ax=axes, format=PercentFormatter(1), label="right answers", pad=0.02)
    _save(figure, output)


def _ends(parts: list[dict], key: str) -> tuple[list[float], list[float]]:
    """List the lower and upper ends of parts' intervals; nan where there is none."""
    intervals = [part.get(key) or (float("nan"), float("nan")) for part in parts]
    return [low for low, _ in intervals], [high for _, high in intervals]
