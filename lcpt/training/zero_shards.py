"""Which fp32 numbers of a model this rank holds, at any ZeRO stage: the one room that knows how DeepSpeed divides them.

Stage 0 holds everything on every rank. Stages 1 and 2 lay the parameters of a group end to end and give every rank a
stretch of that. Stage 3 divides every parameter evenly by itself. The moments lie as their parameters do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lcpt.parallel import groups

MOMENTS = ("exp_avg", "exp_avg_sq")


class Fragment(NamedTuple):
    """Numbers start … of a parameter laid flat: `tensors` are flat views of the optimizer's own fp32 memory."""

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]  # "weights", "exp_avg", "exp_avg_sq"

    def narrow(self, low: int, high: int) -> Fragment:
        """Its numbers low … high, counted from its own start."""
        cut = {group: tensor[low:high] for group, tensor in self.tensors.items()}
        return self._replace(start=self.start + low, tensors=cut)


def create_moments(engine) -> None:
    """Give AdamW its zero moments before the first step.

    DeepSpeed links parameters to their moments once, after the first *group* has made its first step: with two groups
    the second would never be reachable by name.
    """
    base, stage = engine.basic_optimizer, engine.zero_optimization_stage()
    if stage == 3:
        flat = engine.optimizer.fp32_partitioned_groups_flat
    else:
        flat = [partition for group in base.param_groups for partition in group["params"]]
    for partition in flat:
        base.state[partition] = {"step": torch.tensor(0.0)} | {name: torch.zeros_like(partition) for name in MOMENTS}
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # links them, as the first step would


def held(engine) -> Iterator[Fragment]:
    """What this rank holds of each parameter; nothing of some, at stages 1 to 3."""
    fragment = {0: _whole, 1: _stretch, 2: _stretch, 3: _share}[engine.zero_optimization_stage()]
    for name, parameter in engine.module.named_parameters():
        if (found := fragment(engine, name, parameter)) is not None:
            yield found


def held_once(engine) -> Iterator[Fragment]:
    """The same, but every number on one rank alone."""
    rank, world = groups.rank(), groups.world_size()
    for fragment in held(engine):
        if engine.zero_optimization_stage() == 0:
            numbers = len(fragment.tensors["weights"])
            fragment = fragment.narrow(numbers * rank // world, numbers * (rank + 1) // world)
        if len(fragment.tensors["weights"]):
            yield fragment


def _whole(engine, name: str, parameter: Tensor) -> Fragment:
    state = engine.basic_optimizer.state[parameter]
    tensors = {"weights": parameter.data.view(-1)} | {moment: state[moment].view(-1) for moment in MOMENTS}
    return Fragment(name, tuple(parameter.shape), 0, tensors)


def _stretch(engine, name: str, parameter: Tensor) -> Fragment | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    tensors = {"weights": mapping.hp_fragment.detach()} | {moment: mapping.optim_fragment[moment] for moment in MOMENTS}
    return Fragment(name, tuple(parameter.shape), mapping.lp_fragment_address.start, tensors)


def _share(engine, name: str, parameter: Tensor) -> Fragment | None:
    zero = engine.optimizer
    number, offset, share = zero.grad_position[zero.get_param_id(parameter)]
    start = groups.rank() * share
    length = min(share, parameter.ds_numel - start)  # the last shares are padded
    if length <= 0:
        return None
    flat = zero.fp32_partitioned_groups_flat[number]
    whole = {"weights": flat.detach()} | {moment: engine.basic_optimizer.state[flat][moment] for moment in MOMENTS}
    own = {group: tensor[offset : offset + length] for group, tensor in whole.items()}
    return Fragment(name, tuple(parameter.ds_shape), start, own)
