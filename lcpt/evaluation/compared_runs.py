"""Read run folders, and group runs that differ in their seed alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf

from lcpt.checkpoint import CheckpointError, find_checkpoint, read_state
from lcpt.data import DataError
from lcpt.evaluation.paired import Documents
from lcpt.utils.errors import first_line

NEEDED = {  # file beside metrics.jsonl -> what it must hold
    "evaluation": ("loss", "bits_per_byte", "fingerprint", "window", "stride", "carry_state", "loss_by_position"),
    "recall": ("accuracy", "fingerprint", "context", "recall_by_distance"),
    "retrieval": ("fingerprint", "rows", "summary"),
    "environment": (),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Holds what a run folder says of a run."""

    folder: Path
    config: dict  # of config.yaml
    rows: list[dict]  # of metrics.jsonl, a step each; without step 0, which is a validation alone
    evaluation: dict | None  # of evaluation.json, which lcpt evaluate wrote
    documents: Documents | None  # of evaluation.documents.jsonl beside it
    recall: dict | None  # of recall.json, which it wrote too
    retrieval: dict | None  # of retrieval.json, which lcpt retrieval wrote
    environment: dict  # of environment.json
    fingerprint: str  # of its training data
    finished: bool

    @property
    def name(self) -> str:
        return os.fsencode(self.folder.name).decode(errors="replace")

    @property
    def seed(self) -> int:
        return self.config["run"]["seed"]

    @property
    def device(self) -> str:
        return self.environment.get("device", "unknown")

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
        rows = [row for row in _read_rows(folder / "metrics.jsonl") if row["step"]]
        evaluation, recall, retrieval, environment = (
            _read_json(folder / f"{name}.json", needed) for name, needed in NEEDED.items()
        )
        scored = folder / "evaluation.documents.jsonl"
        documents = [_sums(row) for row in _read_rows(scored)] if evaluation and scored.exists() else None
    except Exception as error:  # a YAML parser's errors have no common class
        raise DataError(f"{folder}: a file of this run is damaged ({first_line(error)})") from None
    if not rows:
        raise DataError(f"{folder}: this run has not made a step yet")
    try:
        fingerprint = read_state(find_checkpoint(folder))["data fingerprint"]
    except CheckpointError:  # not saved yet
        fingerprint = config["data"]["path"] or str(config["data"]["sources"])
    return Run(
        folder=folder,
        config=config,
        rows=rows,
        evaluation=evaluation,
        documents=documents,
        recall=recall,
        retrieval=retrieval,
        environment=environment or {},
        fingerprint=fingerprint,
        finished=(folder / "summary.json").exists(),
    )


def _read_rows(path: Path) -> list[dict]:
    lines = path.read_text().split("\n")[:-1]  # a run may be writing the last one
    return [json.loads(line) for line in lines]


def _sums(row: dict) -> dict:
    """Keep what pairs documents: by position a row may be a hundred times as large."""
    return {name: row[name] for name in ("id", "tokens", "bytes", "nats")}


def _read_json(path: Path, needed: tuple[str, ...]) -> dict | None:
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    if missing := [name for name in needed if name not in report]:
        raise ValueError(f"{path.name} has no {missing[0]}; write it again")
    return report


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


def distinct(runs: list[Run]) -> list[Run]:
    """Keep each run folder once."""
    first: dict[Path, Run] = {}
    for run in runs:
        first.setdefault(run.folder.resolve(), run)
    return list(first.values())


def by_seed(runs: Iterable[Run]) -> dict[int, list[Run]]:
    """Group runs of a setting by their seed."""
    seeds: dict[int, list[Run]] = {}
    for run in runs:
        seeds.setdefault(run.seed, []).append(run)
    return seeds
