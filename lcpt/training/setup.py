"""Build what the loop works with, from a config whose start was checked."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from lcpt.data import Prefetcher
from lcpt.model import GPT, load_weights
from lcpt.model.conversion import load_fitting, open_source
from lcpt.model.sequence_cost import layers_by_kind
from lcpt.parallel.sequence import SequenceGroup
from lcpt.training.slices import shortest_slice
from lcpt.training.validation import Validation

if TYPE_CHECKING:
    from lcpt.config import Config
    from lcpt.training.checks import Start


def set_up(
    config: Config, start: Start, group: SequenceGroup
) -> tuple[GPT, Prefetcher, dict[int, dict[str, Validation]]]:
    """Build (model, this rank's batches, the validations of each phase by its number, each by name).

    The model's weights are those of the checkpoint, else of training.init_from or branch_from, else drawn from
    run.seed. group: the ranks that share sequences with this one.
    """
    phases = [opened.phase for opened in start.phases]
    batches = Prefetcher(
        [opened.batches() for opened in start.phases], config.run.seed, group.data_rank, group.data_ranks
    )

    least_slice, _ = shortest_slice(layers_by_kind(config.model))

    @cache
    def validations(context: int, micro_batch: int) -> dict[str, Validation]:
        tokens = config.training.valid_tokens
        return {
            name: Validation(source, tokens, context, micro_batch, group, least_slice)
            for name, source in start.valid.items()
        }

    by_phase = {p.number: validations(p.config.data.context, p.config.training.micro_batch) for p in phases}
    torch.manual_seed(config.run.seed)
    model = GPT(config.model)
    if weights := start.checkpoint or start.branch_from:
        load_weights(model, weights, verified=True)
    elif start.init_from:
        load_fitting(model, open_source(start.init_from, hashes=False))
    return model, batches, by_phase
