"""Give some parameters a learning rate of their own, or freeze them for the first steps.

A frozen parameter's gradient is computed and summed over ranks as any other, so that freezing saves no time; it counts
in no norm, and neither the weight nor its moments change. After the freeze its moments begin at zero, as in a new run,
and its rate rises over training.warmup_steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Optional

import torch

from lcpt.model import GPT, ModelConfig


@dataclass
class ParameterGroup:
    """Says which parameters it is of, by name and the kind of attention of their layer, and how those are trained."""

    match: str = "*"  # their names, as *.attention.*; * is any text, with dots in it too
    kind: Optional[str] = None  # noqa: UP045  of layers with this kind of attention alone
    lr_factor: float = 1.0  # times the learning rate of the run
    frozen_steps: int = 0  # the first steps of the run, in which they stay as they are

    def __post_init__(self):
        if not 0 < self.lr_factor < math.inf:
            raise ValueError(
                f"training.parameter_groups: lr_factor is {self.lr_factor}; it must be > 0 and finite "
                "(frozen_steps: the steps in which nothing is trained)"
            )
        if self.frozen_steps < 0:
            raise ValueError(f"training.parameter_groups: frozen_steps is {self.frozen_steps}; it must be ≥ 0")

    @property
    def name(self) -> str:
        """What tables and metrics call it."""
        if self is OTHERS:
            return "others"
        return f"{self.match} of {self.kind}" if self.kind else self.match

    def takes(self, parameter: str, kinds: Sequence[str]) -> bool:
        """Whether it is of a parameter, in a model whose layers have these kinds of attention."""
        layer = re.match(r"blocks\.(\d+)\.", parameter)
        of_kind = self.kind is None or (layer is not None and kinds[int(layer[1])] == self.kind)
        return of_kind and fnmatchcase(parameter, self.match)

    def share(self, step: int, warmup_steps: int) -> float:
        """Compute what part of the run's learning rate its parameters have at step 1, 2, …; 0: they are frozen."""
        if not self.frozen_steps:
            return self.lr_factor
        return self.lr_factor * min(1.0, max(0, step - self.frozen_steps) / max(1, warmup_steps))


OTHERS = ParameterGroup()  # what no rule takes


def group_of_each(rules: Sequence[ParameterGroup], names: Sequence[str], kinds: Sequence[str]) -> list[ParameterGroup]:
    """Return the first rule that takes each parameter, or OTHERS."""
    return [next((rule for rule in rules if rule.takes(name, kinds)), OTHERS) for name in names]


def check_groups(rules: Sequence[ParameterGroup], config: ModelConfig) -> None:
    """Raise ValueError that names a rule which is of no parameter, or where all parameters are frozen at first."""
    if not rules:
        return
    names = [name for name, _ in _parameters(config)]
    used = group_of_each(rules, names, config.kinds)
    for number, rule in enumerate(rules):
        if any(each is rule for each in used):
            continue
        taken = any(rule.takes(name, config.kinds) for name in names)
        why = "only what earlier ones take" if taken else f"no parameter; one is {names[-1]}"
        raise ValueError(f"training.parameter_groups[{number}], {rule.name}, matches {why}; mend it, or leave it out")
    if frozen := min(rule.frozen_steps for rule in used):
        raise ValueError(
            f"training.parameter_groups freezes every parameter in the first {frozen:,} steps; leave some out"
        )


def describe_groups(rules: Sequence[ParameterGroup], config: ModelConfig) -> str:
    """Say how many parameters each rule is of, and how they are trained."""
    names, sizes = zip(*_parameters(config), strict=True)
    used = group_of_each(rules, names, config.kinds)
    said = []
    for rule in (*rules, OTHERS):
        if elements := sum(size for size, each in zip(sizes, used, strict=True) if each is rule):
            frozen = f", frozen for {rule.frozen_steps:,} steps" if rule.frozen_steps else ""
            said.append(f"{rule.name}: {elements:,}, lr × {rule.lr_factor:g}{frozen}")
    return "; ".join(said)


def _parameters(config: ModelConfig) -> list[tuple[str, int]]:
    """Name the parameters of a model, each with its size."""
    with torch.device("meta"):
        return [(name, parameter.numel()) for name, parameter in GPT(config).named_parameters()]
