"""Plan a run on GPUs that are not here: predict what a setting needs and how fast it is, and try all settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lcpt.model.cost import Cost, Saved, activation_elements, model_cost
from lcpt.training.checks import micro_batches
from lcpt.training.communication import Communication, communication_per_step
from lcpt.training.fitting import HEADROOM, POLICIES, memory_on_gpu
from lcpt.training.step_time import hardware, seconds_by_part
from lcpt.utils.gpus import gpu_bytes

if TYPE_CHECKING:
    from lcpt.config import Config
    from lcpt.model import ModelConfig

STAGES = (0, 1, 2, 3)
Costs = dict[bool | str, tuple[Cost, Saved]]  # by policy of activation checkpointing


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Describes GPUs that work together."""

    gpu: str  # of lcpt.utils.gpus
    gpus: int
    network: float  # bytes a second and GPU, each way


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Holds what a setting needs, and by the model of step_time.py how long its steps take."""

    zero_stage: int
    micro_batch: int
    micro_batches: int  # a step and rank
    activation_checkpointing: bool | str
    offload_optimizer: bool
    memory: dict[str, float]  # bytes of a rank's GPU by what they hold
    sent: Communication
    seconds: dict[str, float]  # of a step, by the part of the hardware that works so long
    tokens: int  # of a step, over all ranks

    @property
    def n_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return max(self.seconds.values())

    @property
    def seconds_without_overlap(self) -> float:
        return sum(self.seconds.values())

    @property
    def bottleneck(self) -> str:
        return max(self.seconds, key=lambda part: self.seconds[part])

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    def fits(self, gpu: str) -> bool:
        """Check that HEADROOM of a GPU's memory stays free."""
        return self.n_bytes <= (1 - HEADROOM) * gpu_bytes(gpu)


def saved_by_policy(model: ModelConfig) -> dict[bool | str, Saved]:
    """Count what backward needs under every policy of activation checkpointing."""
    return {policy: activation_elements(replace(model, activation_checkpointing=policy)) for policy in POLICIES}


def costs_by_policy(config: Config, saved: dict[bool | str, Saved]) -> Costs:
    """Count FLOPs at the config's context under every policy; `saved` is that of saved_by_policy, at any context."""
    models = {policy: replace(config.model, activation_checkpointing=policy) for policy in POLICIES}
    return {policy: (model_cost(model, config.data.context), saved[policy]) for policy, model in models.items()}


def predict(config: Config, costs: Costs, cluster: Cluster) -> Prediction:
    """Predict a config as it is; ValueError where its sequences do not divide, and for an unknown GPU."""
    model, training, parallel, world = config.model, config.training, config.parallel, cluster.gpus
    accumulation = micro_batches(config.sequences, training.micro_batch, world)
    cost, saved = costs[model.activation_checkpointing]
    sent = communication_per_step(
        cost.modules, parallel, world=world, precision=training.precision, micro_batches=accumulation
    )
    peaks = hardware(cluster.gpu, training.precision, cluster.network)
    return Prediction(
        zero_stage=parallel.zero_stage,
        micro_batch=training.micro_batch,
        micro_batches=accumulation,
        activation_checkpointing=model.activation_checkpointing,
        offload_optimizer=parallel.offload_optimizer,
        memory=memory_on_gpu(config, world, cost.parameters, saved, training.micro_batch),
        sent=sent,
        seconds=seconds_by_part(
            config,
            cost,
            sent,
            peaks,
            kept=saved.always,
            made=costs[False][1].always,
            world=world,
            micro_batches=accumulation,
        ),
        tokens=training.global_batch_tokens,
    )


def propose(config: Config, costs: Costs, cluster: Cluster) -> list[Prediction]:
    """Predict all settings, and return those that fit, the fastest first; those with the optimizer on the host only
    where no other fits.

    Of two that are as fast, that of the lower stage comes first, whose messages are fewer and larger, then that whose
    hardware has less to do, then that which needs less memory.
    ValueError where the sequences of a step do not divide among the GPUs.
    """
    micro_batches(config.sequences, 1, cluster.gpus)
    for offload in (False, True):
        predictions = (predict(changed, costs, cluster) for changed in _settings(config, cluster.gpus, offload))
        if fitting := [prediction for prediction in predictions if prediction.fits(cluster.gpu)]:
            return sorted(fitting, key=lambda p: (p.step_seconds, p.zero_stage, p.seconds_without_overlap, p.n_bytes))
    return []


def _settings(config: Config, world: int, offload: bool) -> Iterator[Config]:
    sequences = config.sequences // world
    for stage in STAGES:
        if stage == 0 and (offload or config.training.precision == "bf16"):
            continue
        parallel = replace(config.parallel, zero_stage=stage, offload_optimizer=offload)
        for policy in POLICIES:
            model = replace(config.model, activation_checkpointing=policy)
            for micro_batch in (n for n in range(1, sequences + 1) if sequences % n == 0):
                training = replace(config.training, micro_batch=micro_batch)
                yield replace(config, model=model, training=training, parallel=parallel, phases=[])


def best_over(
    config: Config, cluster: Cluster, contexts: list[int], gpus: list[int]
) -> dict[int, dict[int, Prediction]]:
    """Propose for contexts and numbers of GPUs: context -> GPUs -> the fastest setting, where one fits.

    A step has as many tokens as the config's, in whole sequences: as many on every GPU, at least one. A context that
    the model or the task does not allow is left out.
    """
    found: dict[int, dict[int, Prediction]] = {}
    saved = saved_by_policy(config.model)
    for context in contexts:
        try:
            steps = {n: _with_context(config, context, n) for n in gpus}
        except ValueError:
            continue
        costs = costs_by_policy(steps[gpus[0]], saved)
        best = {n: propose(step, costs, replace(cluster, gpus=n)) for n, step in steps.items()}
        found[context] = {n: predictions[0] for n, predictions in best.items() if predictions}
    return found


def _with_context(config: Config, context: int, gpus: int) -> Config:
    sequences = gpus * max(1, config.training.global_batch_tokens // (context * gpus))
    training = replace(config.training, global_batch_tokens=sequences * context, micro_batch=1)
    return replace(config, data=replace(config.data, context=context), training=training, phases=[])
