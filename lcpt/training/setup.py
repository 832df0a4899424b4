"""Build from a config what the loop works with; everything that a user can get wrong fails here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lcpt.data import Corpus, Prefetcher, SampleSource, Task, is_task
from lcpt.model import GPT, load_weights
from lcpt.parallel import groups
from lcpt.training.resume import check_same_run
from lcpt.training.telemetry import log_rank0
from lcpt.training.validation import Validation

if TYPE_CHECKING:
    from lcpt.config import Config


def set_up(config: Config, checkpoint: Path | None) -> tuple[GPT, SampleSource, Prefetcher, Validation | None, int]:
    """Build (model, training data, this rank's batches, validation if there is any, micro-batches a step).

    The model's weights are those of `checkpoint`, else of training.init_from, else drawn from run.seed. ValueError
    names what does not fit.
    """
    training, context = config.training, config.data.context
    accumulation = micro_batches(config.sequences, training.micro_batch, groups.world_size())
    source = open_source(config, config.data.path, "train")
    batches = Prefetcher(source, config.run.seed, config.sequences, context, groups.rank(), groups.world_size())
    validation = None
    if config.data.valid_path:
        valid = open_source(config, config.data.valid_path, "valid")
        if valid.tokenizer_sha256 != source.tokenizer_sha256:
            raise ValueError(
                f"{config.data.valid_path} and {config.data.path} were made with different tokenizers; "
                "prepare one of them again with --tokenizer of the other"
            )
        validation = Validation(valid, training.valid_tokens, context, training.micro_batch)
    torch.manual_seed(config.run.seed)
    model = GPT(config.model)
    if checkpoint:
        check_same_run(checkpoint, config, source)
        if training.init_from:
            log_rank0("note: training.init_from is passed over, since the run goes on from its own checkpoint")
        load_weights(model, checkpoint, verified=True)
    elif training.init_from:
        load_weights(model, training.init_from)
    return model, source, batches, validation, accumulation


def micro_batches(sequences: int, micro_batch: int, world: int) -> int:
    """Count the micro-batches of a rank in one step; ValueError if they do not divide evenly."""
    if sequences % (world * micro_batch):
        raise ValueError(
            f"{sequences} sequences a step (training.global_batch_tokens / data.context) do not divide "
            f"among {world} ranks in micro-batches of {micro_batch}; change one of them"
        )
    return sequences // (world * micro_batch)


def open_source(config: Config, path: str, stream: str) -> SampleSource:
    """Open a task, or a prepared folder of the model's tokenizer; rank 0 reads all of it to check its hashes."""
    vocab_size = config.model.vocab_size
    if is_task(path):
        return Task(path, config.data.synthetic, vocab_size, stream)
    corpus = Corpus(path, hash_shards=groups.rank() == 0)
    if corpus.vocab_size != vocab_size:
        raise ValueError(
            f"{path} was tokenised with {corpus.vocab_size} pieces and model.vocab_size is {vocab_size}; "
            f"set model.vocab_size={corpus.vocab_size}"
        )
    return corpus
