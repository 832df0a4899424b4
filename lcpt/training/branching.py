"""Begin a run as a branch of another: with its weights, moments and place in the data, on a schedule of its own.

So one trunk, trained at a constant rate, serves many annealing runs, and a finished model goes on at a longer context.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from lcpt.checkpoint import CheckpointError, open_checkpoint, read_state
from lcpt.data import Drawn, find_tokenizer
from lcpt.training.phases import MAY_CHANGE, divide
from lcpt.training.same_run import CHANGEABLE, flatten, listed, saved_drawn, saved_model, shown
from lcpt.training.telemetry import log_rank0
from lcpt.utils.hashing import file_sha256

if TYPE_CHECKING:
    from lcpt.config import Config

KEYS = ("branched from", "data before")  # that every checkpoint of a branch has in its state


def find_trunk(config: Config) -> tuple[Path, dict]:
    """Find the step folder of training.branch_from, whole; returns it, and what the branch's checkpoints say of it.

    Raises CheckpointError where there is none, ValueError where it has another model or seed.
    """
    try:
        step, _ = open_checkpoint(config.training.branch_from or "")
    except CheckpointError as error:
        raise CheckpointError(f"training.branch_from: {error}") from None
    state, then = read_state(step), saved_model(step)
    then |= {key: value for key, value in state.items() if key in then} | {"run.seed": state["run.seed"]}
    now = flatten(asdict(divide(config)[0].config.model), "model") | {"run.seed": config.run.seed}
    may_change = (*CHANGEABLE, *(f"model.{key}" for key in MAY_CHANGE["model"]))
    changes = {name: (then.get(name), value) for name, value in now.items() if then.get(name) != value}
    differing = {name: values for name, values in changes.items() if not name.startswith(may_change)}
    if differing:
        raise ValueError(
            f"training.branch_from: {step} has {listed(differing)}; a branch is of the same model and seed, "
            "training.init_from takes other runs' weights"
        )
    if "data drawn" not in state:
        raise ValueError(f"training.branch_from: {step} is of an older lcpt and does not say what was drawn; train on")
    for name, (old, new) in changes.items():
        log_rank0(f"{name} {shown(old)} -> {shown(new)}")
    drawn = {path: each._asdict() for path, each in saved_drawn(state).items()}
    return step, dict(zip(KEYS, (str(step), drawn), strict=True))


def drawn_before(state: dict) -> dict[str, Drawn]:
    """Return what was drawn, by path, before the first step of a run with this state: by the trunk of a branch."""
    return {path: Drawn(**each) for path, each in state.get(KEYS[1], {}).items()}


def check_same_tokenizer(step: Path, tokenizer_sha256: str | None, origin: str) -> None:
    """Raise ValueError unless the trunk's tokenizer is that of the branch's data."""
    tokenizer = find_tokenizer(step)
    trunk = file_sha256(tokenizer) if tokenizer.exists() else None
    if trunk != tokenizer_sha256 and None in (trunk, tokenizer_sha256):
        raise ValueError(f"training.branch_from: {step} and {origin} are of a task and of text; a branch keeps to one")
    if trunk != tokenizer_sha256:
        raise ValueError(
            f"training.branch_from: {step} has another tokenizer than {origin}; prepare that text with --tokenizer "
            f"{tokenizer}"
        )


def record(step: Path, run: Path) -> None:
    """Write down in the trunk's run folder which branch leaves it, and in the branch's where it comes from."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    trunk = step.parents[1]
    (run / "branched_from.json").write_text(json.dumps({"step": str(step), "date": date}) + "\n")
    try:
        with open(trunk / "branches.jsonl", "a") as file:
            file.write(json.dumps({"run": str(run), "step": step.name, "date": date}) + "\n")
    except OSError as error:
        log_rank0(f"warning: {trunk} does not say that {run} branches off it: {error}")
