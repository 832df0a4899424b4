"""Validation inside the loop: a fixed set of windows, the same for every step, world size and batch."""

from __future__ import annotations

import numpy as np
import torch

from lcpt.data import Corpus, Tokenizer
from lcpt.evaluation.perplexity import Tally, bits_per_byte, score
from lcpt.evaluation.windows import Window, windows
from lcpt.model import GPT
from lcpt.parallel import groups


class Validation:
    """About `tokens` tokens of `corpus`, in disjoint windows spread evenly over its documents."""

    def __init__(self, corpus: Corpus, tokens: int, context: int, batch: int):
        chosen = spread_windows(corpus, max(1, tokens // context), context)
        self.mine = chosen[groups.rank() :: groups.world_size()]
        self.token_bytes = Tokenizer(corpus.tokenizer).token_bytes()
        self.context, self.batch = context, batch

    def run(self, model: GPT, device: torch.device) -> dict[str, float]:
        """{"valid_loss": nats a token, "valid_bits_per_byte"} over all ranks' windows."""
        tally = Tally(self.token_bytes, self.context)
        for window, losses in score(model, self.mine, self.batch, device):
            tally.add(window, losses)
        nats, tokens, n_bytes = groups.total(sum(tally.nats), sum(tally.tokens), sum(tally.bytes), device=device)
        return {"valid_loss": nats / tokens, "valid_bits_per_byte": bits_per_byte(nats, n_bytes)}


def spread_windows(corpus: Corpus, count: int, context: int) -> list[Window]:
    """`count` of the corpus's windows, evenly spaced; all of them if there are fewer."""
    everything = [w for d in range(len(corpus)) for w in windows(d, corpus.document(d)[1], context, context)]
    picks = np.unique(np.linspace(0, len(everything) - 1, min(count, len(everything))).round().astype(int))
    return [everything[i] for i in picks]
