"""Find the settings under which a step of training fits a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lcpt.model.cost import REDUCE_BUCKET, Saved, activation_elements, memory_per_rank, model_cost
from lcpt.model.sequence_cost import ExchangedBytes, exchange, layers_by_kind
from lcpt.training.slices import data_ranks, slices_of

if TYPE_CHECKING:
    from lcpt.config import Config

HEADROOM = 0.15  # of a GPU's memory, for what PyTorch caches, communication buffers and temporaries
POLICIES: tuple[bool | str, ...] = (False, "selective", True, "offload")  # from the fewest FLOPs to the most


@dataclass(frozen=True, slots=True)
class Setting:
    """Holds one choice, and the bytes that a rank then needs."""

    activation_checkpointing: bool | str
    micro_batch: int
    n_bytes: float

    def __str__(self) -> str:
        policy = str(self.activation_checkpointing).lower()
        return f"activation_checkpointing={policy} micro_batch={self.micro_batch} ({self.n_bytes / 2**30:,.1f} GiB)"


def fitting_settings(config: Config, world: int, n_bytes: float) -> list[Setting]:
    """Find for each policy of activation checkpointing the largest micro_batch that fits, the cheapest policy first.

    A micro_batch divides the sequences of a rank; HEADROOM of n_bytes, a GPU's memory, stays free. Empty: none fits.
    """
    groups, layers = data_ranks(config, world), layers_by_kind(config.model)
    sequences = config.sequences // groups if config.sequences % groups == 0 else 1
    parameters = model_cost(config.model, config.data.context).parameters
    found = []
    for policy in POLICIES:
        saved = activation_elements(replace(config.model, activation_checkpointing=policy))
        for micro_batch in (n for n in range(sequences, 0, -1) if sequences % n == 0):
            exchanged = exchange(layers, slices_of(config, micro_batch))
            needed = sum(memory_on_gpu(config, world, parameters, saved, micro_batch, exchanged).values())
            if needed <= (1 - HEADROOM) * n_bytes:
                found.append(Setting(policy, micro_batch, needed))
                break
    return found


def memory_on_gpu(
    config: Config, world: int, parameters: int, saved: Saved, micro_batch: int, exchanged: ExchangedBytes | None = None
) -> dict[str, float]:
    """Estimate a rank's bytes on its GPU by what they hold; `saved` is of model.cost.activation_elements, `exchanged`
    of model.sequence_cost.exchange, None: counted here."""
    if exchanged is None:
        exchanged = exchange(layers_by_kind(config.model), slices_of(config, micro_batch))
    zero = config.parallel.deepspeed.get("zero_optimization", {})
    tokens = micro_batch * config.data.context // config.parallel.sequence
    width = 2 if config.training.precision == "bf16" else 4
    again = saved.at_times > 0  # a block at a time
    passing = exchanged.passing + again * exchanged.kept_at_once
    saved = saved._replace(at_times=saved.at_times + passing / (tokens * width))
    parts = memory_per_rank(
        config.model,
        parameters,
        saved,
        tokens=tokens,
        world=world,
        zero_stage=config.parallel.zero_stage,
        precision=config.training.precision,
        reduce_bucket=float(zero.get("reduce_bucket_size", REDUCE_BUCKET)),
    )
    if exchanged.kept and not again:
        parts["exchanged keys and states"] = exchanged.kept
    if config.parallel.offload_optimizer:
        del parts["optimizer"]
    return parts
