"""Pictures of a run: its loss over tokens, and the loss of an evaluation over positions."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  the backend comes first


def loss_curve(metrics: Path, output: Path) -> None:
    """Training and validation loss of a metrics.jsonl over tokens, as PNG."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = _axes("tokens", "loss (nats a token)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.plot([r["tokens"] for r in rows], [r["loss"] for r in rows], color="tab:blue", label="training")
    measured = [r for r in rows if "valid_loss" in r]
    axes.plot([r["tokens"] for r in measured], [r["valid_loss"] for r in measured], "o-", color="tab:orange",
              label="validation")
    axes.legend(frameon=False)
    _save(figure, output)


def loss_by_position(report: dict, output: Path) -> None:
    """The loss_by_position of an evaluation, as PNG: falling as long as more context helps."""
    figure, axes = _axes("tokens of context before the predicted one", "loss (nats a token)")
    bins = report["loss_by_position"]
    edges = [max(b["start"], bins[0]["end"] / 2) for b in bins] + [bins[-1]["end"]]  # a logarithm has no 0
    axes.stairs([b["loss"] for b in bins], edges, color="tab:blue", baseline=None)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.axhline(report["loss"], color="gray", linestyle=":", label=f"mean {report['loss']:.3f}")
    axes.legend(frameon=False)
    _save(figure, output)


def _axes(x: str, y: str):
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure, output: Path) -> None:
    figure.savefig(output, dpi=120)
    pyplot.close(figure)
