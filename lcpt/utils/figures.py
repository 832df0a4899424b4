"""Give every picture one look: what it shows above it, where the figures come from below it, axes that do not flatter.

figure, axes = new_figure(Heading("Loss", "runs/demo", "cpu, fp32"), "tokens", "loss (nats a token)")
axes.plot(…)
save(figure, output)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullLocator

WIDTH = 9.0  # inches
LEAST_SPAN = 0.1  # of a loss axis, as a share of the loss: noise stays small


class Heading:
    """States what a picture shows, and what its figures hold for: run, device, dtype, kind of interval. Facts that are
    not known are left out."""

    def __init__(self, title: str, *facts: str | None):
        self.title = plain(title)
        self.facts = plain(" · ".join(fact for fact in facts if fact))


def new_figure(heading: Heading, x: str, y: str, height: float = 5.0):
    """Make (figure, its axes with labels)."""
    figure, axes = new_panels(heading, 1, height=height)
    style(axes[0, 0], x, y)
    return figure, axes[0, 0]


def new_panels(heading: Heading, rows: int, columns: int = 1, *, width: float = WIDTH, height: float, **options):
    """Make (figure, its axes [rows, columns]); options are those of pyplot.subplots."""
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
    )
    figure.suptitle(heading.title, x=0.01, horizontalalignment="left", fontsize="large", wrap=True)
    if heading.facts:
        figure.supxlabel(
            heading.facts, x=0.01, horizontalalignment="left", fontsize="small", color="dimgray", wrap=True
        )
    return figure, axes


def style(axes, x: str, y: str) -> None:
    """Label axes, and draw a pale grid without a frame."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def save(figure, output: Path) -> None:
    """Write a figure as PNG, and let go of it."""
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def name_beside(axes, names: Iterable[str], more: Iterable = ()) -> dict[str, Any]:
    """Give each name a colour, and list them beside the axes, then the handles `more`."""
    names = list(dict.fromkeys(names))
    palette = pyplot.get_cmap("tab10" if len(names) <= 10 else "tab20")
    colours = {name: palette(number % palette.N) for number, name in enumerate(names)}
    handles = [pyplot.Line2D([], [], color=colour, label=plain(name)) for name, colour in colours.items()] + list(more)
    axes.legend(handles=handles, frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return colours


def plain(text: str) -> str:
    """Make a text safe to draw: a dollar begins a formula, an underscore in front hides a line from the legend."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def limits(values: Iterable[float], least_span: float = 0.0) -> tuple[float, float]:
    """Return the ends of an axis that shows all values, with a margin, and spans `least_span` at least."""
    values = [value for value in values if math.isfinite(value)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    wanted = max(1.1 * (high - low), least_span) or 0.2
    more = (wanted - (high - low)) / 2
    return low - more, high + more


def loss_limits(values: Iterable[float]) -> tuple[float, float]:
    """Return the ends of an axis of losses: a tenth of the loss at least, or noise looks like structure."""
    values = [value for value in values if math.isfinite(value)]
    return limits(values, LEAST_SPAN * max(values, default=1.0))


def powers_of_two(axis) -> None:
    """Make an x axis logarithmic, its ticks whole numbers."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_locator(NullLocator())


def log_y(axis) -> None:
    """Make the y axis of lines logarithmic, from one of 1, 2, 5, 10 … to another: two labels at least."""
    values = [float(y) for line in axis.lines for y in line.get_ydata() if y > 0] or [1.0]
    low, high = _one_two_five(min(values), down=True), _one_two_five(max(values), down=False)
    high = max(high, 2 * low)
    axis.set_yscale("log")
    axis.set_ylim(0.95 * low, 1.05 * high)  # what lies at an end is still seen
    axis.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high <= 1000 * low else (1,), numticks=20))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_locator(NullLocator())


def _one_two_five(value: float, *, down: bool) -> float:
    """Return the nearest of …, 0.5, 1, 2, 5, 10, … that is not above (down) or not below the value."""
    decade = 10.0 ** math.floor(math.log10(value))
    steps = [decade * step for step in (1, 2, 5, 10)]
    if down:
        return max(step for step in steps if step <= value * (1 + 1e-9))
    return min(step for step in steps if step >= value * (1 - 1e-9))
