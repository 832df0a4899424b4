"""Average parts of reports, such as bins of positions, over the runs of a setting."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from lcpt.evaluation.compared_runs import Run, by_seed


def context_gains(run: Run) -> list[dict] | None:
    """Return the contexts of an evaluation's context gain; None where it was not measured."""
    return ((run.evaluation or {}).get("context_gain") or {}).get("contexts")


def retrieval_summary(run: Run) -> list[dict] | None:
    """Return the accuracy of each task at each context; None where it was not measured."""
    return run.retrieval["summary"] if run.retrieval else None


def mean_lines(
    settings: dict[str, list[Run]], parts_of: Callable[[Run], list[dict] | None], key: tuple[str, ...]
) -> list[tuple[str, list[dict]]]:
    """Average what the runs of each setting have: (name, parts that all of them have, by the fields `key`)."""
    lines = []
    for name, group in settings.items():
        of_seeds = [
            averaged
            for same in by_seed(group).values()
            if (averaged := mean_parts([parts for run in same if (parts := parts_of(run))], key))
        ]
        if mean := mean_parts(of_seeds, key):
            lines.append((name, mean))
    return lines


def mean_parts(several: list[list[dict]], key: tuple[str, ...]) -> list[dict]:
    """Average lists of parts, number by number and interval by interval, over the parts that every list has."""
    named = [{tuple(part[name] for name in key): part for part in parts} for parts in several]
    common = [at for at in (named[0] if named else {}) if all(at in other for other in named)]
    return [_mean_part([parts[at] for parts in named], key) for at in common]


def _mean_part(parts: list[dict], key: tuple[str, ...]) -> dict:
    mean: dict = {name: parts[0][name] for name in key}
    for name in parts[0].keys() - set(key):
        values = [part[name] for part in parts if part.get(name) is not None]
        if len(values) < len(parts):
            mean[name] = None
        elif isinstance(values[0], list):
            mean[name] = [statistics.fmean(ends) for ends in zip(*values, strict=True)]
        elif isinstance(values[0], int | float):
            mean[name] = statistics.fmean(values)
    return mean
