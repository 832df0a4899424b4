"""From a config to what the loop works with; everything that a user can get wrong fails here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lcpt.data import Corpus, Prefetcher
from lcpt.model import GPT, load_weights
from lcpt.parallel import groups
from lcpt.training.resume import check_same_run
from lcpt.training.telemetry import say
from lcpt.training.validation import Validation

if TYPE_CHECKING:
    from lcpt.config import Config


def set_up(config: Config, checkpoint: Path | None) -> tuple[GPT, Corpus, Prefetcher, Validation | None, int]:
    """(model, training corpus, this rank's batches, validation if there is any, micro-batches a step).

    The model's weights are those of `checkpoint`, else of training.init_from, else drawn from run.seed. ValueError
    names what does not fit.
    """
    training, context, vocab_size = config.training, config.data.context, config.model.vocab_size
    accumulation = micro_batches(config.sequences, training.micro_batch, groups.world_size())
    corpus = open_corpus(config.data.path, vocab_size)
    batches = Prefetcher(corpus, config.run.seed, config.sequences, context, groups.rank(), groups.world_size())
    validation = None
    if config.data.valid_path:
        valid = open_corpus(config.data.valid_path, vocab_size)
        if valid.manifest["tokenizer_sha256"] != corpus.manifest["tokenizer_sha256"]:
            raise ValueError(f"{valid.folder} and {corpus.folder} were made with different tokenizers; prepare one of "
                             "them again with --tokenizer of the other")
        validation = Validation(valid, training.valid_tokens, context, training.micro_batch)
    torch.manual_seed(config.run.seed)
    model = GPT(config.model)
    if checkpoint:
        check_same_run(checkpoint, config, corpus)
        if training.init_from:
            say("note: training.init_from is passed over, since the run goes on from its own checkpoint")
        load_weights(model, checkpoint, verified=True)
    elif training.init_from:
        load_weights(model, training.init_from)
    return model, corpus, batches, validation, accumulation


def micro_batches(sequences: int, micro_batch: int, world: int) -> int:
    """Micro-batches of a rank in one step; ValueError if they do not come out even."""
    if sequences % (world * micro_batch):
        raise ValueError(f"{sequences} sequences a step (training.global_batch_tokens / data.context) do not divide "
                         f"among {world} ranks in micro-batches of {micro_batch}; change one of them")
    return sequences // (world * micro_batch)


def open_corpus(path: str, vocab_size: int) -> Corpus:
    """A prepared folder whose tokenizer the model was made for; one rank reads all of it to check its hashes."""
    corpus = Corpus(path, hash_shards=groups.rank() == 0)
    if corpus.vocab_size != vocab_size:
        raise ValueError(f"{path} was tokenised with {corpus.vocab_size} pieces and model.vocab_size is {vocab_size}; "
                         f"set model.vocab_size={corpus.vocab_size}")
    return corpus
