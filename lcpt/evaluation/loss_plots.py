"""Plot losses and what a model remembers: over tokens, time, positions and distances, one run or runs side by side.

A line is (name, what it shows); lines of one name, such as the seeds of a setting, have one colour."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from lcpt.evaluation.intervals import FEW
from lcpt.utils.figures import (
    Heading,
    limits,
    loss_limits,
    name_beside,
    new_figure,
    new_panels,
    powers_of_two,
    save,
    style,
)

FIRST_TOKENS = 16  # of a window, whose loss says nothing of far context
LOSS = "loss (nats a token)"


def loss_curve(heading: Heading, metrics: Path, output: Path) -> None:
    """Plot training and validation loss of a metrics.jsonl over tokens, as PNG."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = new_figure(heading, "tokens", LOSS)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    keys = list(dict.fromkeys(key for row in rows for key in row if key.startswith("valid_loss")))
    lines = {"loss": "training"}
    lines |= {key: f"validation: {key.partition('/')[2]}" for key in keys[1:]} or {"valid_loss": "validation"}
    colours = name_beside(axes, lines.values())
    for key, label in lines.items():
        measured = [r for r in rows if key in r]  # at step 0 there is a validation alone
        line = "-" if key == "loss" else "o-"
        axes.plot([r["tokens"] for r in measured], [r[key] for r in measured], line, color=colours[label], label=label)
    axes.set_ylim(*loss_limits([row[key] for key in lines for row in rows if key in row]))
    save(figure, output)


def loss_by_position(heading: Heading, report: dict, output: Path) -> None:
    """Plot the loss_by_position of an evaluation, as PNG: it falls as long as more context helps.

    Where the text of all bins is alike, the unigram, which sees no context, is flat. Of few documents intervals would
    be most of the picture, and say little: they are left out.
    """
    figure, axes = new_figure(heading, "tokens of context before the predicted one", LOSS)
    bins, mean = report["loss_by_position"], f"mean {report['loss']:.3f}"
    edges, documents = _log_edges(bins), report.get("documents_scored", 0)  # earlier reports do not say
    with_unigram = all("unigram" in b for b in bins)
    with_intervals = documents >= FEW and all(b.get("interval") for b in bins)
    said = f"95 % over {documents:,} documents" if with_intervals else f"{documents or 'few'} documents: no interval"
    shade = Patch(color="tab:blue" if with_intervals else "none", alpha=0.2, label=said)
    colours = name_beside(axes, ["model", *["unigram: no context"] * with_unigram, mean], [shade])
    axes.stairs([b["loss"] for b in bins], edges, color=colours["model"], baseline=None)
    shown = [b["loss"] for b in bins]
    if with_intervals:
        low, high = _ends(bins, "interval")
        axes.stairs(high, edges, baseline=low, fill=True, color=colours["model"], alpha=0.2)
        shown += low + high
    if with_unigram:
        axes.stairs([b["unigram"] for b in bins], edges, color=colours["unigram: no context"], baseline=None)
        shown += [b["unigram"] for b in bins]
    axes.axhline(report["loss"], color=colours[mean], linestyle=":")
    axes.set_ylim(*loss_limits(shown))
    powers_of_two(axes)
    save(figure, output)


def recall_by_distance(heading: Heading, lines: list[tuple[str, list[dict]]], chance: float | None, output: Path):
    """Plot lines (name, recall_by_distance of an evaluation) as PNG, and what a guess is worth where that is known."""
    figure, axes = new_figure(heading, "tokens from the answer to its question", "right answers")
    guess = "" if chance is None else f"chance, {100 * chance:.1f} %"
    colours = name_beside(axes, [name for name, _ in lines] + [guess] * bool(guess))
    _stairs(axes, lines, "accuracy", colours)
    if chance is not None:
        axes.axhline(chance, color=colours[guess], linestyle=":")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(-0.03, 1.05)
    save(figure, output)


def loss_by_distance(heading: Heading, lines: list[tuple[str, list[dict]]], x: str, y: str, output: Path) -> None:
    """Plot lines (name, parts {start, end, loss}) over a logarithmic axis as PNG."""
    figure, axes = new_figure(heading, x, y)
    _stairs(axes, lines, "loss", name_beside(axes, [name for name, _ in lines]))
    axes.set_ylim(*loss_limits([part["loss"] for _, parts in lines for part in parts]))
    save(figure, output)


