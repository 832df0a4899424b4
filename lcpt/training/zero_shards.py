"""Find the fp32 shards of a model that this rank holds, at any ZeRO stage. Only this module knows how DeepSpeed shards.

Stage 0 replicates everything on every rank. Stages 1 and 2 flatten the parameters of a group into one buffer and give
every rank a slice of it. Stage 3 partitions every parameter evenly. The moments are sharded as their parameters are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcpt.parallel import groups
from lcpt.training.optimizer import is_frozen

MOMENTS = ("exp_avg", "exp_avg_sq")


class Shard(NamedTuple):
    """Elements start … of a flattened parameter: `tensors` are flat views of the optimizer's own fp32 memory."""

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]  # "weights", "exp_avg", "exp_avg_sq"

    def narrow(self, low: int, high: int) -> Shard:
        """Keep its elements low … high, counted from its own start."""
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
        step = torch.zeros((), dtype=torch.float32, device=partition.device)  # where a fused optimizer wants it
        base.state[partition] = {"step": step} | {name: torch.zeros_like(partition) for name in MOMENTS}
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # links them, as the first step would


def adam_steps(engine) -> dict[str, Any]:
    """Return how many updates AdamW has made: `adam_step`, and `adam_step_of` each parameter that had fewer."""
    made = [int(states[0]["step"]) for states in _states(engine)]
    most = max(made)
    fewer = {
        name: steps
        for group, steps in zip(engine.basic_optimizer.param_groups, made, strict=True)
        if steps < most
        for name in group["names"]
    }
    return {"adam_step": most} | ({"adam_step_of": fewer} if fewer else {})


def set_adam_steps(engine, saved: Mapping[str, Any]) -> None:
    """Set the counts that adam_steps returned, of these groups or others: where one group now has parameters of several
    counts, the highest. Too high a count makes first updates smaller, too low a one larger."""
    fewer = saved.get("adam_step_of", {})
    for group, states in zip(engine.basic_optimizer.param_groups, _states(engine), strict=True):
        for state in states:
            state["step"].fill_(max(fewer.get(name, saved["adam_step"]) for name in group["names"]))


def _states(engine) -> list[list[dict[str, Tensor]]]:
    """Return AdamW's states of each of its groups."""
    base, zero = engine.basic_optimizer, engine.optimizer
    if engine.zero_optimization_stage() != 3:
        return [[base.state[partition] for partition in group["params"]] for group in base.param_groups]
    states: list[list[dict[str, Tensor]]] = [[] for _ in base.param_groups]
    for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
        states[zero.sub_group_to_group_id[number]].append(base.state[flat])
    return states


def local_shards(engine) -> Iterator[Shard]:
    """Yield this rank's shard of each parameter; at stages 1 to 3 it has none of some."""
    shard_of = {0: _whole, 1: _flat_slice, 2: _flat_slice, 3: _partition}[engine.zero_optimization_stage()]
    for name, parameter in engine.module.named_parameters():
        if (shard := shard_of(engine, name, parameter)) is not None:
            yield shard


def owned_shards(engine) -> Iterator[Shard]:
    """Yield the shards that this rank saves: over all ranks they hold every element once, also at stage 0."""
    rank, world = groups.rank(), groups.world_size()
    for shard in local_shards(engine):
        if engine.zero_optimization_stage() == 0:
            elements = len(shard.tensors["weights"])
            shard = shard.narrow(elements * rank // world, elements * (rank + 1) // world)
        if len(shard.tensors["weights"]):
            yield shard


def gradient_norm_squared(engine) -> Tensor:
    """Sum the squares of this rank's share of the step's gradient, after the last backward pass: a scalar on the
    device. Over all ranks these add up to the square of the global norm. Frozen parameters do not count."""
    frozen = [is_frozen(group) for group in engine.basic_optimizer.param_groups]
    found = _gradients(engine)
    squares = _sum_of_squares([gradient for group, each in found if not frozen[group] for gradient in each])
    return squares / groups.world_size() if engine.zero_optimization_stage() == 0 else squares  # every rank has all


def _gradients(engine) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Yield this rank's gradients by the number of their group; at stage 3 a group may come in parts."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        for number, group in enumerate(engine.basic_optimizer.param_groups):
            yield number, [p.grad for p in group["params"] if p.grad is not None]
    elif hasattr(zero, "fp32_groups_gradient_flat_partition"):  # stage 1 in bf16
        yield from enumerate([gradient] for gradient in zero.fp32_groups_gradient_flat_partition)
    elif stage == 3:
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            part = [flat.grad] if zero.offload_optimizer else zero.averaged_gradients[number]
            yield zero.sub_group_to_group_id[number], part
    elif zero.cpu_offload:
        yield from enumerate([flat.grad] for flat in zero.single_partition_of_fp32_groups)
    else:
        yield from zero.averaged_gradients.items()


def _sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:  # a rank may have nothing but padding of what is not frozen
        return torch.zeros((), dtype=torch.float64, device=groups.device())
    return torch.stack(torch._foreach_norm(list(tensors))).double().square().sum()


def _whole(engine, name: str, parameter: Tensor) -> Shard:
    state = engine.basic_optimizer.state[parameter]
    tensors = {"weights": parameter.data.view(-1)} | {moment: state[moment].view(-1) for moment in MOMENTS}
    return Shard(name, tuple(parameter.shape), 0, tensors)


def _flat_slice(engine, name: str, parameter: Any) -> Shard | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    tensors = {"weights": mapping.hp_fragment.detach()} | {moment: mapping.optim_fragment[moment] for moment in MOMENTS}
    return Shard(name, tuple(parameter.shape), mapping.lp_fragment_address.start, tensors)


def _partition(engine, name: str, parameter: Any) -> Shard | None:
    zero = engine.optimizer
    group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    start = groups.rank() * size
    length = min(size, parameter.ds_numel - start)  # the last partitions are padded
    if length <= 0:
        return None
    flat = zero.fp32_partitioned_groups_flat[group]
    whole = {"weights": flat.detach()} | {moment: engine.basic_optimizer.state[flat][moment] for moment in MOMENTS}
    own = {kind: tensor[offset : offset + length] for kind, tensor in whole.items()}
    return Shard(name, tuple(parameter.ds_shape), start, own)
