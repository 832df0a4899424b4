"""Build what the loop works with, from a config whose start was checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lcpt.data import Prefetcher
from lcpt.model import GPT, load_weights
from lcpt.parallel import groups
from lcpt.training.validation import Validation

if TYPE_CHECKING:
    from lcpt.config import Config
    from lcpt.training.checks import Start


def set_up(config: Config, start: Start) -> tuple[GPT, Prefetcher, dict[int, Validation]]:
    """Build (model, this rank's batches, the validation of each phase by its number if there is any).

    The model's weights are those of the checkpoint, else of training.init_from or branch_from, else drawn from
    run.seed.
    """
    phases = [phase.batches() for phase in start.phases]
    batches = Prefetcher(phases, config.run.seed, groups.rank(), groups.world_size())
    validations = {}
    if start.valid:
        for phase in (opened.phase for opened in start.phases):
            context, micro_batch = phase.config.data.context, phase.config.training.micro_batch
            validations[phase.number] = Validation(start.valid, config.training.valid_tokens, context, micro_batch)
    torch.manual_seed(config.run.seed)
    model = GPT(config.model)
    if weights := start.checkpoint or start.init_from or start.branch_from:
        load_weights(model, weights, verified=True)
    return model, batches, validations
