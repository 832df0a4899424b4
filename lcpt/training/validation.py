"""Validate during training on a fixed set of windows, the same for every step, world size, batch and run.seed."""

from __future__ import annotations

import numpy as np
import torch

from lcpt.data import Corpus, SampleSource, Tokenizer
from lcpt.evaluation.perplexity import bits_per_byte
from lcpt.evaluation.windows import Window, stack, windows
from lcpt.parallel import groups
from lcpt.training.preemption import Preemption
from lcpt.training.watchdog import STARTUP_TIMEOUT_S, Watchdog


class Validation:
    """Scores about `tokens` tokens of `source`, in windows of `context`."""

    def __init__(self, source: SampleSource, tokens: int, context: int, batch: int):
        chosen = held_out(source, max(1, tokens // context), context)
        mine = chosen[groups.rank() :: groups.world_size()]
        # Every rank makes the same number of forward passes: under ZeRO-3 each of them is a collective.
        busiest = -(-len(chosen) // groups.world_size())
        mine += [_unscored(chosen[0])] * (busiest - len(mine))
        self.batches = [stack(mine[i : i + batch]) for i in range(0, len(mine), batch)]
        self._known_shapes: set[tuple[int, ...]] = set()
        self.bytes = 0  # a task has none
        if isinstance(source, Corpus):
            token_bytes = Tokenizer(source.tokenizer).token_bytes()
            self.bytes = sum(int(token_bytes[labels[labels >= 0]].sum()) for _, labels in self.batches)

    @torch.no_grad()
    def run(self, model, device: torch.device, watch: Watchdog, preemption: Preemption) -> dict[str, float] | None:
        """Return {"valid_loss": nats a label, and of text "valid_bits_per_byte"} over the windows of all ranks.

        All ranks call it. None if any rank was asked to leave before the last batch.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats and tokens
        for number, (inputs, labels) in enumerate(self.batches):
            # A shape that is new may have to be compiled.
            timeout_s = None if inputs.shape in self._known_shapes else STARTUP_TIMEOUT_S
            self._known_shapes.add(inputs.shape)
            watch.heartbeat(f"batch {number} of validation", timeout_s)
            if any(groups.all_reduce_sum(bool(preemption.requested_by), device=device)):
                return None
            loss, count = model(torch.from_numpy(inputs).to(device), labels=torch.from_numpy(labels).to(device))
            sums += torch.stack((loss, count))
        nats, tokens, n_bytes = groups.all_reduce_sum(*sums, self.bytes, device=device)
        measured = {"valid_loss": nats / tokens}
        return measured | {"valid_bits_per_byte": bits_per_byte(nats, n_bytes)} if n_bytes else measured


def held_out(source: SampleSource, count: int, context: int) -> list[Window]:
    """Choose windows spread evenly over a corpus's documents, or a task's first samples."""
    if isinstance(source, Corpus):
        return spread_windows(source, count, context)
    return [Window(number, *source.sample(number, 0, context)) for number in range(count)]


def spread_windows(corpus: Corpus, count: int, context: int) -> list[Window]:
    """Choose `count` of the corpus's windows, evenly spaced; all of them if there are fewer."""
    everything = [w for d in range(len(corpus)) for w in windows(d, corpus.document(d)[1], context, context)]
    picks = np.unique(np.linspace(0, len(everything) - 1, min(count, len(everything))).round().astype(int))
    return [everything[i] for i in picks]


def _unscored(window: Window) -> Window:
    return window._replace(labels=np.full_like(window.labels, -1))
