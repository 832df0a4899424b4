"""Plot a run, and runs side by side: loss over tokens, time and positions, recall over distances."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported
from matplotlib import pyplot


def loss_curve(metrics: Path, output: Path) -> None:
    """Plot training and validation loss of a metrics.jsonl over tokens, as PNG."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = _axes("tokens", "loss (nats a token)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.plot([r["tokens"] for r in rows], [r["loss"] for r in rows], color="tab:blue", label="training")
    measured = [r for r in rows if "valid_loss" in r]
    axes.plot(
        [r["tokens"] for r in measured],
        [r["valid_loss"] for r in measured],
        "o-",
        color="tab:orange",
        label="validation",
    )
    axes.legend(frameon=False)
    _save(figure, output)


def loss_by_position(report: dict, output: Path) -> None:
    """Plot the loss_by_position of an evaluation, as PNG: it falls as long as more context helps."""
    figure, axes = _axes("tokens of context before the predicted one", "loss (nats a token)")
    bins = report["loss_by_position"]
    edges = [max(b["start"], bins[0]["end"] / 2) for b in bins] + [bins[-1]["end"]]  # a logarithm has no 0
    axes.stairs([b["loss"] for b in bins], edges, color="tab:blue", baseline=None)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.axhline(report["loss"], color="gray", linestyle=":", label=f"mean {report['loss']:.3f}")
    axes.legend(frameon=False)
    _save(figure, output)


def curves(lines: list[tuple[str, Sequence[float], Sequence[float]]], x: str, y: str, output: Path) -> None:
    """Plot lines (name, x values, y values) as PNG, those of one name in one colour."""
    figure, axes, colours = _wide_axes(x, y, [name for name, *_ in lines])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    for name, *values in lines:
        axes.plot(*values, color=colours[name], linewidth=1)
    _save(figure, output)


def steps(lines: list[tuple[str, list[dict]]], key: str, x: str, y: str, output: Path) -> None:
    """Plot lines (name, parts {start, end, <key>}) over a logarithmic axis as PNG, those of one name in one colour."""
    figure, axes, colours = _wide_axes(x, y, [name for name, _ in lines])
    for name, parts in lines:
        edges = [max(part["start"], parts[0]["end"] / 2) for part in parts] + [parts[-1]["end"]]
        axes.stairs([part[key] for part in parts], edges, color=colours[name], baseline=None)
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


def _wide_axes(x: str, y: str, names: list[str]):
    """Make (figure, axes, name -> colour), with the names beside the axes."""
    figure, axes = _axes(x, y)
    figure.set_size_inches(9, 5)
    names = list(dict.fromkeys(names))
    palette = pyplot.get_cmap("tab10" if len(names) <= 10 else "tab20")
    colours = {name: palette(number % palette.N) for number, name in enumerate(names)}
    handles = [pyplot.Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    axes.legend(handles=handles, frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure, axes, colours


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
