"""Compare runs: what each cost and reached, and whether that may be compared."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable

import numpy as np

from lcpt.evaluation.compared_runs import Run, by_seed, distinct, group_by_setting
from lcpt.evaluation.mean_parts import context_gains, retrieval_summary
from lcpt.evaluation.setting_differences import scoring, setting_differences
from lcpt.model.cost import model_cost
from lcpt.model.pretrained import model_config

SCHEMA_VERSION = 1
LAST = 20  # the training loss of a run is the mean of its last 20th: that of one step depends on its batch


def figures(run: Run) -> dict[str, float | None]:
    """Compute what a run cost and reached; None where it was not measured."""
    model = run.config["model"]
    cost = model_cost(model_config(model, run.folder / "config.yaml"), last_context(run))
    step_seconds = statistics.median(row["step_seconds"] for row in run.rows)
    tokens = [row["tokens"] for row in run.rows]  # phases have batches of their own
    seconds_a_token = [
        row["step_seconds"] / (now - before) for row, before, now in zip(run.rows, [0, *tokens], tokens, strict=False)
    ]
    last = [row["loss"] for row in run.rows[-max(1, len(run.rows) // LAST) :] if row["loss"] is not None]
    validated = [row for row in run.rows if "valid_loss" in row][-1:] or [{}]
    repeated, rare = repeated_bigrams(run)
    summary = retrieval_summary(run)
    return {
        "parameters": cost.parameters,
        "tokens": tokens[-1],
        "loss": statistics.fmean(last) if last else None,
        "valid_loss": validated[0].get("valid_loss"),
        "valid_bits_per_byte": validated[0].get("valid_bits_per_byte"),
        "evaluation_loss": run.evaluation and run.evaluation["loss"],
        "evaluation_bits_per_byte": run.evaluation and run.evaluation["bits_per_byte"],
        "loss_last_quarter": run.evaluation and _loss_last_quarter(run.evaluation),
        "context_gain": _context_gain(run),
        "loss_repeated_bigrams": repeated.get("loss"),
        "loss_rare_bigrams": rare.get("loss"),
        "loss_other_tokens": repeated.get("other_loss"),
        "recall": run.recall and run.recall["accuracy"],
        "retrieval": statistics.fmean(part["accuracy"] for part in summary) if summary else None,
        "step_milliseconds": 1e3 * step_seconds,
        "tokens_per_second": 1 / statistics.median(seconds_a_token),
        "state_bytes": cost.state_bytes,
    }


def last_context(run: Run) -> int:
    """Return the context that a run ends with: that of its last phase, if it has phases."""
    last = (run.config.get("phases") or [{"data": {}}])[-1]
    return last["data"].get("context", run.config["data"]["context"])


def _loss_last_quarter(evaluation: dict) -> float | None:
    """Average the loss of the tokens in the last quarter of their window; None where state is carried past it."""
    if evaluation["carry_state"]:
        return None
    late = [part for part in evaluation["loss_by_position"] if part["start"] >= 0.75 * evaluation["window"]]
    tokens = sum(part["tokens"] for part in late)
    return sum(part["loss"] * part["tokens"] for part in late) / tokens if tokens else None


def _context_gain(run: Run) -> float | None:
    """Return how far the longest context lowers the loss of the same tokens."""
    contexts = context_gains(run)
    return contexts[-1]["gain"] if contexts else None


def repeated_bigrams(run: Run) -> tuple[dict, dict]:
    """Return what the evaluation says of (repeated bigrams, the rare ones among them); {} where it does not."""
    repeated = (run.evaluation or {}).get("repeated_bigrams", {})
    return repeated, repeated.get("rare") or {}


def kinds(run: Run) -> str:
    """Name the kinds of a run's layers: "polysketch", or "3 polysketch, 1 softmax"."""
    counts = Counter(model_config(run.config["model"], run.folder / "config.yaml").kinds)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) if len(counts) > 1 else next(iter(counts))


