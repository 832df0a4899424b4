"""Gather the state of a run from all ranks and write it as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lcpt.checkpoint import write_checkpoint
from lcpt.data import Corpus
from lcpt.parallel import groups
from lcpt.training.engine import MOMENTS, adam_step, named_tensors
from lcpt.training.resume import data_position

if TYPE_CHECKING:
    from lcpt.config import Config


def save(engine, run: Path, row: dict, corpus: Corpus, config: Config) -> None:
    """Every rank calls it after the step that `row` of the metrics describes; rank 0 writes."""
    tensors = {group: dict(named_tensors(engine, group)) for group in ("weights", *MOMENTS)}
    if groups.rank() == 0:
        state = {
            "step": row["step"], "tokens": row["tokens"], "adam_step": adam_step(engine),
            **data_position(config, corpus),
        }
        attachments = {"config.yaml": run / "config.yaml", "tokenizer.model": corpus.tokenizer}
        write_checkpoint(run / "checkpoints", row["step"], tensors, state, attachments)
    groups.barrier()
