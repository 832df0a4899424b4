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


def set_up(config: Config, start: Start) -> tuple[GPT, Prefetcher, dict[str, Validation]]:
    """Build (model, this rank's batches, validations by name).

    The model's weights are those of the checkpoint, else of training.init_from, else drawn from run.seed.
    """
    training, context = config.training, config.data.context
    batches = Prefetcher(start.source, config.run.seed, config.sequences, context, groups.rank(), groups.world_size())
    validations = {
        name: Validation(source, training.valid_tokens, context, training.micro_batch)
        for name, source in start.valid.items()
    }
    torch.manual_seed(config.run.seed)
    model = GPT(config.model)
    if weights := start.checkpoint or start.init_from:
        load_weights(model, weights, verified=True)
    return model, batches, validations