def compare(runs: list[Run]) -> dict:
    """Compare runs: `rows`, one a setting, every figure as {mean, spread}; `paired`, each setting's difference to the
    first on the same documents; `runs`, the figures of each; `warnings`.

    Runs of one seed are averaged and count as one; the spread is the standard deviation over seeds, None of one. A
    folder that is given again does not count again.
    """
    twice, runs = len(runs) > len(distinct(runs)), distinct(runs)
    measured = {id(run): figures(run) for run in runs}
    settings = group_by_setting(runs)
    rows = []
    for name, group in settings.items():
        seeds = [[measured[id(run)] for run in same] for same in by_seed(group).values()]
        rows.append(
            {
                "name": name,
                "kinds": kinds(group[0]),
                "seeds": list(by_seed(group)),
                "runs": len(group),
                **{
                    figure: _mean_and_spread([[one[figure] for one in same] for same in seeds])
                    for figure in seeds[0][0]
                },
            }
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "rows": rows,
        "paired": setting_differences(settings),
        "runs": [{"run": str(run.folder), "seed": run.seed, **measured[id(run)]} for run in runs],
        "warnings": ["a run that was given twice counts once"] * twice + _of_one_seed(settings) + warnings(runs),
    }


def _of_one_seed(settings: dict[str, list[Run]]) -> list[str]:
    return [
        f"{len(same)} runs of {name} have seed {seed}; their mean counts as one seed"
        for name, group in settings.items()
        for seed, same in by_seed(group).items()
        if len(same) > 1
    ]


def _mean_and_spread(values: list[list[float | None]]) -> dict[str, float | None]:
    """Average over the runs of each seed, then over seeds; what was not measured does not count."""
    known = [[value for value in same if value is not None] for same in values]
    means = [statistics.fmean(same) for same in known if same]
    return {
        "mean": statistics.fmean(means) if means else None,
        "spread": statistics.stdev(means) if means[1:] else None,
    }


MUST_AGREE: dict[str, Callable[[Run], object]] = {
    "vocabularies": lambda run: run.config["model"]["vocab_size"],
    "contexts": last_context,
    "training data": lambda run: run.fingerprint,
    "numbers of tokens": lambda run: run.rows[-1]["tokens"],
    "validation data": lambda run: (first_valid_path(run.config["data"]), run.config["training"]["valid_tokens"]),
    "texts in evaluation.json": lambda run: run.evaluation and run.evaluation["fingerprint"],
    "scoring in evaluation.json": lambda run: (
        run.evaluation and ", ".join(f"{name} {value}" for name, value in scoring(run.evaluation).items())
    ),
    "contexts of the context gain": lambda run: (
        ", ".join(f"{part['context']:,}" for part in context_gains(run) or []) or None
    ),
    "tasks in recall.json": lambda run: run.recall and (run.recall["fingerprint"], run.recall["context"]),
    "tasks in retrieval.json": lambda run: run.retrieval and run.retrieval["fingerprint"],
    "devices": lambda run: run.device,
}


def first_valid_path(data: dict) -> str | None:
    """Return what the plain valid_loss of a run is of; a config of earlier versions has no data.valid."""
    return next(iter((data.get("valid") or {"": data["valid_path"]}).values()))


def warnings(runs: list[Run]) -> list[str]:
    """List why these runs should not be compared, a line a reason; what a run has not measured is no reason."""
    found = [f"{run.name} is not finished, or was ended early" for run in runs if not run.finished]
    for what, value_of in MUST_AGREE.items():
        names: dict[object, list[str]] = {}
        for run in runs:
            if (value := value_of(run)) is not None:
                names.setdefault(value, []).append(run.name)
        if len(names) > 1:
            who = "; ".join(f"{_short(value)}: {', '.join(several)}" for value, several in names.items())
            found.append(f"different {what}: {who}")
    return found


def _short(value: object) -> str:
    """Shorten a value for a warning: a fingerprint to its beginning."""
    parts = value if isinstance(value, tuple) else (value,)
    return " ".join(
        f"{part:,}" if type(part) is int else str(part)[-80:][: 12 if len(str(part)) == 64 else 80] for part in parts
    )


def loss_over(run: Run, wall_time: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, or seconds of all steps so far; training loss, a running mean over a 50th of the steps)."""
    rows = [row for row in run.rows if row["loss"] is not None]
    seconds = list(itertools.accumulate(row["step_seconds"] for row in rows))
    x = np.array(seconds if wall_time else [row["tokens"] for row in rows], dtype=float)
    width = max(1, len(rows) // 50)
    loss = np.convolve([row["loss"] for row in rows], np.full(width, 1 / width), mode="valid")
    return x[width - 1 :], loss
