"""Plan a run on GPUs that are not here: predict what a setting needs and how fast it is, and try all settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from lcpt.model.cost import Cost, Saved, activation_elements, model_cost
from lcpt.model.sequence_cost import Layers, exchange, layers_by_kind
from lcpt.training.checks import micro_batches
from lcpt.training.communication import Communication, communication_per_step
from lcpt.training.fitting import HEADROOM, POLICIES, memory_on_gpu
from lcpt.training.slices import check_slices, sharing_ranks, slices_of
from lcpt.training.step_time import hardware, seconds_by_part, step_seconds
from lcpt.utils.gpus import gpu_bytes

if TYPE_CHECKING:
    from lcpt.config import Config
    from lcpt.model import ModelConfig

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Holds what a model costs at one context, whatever the setting."""

    by_policy: dict[bool | str, tuple[Cost, Saved]]  # of activation checkpointing
    layers: Layers


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
    sequence: int  # ranks that share each sequence
    micro_batch: int
    micro_batches: int  # a step and rank
    activation_checkpointing: bool | str
    offload_optimizer: bool
    memory: dict[str, float]  # bytes of a rank's GPU by what they hold
    sent: Communication
    exchanged: float  # bytes that a rank sends in a step to those that share its sequences
    seconds: dict[str, float]  # of a step, by the part of the hardware that works so long
    tokens: int  # of a step, over all ranks

    @property
    def n_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return step_seconds(self.seconds)

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
    counted = {policy: (model_cost(model, config.data.context), saved[policy]) for policy, model in models.items()}
    return Costs(by_policy=counted, layers=layers_by_kind(config.model))


def predict(config: Config, costs: Costs, cluster: Cluster) -> Prediction:
    """Predict a config as it is; ValueError where ranks cannot share its sequences, where these do not divide, and for
    an unknown GPU."""
    check_slices(config, cluster.gpus)
    return _predict(config, costs, cluster)


def _predict(config: Config, costs: Costs, cluster: Cluster) -> Prediction:
    model, training, parallel, world = config.model, config.training, config.parallel, cluster.gpus
    accumulation = micro_batches(config.sequences, training.micro_batch, world, parallel.sequence)
    cost, saved = costs.by_policy[model.activation_checkpointing]
    exchanged = exchange(costs.layers, slices_of(config, training.micro_batch))
    n_bytes = exchanged.per_step(accumulation, recomputed=saved.at_times > 0)
    sent = communication_per_step(
        cost.modules, parallel, world=world, precision=training.precision, micro_batches=accumulation
    )
    peaks = hardware(cluster.gpu, training.precision, cluster.network)
    return Prediction(
        zero_stage=parallel.zero_stage,
        sequence=parallel.sequence,
        micro_batch=training.micro_batch,
        micro_batches=accumulation,
        activation_checkpointing=model.activation_checkpointing,
        offload_optimizer=parallel.offload_optimizer,
        memory=memory_on_gpu(config, world, cost.parameters, saved, training.micro_batch, exchanged),
        sent=sent,
        exchanged=n_bytes,
        seconds=seconds_by_part(
            config,
            cost,
            sent,
            peaks,
            kept=saved.always,
            made=costs.by_policy[False][1].always,
            world=world,
            micro_batches=accumulation,
            exchanged=n_bytes,
        ),
        tokens=training.global_batch_tokens,
    )


def propose(config: Config, costs: Costs, cluster: Cluster) -> list[Prediction]:
    """Predict all settings, and return those that fit, the fastest first; those with the optimizer on the host only
    where no other fits.

    Of two that are as fast, that of the lower stage comes first, whose messages are fewer and larger, then that whose
    hardware has less to do, then that which needs less memory.
    ValueError where the sequences of a step do not divide among the GPUs, however many share one.
    """
    shared = check_divides(config, costs.layers, cluster.gpus)
    for offload in (False, True):
        predictions = (_predict(changed, costs, cluster) for changed in _settings(config, shared, offload))
        if fitting := [prediction for prediction in predictions if prediction.fits(cluster.gpu)]:
            return sorted(fitting, key=lambda p: (p.step_seconds, p.zero_stage, p.seconds_without_overlap, p.n_bytes))
    return []


def check_divides(config: Config, layers: Layers, world: int) -> dict[int, int]:
    """Return the values of parallel.sequence that work, and the sequences of a step that a rank then has a share of.
    ValueError where there are none."""
    degrees = sharing_ranks(config.data.context, world, layers)
    fitting = {n: config.sequences * n // world for n in degrees if config.sequences * n % world == 0}
    if not fitting:
        micro_batches(config.sequences, 1, world)  # raises, with what works
    return fitting


def _settings(config: Config, shared: dict[int, int], offload: bool) -> Iterator[Config]:
    for ranks, sequences in shared.items():
        sizes = [n for n in range(1, sequences + 1) if sequences % n == 0]
        for stage in STAGES:
            if stage == 0 and (offload or config.training.precision == "bf16"):
                continue
            parallel = replace(config.parallel, zero_stage=stage, sequence=ranks, offload_optimizer=offload)
            for policy, micro_batch in product(POLICIES, sizes):
                model = replace(config.model, activation_checkpointing=policy)
                training = replace(config.training, micro_batch=micro_batch)
                yield replace(config, model=model, training=training, parallel=parallel, phases=[])


def best_over(
    config: Config, cluster: Cluster, contexts: list[int], gpus: list[int]
) -> dict[int, dict[int, Prediction]]:
    """Propose for contexts and numbers of GPUs: context -> GPUs -> the fastest setting, where one fits.

    A step has as many tokens as the config's, in whole sequences, as far as they divide among the GPUs or groups of
    them that share one. A context that the model or the task does not allow is left out.
    """
    found: dict[int, dict[int, Prediction]] = {}
    saved, layers = saved_by_policy(config.model), layers_by_kind(config.model)
    for context in contexts:
        try:
            steps = {n: _with_context(config, layers, context, n) for n in gpus}
        except ValueError:
            continue
        costs = costs_by_policy(steps[gpus[0]], saved)
        best = {n: propose(step, costs, replace(cluster, gpus=n)) for n, step in steps.items()}
        found[context] = {n: predictions[0] for n, predictions in best.items() if predictions}
    return found


def _with_context(config: Config, layers: Layers, context: int, gpus: int) -> Config:
    wanted = max(1, config.training.global_batch_tokens // context)
    groups = [gpus // n for n in sharing_ranks(context, gpus, layers)]  # that read different sequences
    sequences = wanted // gpus * gpus or max((n for n in groups if n <= wanted), default=min(groups))
    training = replace(config.training, global_batch_tokens=sequences * context, micro_batch=1)
    parallel = replace(config.parallel, sequence=1)
    return replace(config, data=replace(config.data, context=context), training=training, parallel=parallel, phases=[])
