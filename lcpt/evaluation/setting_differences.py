"""Compare every setting with the first one on the documents that both scored, or say why these do not pair."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lcpt.data import DataError
from lcpt.evaluation.compared_runs import Run
from lcpt.evaluation.intervals import FEW
from lcpt.evaluation.paired import Difference, Documents, mean_of_runs, paired_difference

SCORING = {  # what changes losses, of evaluation.json -> its value where an evaluation of earlier versions lacks it
    "window": None,
    "stride": None,
    "carry_state": None,
    "precision": "fp32",
    "last_window": "short",
}


def scoring(evaluation: dict) -> dict:
    """Say how an evaluation scored: two that differ in this cannot be compared."""
    return {name: evaluation.get(name, earlier) for name, earlier in SCORING.items()}


def setting_differences(settings: dict[str, list[Run]]) -> list[dict]:
    """Compute each setting's loss minus the first one's; [] where no run was evaluated.

    A row has `setting`, `minus` and either `refused`, the reason, or `documents`, whether they are too `few` to rely
    on, `seeds` (those that both have), `p`, and `bits_per_byte` and `nats_per_token` (None where tokenizers differ):
    `mean`, `interval` over documents, `seeds_mean` and `seeds_spread` over the seeds (None of fewer than two).
    """
    if not any(run.evaluation for group in settings.values() for run in group):
        return []
    (first, baseline), *others = settings.items()
    return [{"setting": name, "minus": first, **_difference(name, group, first, baseline)} for name, group in others]


@dataclass(frozen=True, slots=True)
class _Scored:
    run: Run
    report: dict  # of evaluation.json
    documents: Documents

    def tokens(self) -> list[tuple[str, int]]:
        return sorted((row["id"], row["tokens"]) for row in self.documents)


def _difference(name: str, group: list[Run], first: str, baseline: list[Run]) -> dict:
    try:
        of_baseline, of_group = _scored(first, baseline), _scored(name, group)
        _check(of_baseline + of_group)
        seeds, seeds_before = _documents_by_seed(of_group), _documents_by_seed(of_baseline)
        in_bytes = paired_difference(seeds, seeds_before)
        same_tokenizer = of_group[0].tokens() == of_baseline[0].tokens()
        in_tokens = paired_difference(seeds, seeds_before, per="tokens") if same_tokenizer else None
    except DataError as error:
        return {"refused": str(error)}
    return {
        "refused": None,
        "documents": in_bytes.documents,
        "few": in_bytes.documents < FEW,
        "seeds": [seed for seed in seeds if seed in seeds_before],
        "p": in_bytes.p,
        "bits_per_byte": _figures(in_bytes),
        "nats_per_token": in_tokens and _figures(in_tokens),
    }


def _figures(difference: Difference) -> dict:
    mean, spread = difference.over_seeds or (None, None)
    return {
        "mean": difference.mean,
        "interval": difference.interval and list(difference.interval),
        "seeds_mean": mean,
        "seeds_spread": spread,
    }


def _documents_by_seed(scored: list[_Scored]) -> dict[int, Documents]:
    seeds: dict[int, list[Documents]] = {}
    for one in scored:
        seeds.setdefault(one.run.seed, []).append(one.documents)
    return {seed: mean_of_runs(several) for seed, several in seeds.items()}


def _scored(name: str, group: list[Run]) -> list[_Scored]:
    found = [_Scored(run, run.evaluation, run.documents) for run in group if run.evaluation and run.documents]
    if not found:
        raise DataError(f"no run of {name} has both evaluation.json and evaluation.documents.jsonl; evaluate it")
    return found


def _check(scored: list[_Scored]) -> None:
    """Raise DataError where runs were not scored alike, or a file is of another evaluation than the one beside it."""
    for one in scored:
        nats, tokens = (math.fsum(row[name] for row in one.documents) for name in ("nats", "tokens"))
        if not tokens or not math.isclose(nats / tokens, one.report["loss"], rel_tol=1e-6):
            name = one.run.name
            raise DataError(f"{name}: evaluation.documents.jsonl and evaluation.json disagree; evaluate it again")
    for what in SCORING:
        _agree(what.replace("_", " "), [(one.run.name, scoring(one.report)[what]) for one in scored])
    same_tokens = [one for one in scored if one.tokens() == scored[0].tokens()]
    _agree("text", [(one.run.name, one.report["fingerprint"][:12]) for one in same_tokens])


def _agree(what: str, values: list[tuple[str, object]]) -> None:
    (first, value), *others = values
    for name, other in others:
        if other != value:
            raise DataError(f"different {what}: {other} of {name}, {value} of {first}")
