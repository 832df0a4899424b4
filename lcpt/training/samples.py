"""Let the model continue a text while it trains, for people to read what it has learned."""

from __future__ import annotations

import itertools

import torch

from lcpt.data import Corpus, DataConfig, open_tokenizer
from lcpt.model.generation import Sampling, choose
from lcpt.training.watchdog import STARTUP_TIMEOUT_S, Watchdog

PROMPT, NEW = 64, 64  # tokens at most
TEMPERATURE = 0.8  # as lcpt generate has it


class Samples:
    """Continues the beginning of a corpus's first document; `name` is that of the corpus, `prompt` the beginning.

    Every rank makes the same forward passes, all of one shape: under ZeRO-3 each is a collective, and no state of a
    layer could be kept between them. Draws depend on the step alone, and leave PyTorch's own generators as they are.
    """

    def __init__(self, name: str, corpus: Corpus, context: int):
        _, start, stop, _ = corpus.document_place(0)
        self._tokens = corpus.read(start, min(stop, start + min(PROMPT, context // 2 + 1))).tolist()
        self._length = min(context, len(self._tokens) + NEW)
        self._tokenizer = open_tokenizer(corpus.tokenizer)
        self._is_first = True  # a pass may have to be compiled
        self.name, self.prompt = name, self._tokenizer.decode(self._tokens)

    @torch.no_grad()
    def draw(self, model, device: torch.device, watch: Watchdog, step: int) -> str:
        """Return what the model writes after the prompt, up to the end of a document; every rank calls it."""
        generator, known = torch.Generator().manual_seed(step), len(self._tokens)
        tokens = torch.zeros(1, self._length, dtype=torch.int64, device=device)  # no place sees a later one
        tokens[0, :known] = torch.tensor(self._tokens)
        for place in range(known, self._length):
            usual = not (self._is_first or watch.is_starting)
            watch.heartbeat(f"token {place - known} of a sample", None if usual else STARTUP_TIMEOUT_S)
            logits = model(tokens)[0, place - 1].float().cpu()
            # Broken weights are the loop's affair: it says so and ends the run.
            tokens[0, place] = choose(logits.nan_to_num(0.0, 0.0, 0.0), Sampling(TEMPERATURE), generator)
            self._is_first = False
        new = itertools.takewhile(lambda token: token != self._tokenizer.bos_id, tokens[0, known:].tolist())
        return self._tokenizer.decode([*self._tokens, *new])[len(self.prompt) :]


def open_samples(data: DataConfig) -> Samples:
    """Open the first validation set, or the training data where there is none, to take a prompt from."""
    sources = [("train", source.path) for source in data.sources or []]
    sets = [(name or "valid", path) for name, path in data.valid_sets.items()]
    name, path = [*sets, *sources, ("train", data.path or "")][0]
    return Samples(name, Corpus(path, hash_shards=False), data.context)