def training_losses(
    heading: Heading,
    lines: Sequence[tuple[str, Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]],
    x: str,
    output: Path,
) -> None:
    """Plot lines (name, x values, losses) as PNG; their first tenth, where a loss falls from far above, may leave the
    picture."""
    figure, axes = new_figure(heading, x, "training loss (nats), running mean")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    colours = name_beside(axes, [name for name, *_ in lines])
    for name, *values in lines:
        axes.plot(*values, color=colours[name], linewidth=1)
    axes.set_ylim(*loss_limits([value for _, _, values in lines for value in values[len(values) // 10 :]]))
    save(figure, output)


def bins_with_intervals(
    heading: Heading, lines: list[tuple[str, list[dict]]], unigram: list[dict], output: Path
) -> None:
    """Plot lines (name, bins {start, end, loss, interval}) over a logarithmic axis as PNG, intervals shaded.

    Bins {start, end, unigram} of a model that sees no context are drawn above, a nat as high as below: what moves there
    is the choice of texts. The first tokens, whose loss is far above, are left out.
    """
    late = any(part["start"] >= FIRST_TOKENS for _, parts in lines for part in parts)
    shown = [part for _, parts in lines for part in parts if not late or part["start"] >= FIRST_TOKENS]
    low, high = loss_limits([end for part in shown for end in part.get("interval") or [part["loss"]]])
    lowest, highest = limits([part["unigram"] for part in unigram if not late or part["start"] >= FIRST_TOKENS])
    share = min(1.0, max(1 / 3, (highest - lowest) / (high - low)))  # of the height below
    figure, panels = new_panels(
        heading,
        2 if unigram else 1,
        height=5 + 4 * share * bool(unigram),
        sharex=True,
        height_ratios=(share, 1) if unigram else None,
    )
    above, axes = panels[0, 0], panels[-1, 0]
    colours = name_beside(axes, [name for name, _ in lines])
    if unigram:
        above.stairs([part["unigram"] for part in unigram], _log_edges(unigram), color="dimgray", baseline=None)
        style(above, "", "unigram")
        middle, reach = (lowest + highest) / 2, share * (high - low) / 2
        above.set_ylim(middle - reach, middle + reach)
    for name, parts in lines:
        edges, (lows, highs) = _log_edges(parts), _ends(parts, "interval")
        axes.stairs([part["loss"] for part in parts], edges, color=colours[name], baseline=None, linewidth=1.5)
        shade = {"step": "post", "color": colours[name], "alpha": 0.13, "linewidth": 0}
        axes.fill_between(edges, [*lows, lows[-1]], [*highs, highs[-1]], **shade)
    style(axes, "tokens of context before the predicted one", LOSS)
    axes.set_ylim(low, high)
    powers_of_two(axes)
    if late:
        axes.set_xlim(left=FIRST_TOKENS / 2)
    save(figure, output)


def context_gain(heading: Heading, lines: list[tuple[str, list[dict]]], output: Path) -> None:
    """Plot lines (name, parts {context, loss, interval, gain, gain_interval}) as PNG: losses above, gains below. Lines
    stand a little beside each other, so that no interval covers another."""
    panels = [(LOSS, "loss", "interval"), ("gain over the least context (nats)", "gain", "gain_interval")]
    figure, axes = new_panels(heading, len(panels), height=8, sharex=True)
    contexts = sorted({part["context"] for _, parts in lines for part in parts})
    for (y, key, interval), ax in zip(panels, axes[:, 0], strict=True):
        colours, shown = name_beside(ax, [name for name, _ in lines]), [0.0] * (key == "gain")
        for number, (name, parts) in enumerate(lines):
            x = [part["context"] * 2 ** (0.05 * (number - (len(lines) - 1) / 2)) for part in parts]
            values, (low, high) = np.array([part[key] for part in parts], dtype=float), _ends(parts, interval)
            reach = np.maximum((values - low, high - values), 0)
            ax.errorbar(x, values, reach, fmt="o-", color=colours[name], markersize=4, linewidth=1.2, capsize=2)
            shown += [*values, *low, *high]
        style(ax, "", y)
        ax.set_ylim(*(loss_limits(shown) if key == "loss" else limits(shown, least_span=0.05)))
        powers_of_two(ax)
        ax.set_xticks(contexts)
    axes[0, 0].get_legend().set_visible(len(lines) > 1)
    axes[-1, 0].get_legend().remove()
    axes[-1, 0].axhline(0, color="gray", linewidth=0.8)
    axes[-1, 0].set_xlabel("tokens of context")
    save(figure, output)


def _stairs(axes, lines: list[tuple[str, list[dict]]], key: str, colours: dict) -> None:
    """Draw lines (name, parts {start, end, <key>}) over a logarithmic axis; one that another covers shows beside it."""
    for number, (name, parts) in enumerate(lines):
        width = min(6.0, 1.2 + 1.3 * (len(lines) - 1 - number))
        edges = _log_edges(parts)
        axes.stairs([part[key] for part in parts], edges, color=colours[name], baseline=None, linewidth=width)
    powers_of_two(axes)


def _log_edges(parts: list[dict]) -> list[float]:
    """List the edges of parts {start, end}; the first is half of the first end, for a logarithm has no 0."""
    return [max(part["start"], parts[0]["end"] / 2) for part in parts] + [parts[-1]["end"]]


def _ends(parts: list[dict], key: str) -> tuple[list[float], list[float]]:
    """List the lower and upper ends of parts' intervals; nan where there is none."""
    intervals = [part.get(key) or (float("nan"), float("nan")) for part in parts]
    return [low for low, _ in intervals], [high for _, high in intervals]
