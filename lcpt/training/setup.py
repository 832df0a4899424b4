"""Build what the loop works with, from a config whose start was checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lcpt.data import BatchPhase, Prefetcher
from lcpt.model import GPT, load_weights
from lcpt.parallel import groups
from lcpt.training.validation import Validation

if TYPE_CHECKING:
    from lcpt.config import Config
    from lcpt.training.checks import Start


def set_up(config: Config, start: Start) -> tuple[GPT, Prefetcher, Validation | None]:
    """Build (model, this rank's batches, validation if there is any).

    The model's weights are those of the checkpoint, else of training.init_from, else drawn from run.seed.
    """
    training, context = config.training, config.data.context
    phase = BatchPhase(
        first=0,
        source=start.source,
        context=context,
        sequences=config.sequences,
        micro_batch=training.micro_batch,
    )
    batches = Prefetcher([phase], config.run.seed, groups.rank(), groups.world_size())
    validation = None
    if start.valid:
        validation = Validation(start.valid, training.valid_tokens, context, training.micro_batch)
    torch.manual_seed(config.run.seed)
    model = GPT(config.model)
    if weights := start.checkpoint or start.init_from:
        load_weights(model, weights, verified=True)
    return model, batches, validation
