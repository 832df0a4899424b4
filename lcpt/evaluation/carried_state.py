"""Score whole documents piece by piece with carried state: every token sees all of its document.

Layers of linear cost hand on a state that does not grow; softmax layers keep every key and value of the document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from lcpt.evaluation.perplexity import Scored
from lcpt.evaluation.windows import Window
from lcpt.model import GPT
from lcpt.model.loss import token_losses


def score_with_carried_state(model: GPT, pieces: Iterable[Window], device: torch.device) -> Iterator[Scored]:
    """Yield (window, -log p of its labels in nats, fp32 [n]) of disjoint windows, a document's in order."""
    document, cache = None, None
    for piece in pieces:
        if piece.document != document:
            document, cache = piece.document, None
        known = cache.position if cache else 0
        inputs, labels = (torch.from_numpy(x)[None].to(device) for x in (piece.inputs, piece.labels))
        hidden, cache = model.extend(inputs, cache)
        losses = token_losses(hidden, model.head_weight, labels)
        yield piece._replace(known=known), losses[0].float().cpu().numpy()
