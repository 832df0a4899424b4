"""Compare runs: what each cost and reached, and whether that may be compared."""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from omegaconf import OmegaConf

from lcpt.checkpoint import CheckpointError, find_checkpoint, read_state
from lcpt.data import DataError
from lcpt.model.cost import model_cost
from lcpt.model.pretrained import model_config
from lcpt.utils.errors import first_line

SCHEMA_VERSION = 1
LAST = 20  # the training loss of a run is the mean of its last 20th: that of one step depends on its batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Holds what a run folder says of a run."""

    folder: Path
    config: dict  # of config.yaml
    rows: list[dict]  # of metrics.jsonl, a step each; without step 0, which is a validation alone
    evaluation: dict | None  # of evaluation.json, which tools/evaluate.py wrote
    recall: dict | None  # of recall.json, which it wrote too
    fingerprint: str  # of its training data
    device: str
    finished: bool

    @property
    def name(self) -> str:
        return self.folder.name

    def setting(self) -> str:
        """Return a key that is equal for runs that differ in their seed alone."""
        return json.dumps({section: keys for section, keys in self.config.items() if section != "run"}, sort_keys=True)


def read_run(folder: str | Path) -> Run:
    """Read a run folder. Raises DataError naming the file that is missing or cannot be understood."""
    folder = Path(os.path.abspath(folder))  # so that `.` has a name
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise DataError(f"{folder} is no run folder: it has no {name}")
    try:
        config = cast(dict, OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a run may be writing the last one
        rows = [row for row in rows if row["step"]]
        others = [_read_json(folder / f"{name}.json") for name in ("evaluation", "recall", "environment")]
    except Exception as error:  # a YAML parser's errors have no common class
        raise DataError(f"{folder}: a file of this run is damaged ({first_line(error)})") from None
    if not rows:
        raise DataError(f"{folder}: this run has not made a step yet")
    evaluation, recall, environment = others
    try:
        fingerprint = read_state(find_checkpoint(folder))["data fingerprint"]
    except CheckpointError:  # not saved yet
        fingerprint = config["data"]["path"] or str(config["data"]["sources"])
    return Run(
        folder=folder,
        config=config,
        rows=rows,
        evaluation=evaluation,
        recall=recall,
        fingerprint=fingerprint,
        device=(environment or {}).get("device", "unknown"),
        finished=(folder / "summary.json").exists(),
    )


def _read_json(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


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
    return {
        "parameters": cost.parameters,
        "tokens": tokens[-1],
        "loss": statistics.fmean(last) if last else None,
        "valid_loss": validated[0].get("valid_loss"),
        "valid_bits_per_byte": validated[0].get("valid_bits_per_byte"),
        "evaluation_loss": run.evaluation and run.evaluation["loss"],
        "evaluation_bits_per_byte": run.evaluation and run.evaluation["bits_per_byte"],
        "loss_last_quarter": run.evaluation and _loss_last_quarter(run.evaluation),
        "loss_repeated_bigrams": repeated.get("loss"),
        "loss_rare_bigrams": rare.get("loss"),
        "loss_other_tokens": repeated.get("other_loss"),
        "recall": run.recall and run.recall["accuracy"],
        "step_milliseconds": 1e3 * step_seconds,
        "tokens_per_second": 1 / statistics.median(seconds_a_token),
        "state_bytes": cost.state_bytes,
    }


def last_context(run: Run) -> int:
    """Return the context that a run ends with: that of its last phase, if it has phases."""
    last = (run.config.get("phases") or [{"data": {}}])[-1]
    return last["data"].get("context", run.config["data"]["context"])


def _loss_last_quarter(evaluation: dict) -> float | None:
    """Average the loss of the tokens in the last quarter of their window."""
    late = [part for part in evaluation["loss_by_position"] if part["start"] >= 0.75 * evaluation["window"]]
    tokens = sum(part["tokens"] for part in late)
    return sum(part["loss"] * part["tokens"] for part in late) / tokens if tokens else None


def repeated_bigrams(run: Run) -> tuple[dict, dict]:
    """Return what the evaluation says of (repeated bigrams, the rare ones among them); {} where it does not."""
    repeated = (run.evaluation or {}).get("repeated_bigrams", {})
    return repeated, repeated.get("rare") or {}


def kinds(run: Run) -> str:
    """Name the kinds of a run's layers: "polysketch", or "3 polysketch, 1 softmax"."""
    counts = Counter(model_config(run.config["model"], run.folder / "config.yaml").kinds)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) if len(counts) > 1 else next(iter(counts))


def group_by_setting(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Group runs that differ in their seed alone, each group under a name of its own."""
    by_setting: dict[str, list[Run]] = {}
    for run in runs:
        by_setting.setdefault(run.setting(), []).append(run)
    named: dict[str, list[Run]] = {}
    for group in by_setting.values():
        common = os.path.commonprefix([run.name for run in group]).rstrip("-_.0123456789") if group[1:] else ""
        name = common or group[0].name
        named[name if name not in named else str(group[0].folder)] = group
    return named


def compare(runs: list[Run]) -> dict:
    """Compare runs: `rows`, one a setting, every figure as {mean, spread}; `runs`, the figures of each; `warnings`.

    The spread is the standard deviation over seeds, None of one. A folder that is given again does not count again.
    """
    twice, runs = len(runs) > len(distinct(runs)), distinct(runs)
    measured = {id(run): figures(run) for run in runs}
    rows = []
    for name, group in group_by_setting(runs).items():
        both = [measured[id(run)] for run in group]
        rows.append(
            {
                "name": name,
                "kinds": kinds(group[0]),
                "seeds": [run.config["run"]["seed"] for run in group],
                **{figure: _mean_and_spread([one[figure] for one in both]) for figure in both[0]},
            }
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "rows": rows,
        "runs": [{"run": str(run.folder), "seed": run.config["run"]["seed"], **measured[id(run)]} for run in runs],
        "warnings": ["a run that was given twice counts once"] * twice + warnings(runs),
    }


def distinct(runs: list[Run]) -> list[Run]:
    """Keep each run folder once."""
    first: dict[Path, Run] = {}
    for run in runs:
        first.setdefault(run.folder.resolve(), run)
    return list(first.values())


def _mean_and_spread(values: list[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "spread": statistics.stdev(known) if known[1:] else None,
    }


MUST_AGREE: dict[str, Callable[[Run], object]] = {
    "vocabularies": lambda run: run.config["model"]["vocab_size"],
    "contexts": last_context,
    "training data": lambda run: run.fingerprint,
    "numbers of tokens": lambda run: run.rows[-1]["tokens"],
    "validation data": lambda run: (first_valid_path(run.config["data"]), run.config["training"]["valid_tokens"]),
    "texts in evaluation.json": lambda run: run.evaluation and run.evaluation["fingerprint"],
    "windows in evaluation.json": lambda run: (
        run.evaluation and (run.evaluation["window"], run.evaluation["stride"], run.evaluation["carry_state"])
    ),
    "tasks in recall.json": lambda run: run.recall and (run.recall["fingerprint"], run.recall["context"]),
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
        f"{part:,}" if type(part) is int else str(part)[-40:][: 12 if len(str(part)) == 64 else 40] for part in parts
    )


def loss_over(run: Run, wall_time: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, or seconds of all steps so far; training loss, a running mean over a 50th of the steps)."""
    rows = [row for row in run.rows if row["loss"] is not None]
    seconds = list(itertools.accumulate(row["step_seconds"] for row in rows))
    x = np.array(seconds if wall_time else [row["tokens"] for row in rows], dtype=float)
    width = max(1, len(rows) // 50)
    loss = np.convolve([row["loss"] for row in rows], np.full(width, 1 / width), mode="valid")
    return x[width - 1 :], loss
