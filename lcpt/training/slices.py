"""Share sequences among ranks (`parallel.sequence`): which numbers of ranks can, and what each of them then holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lcpt.attention.base import LinearCost
from lcpt.attention.lowrank import Lowrank
from lcpt.data import is_task
from lcpt.model.sequence_cost import Layers, Slices, layers_by_kind

if TYPE_CHECKING:
    from lcpt.config import Config

LEAST = 2  # tokens of a slice: layers of quadratic cost halve it


def check_slices(config: Config, world: int) -> None:
    """Raise ValueError, with what works, where `world` ranks cannot share sequences as parallel.sequence says."""
    ranks, context = config.parallel.sequence, config.data.context
    if ranks == 1:
        return
    layers = layers_by_kind(config.model)
    working = f"parallel.sequence can be {either(sharing_ranks(context, world, layers))}"
    if world % ranks:
        raise ValueError(
            f"parallel.sequence is {ranks}, and {world} ranks cannot be divided into groups of {ranks}; {working}"
        )
    if context % ranks:
        raise ValueError(
            f"parallel.sequence is {ranks}, and data.context {context:,} cannot be cut into {ranks} slices of one "
            f"length; {working}, or data.context {max(1, round(context / ranks)) * ranks:,}"
        )
    needed, why = shortest_slice(layers)
    if context // ranks < needed:
        raise ValueError(
            f"parallel.sequence {ranks} leaves each rank {context // ranks:,} tokens of data.context {context:,}, and "
            f"{why}; {working}, or data.context {needed * ranks:,} and more"
        )


def sharing_ranks(context: int, world: int, layers: Layers) -> list[int]:
    """List the values of parallel.sequence that a context, a model's layers and so many ranks allow."""
    needed, _ = shortest_slice(layers)
    return [
        n for n in range(1, world + 1) if world % n == 0 and (n == 1 or context % n == 0 and context // n >= needed)
    ]


def shortest_slice(layers: Layers) -> tuple[int, str]:
    """Return the fewest tokens that a rank must hold of a shared sequence, and which layers demand them."""
    needed = [(LEAST, f"a slice has at least {LEAST}")]
    for kind, layer, _ in layers:
        if isinstance(layer, LinearCost | Lowrank):
            blocks = layer.local_blocks if isinstance(layer, LinearCost) else 1
            tokens = blocks * layer.block_size
            of_blocks = f"{blocks} blocks" if blocks > 1 else "one block"
            needed.append((tokens, f"layers of {kind} need {tokens:,}, {of_blocks} of model.attention.block_size"))
    return max(needed, key=lambda each: each[0])


def data_ranks(config: Config, world: int) -> int:
    """Count the groups of ranks that read different sequences."""
    return world // config.parallel.sequence


def slices_of(config: Config, micro_batch: int) -> Slices:
    """Describe how a micro-batch lies on the ranks that share it."""
    data, ranks = config.data, config.parallel.sequence
    packed = data.mask_documents and not is_task(data.path or "")  # one row of all its documents
    return Slices(
        ranks=ranks,
        tokens=(micro_batch if packed else 1) * data.context // ranks,
        rows=1 if packed else micro_batch,
        packed=packed,
        width=2 if config.training.precision == "bf16" else 4,
    )


def either(numbers: list[int]) -> str:
    """List numbers of which one is to be taken."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
