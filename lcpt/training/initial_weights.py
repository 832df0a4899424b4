"""Find the weights that training.init_from names, and say what a new run takes of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lcpt.checkpoint import CheckpointError
from lcpt.model.conversion import Source, by_layer, fit, open_source
from lcpt.training.same_run import CHANGEABLE, flatten, shown
from lcpt.training.telemetry import log_rank0
from lcpt.utils.hashing import file_sha256

if TYPE_CHECKING:
    from lcpt.config import Config

# Where null stands for a value, `fit` has compared the values.
SILENT = (*CHANGEABLE, "model.version", "model.n_kv_heads", "model.d_ff", "model.attention.head_dim")


def find_initial_weights(config: Config, tokenizer_sha256: str | None, origin: str) -> Path:
    """Find the step folder or export of training.init_from, whole and fit for this model; returns its folder.

    tokenizer_sha256: that of the data, which `origin` names. Raises CheckpointError in one line.
    """
    try:
        source = open_source(config.training.init_from or "")
        found = fit(source, config.model)
    except CheckpointError as error:
        raise CheckpointError(f"training.init_from: {error}") from None
    _check_tokenizer(source, tokenizer_sha256, origin)
    lines = [f"{key} {shown(then)} -> {shown(now)}" for key, (then, now) in _changes(source, config).items()]
    if found.initialised:
        lines.append(f"initialised, since it lacks them: {by_layer(found.initialised)}")
    if found.dropped:
        lines.append(f"left out, since there is no place for them: {by_layer(found.dropped)}")
    if lines:
        total = len(found.taken) + len(found.initialised)
        log_rank0("\n  ".join([f"of {source.folder} {len(found.taken)} of {total} tensors are taken", *lines]))
    return source.folder


def _check_tokenizer(source: Source, tokenizer_sha256: str | None, origin: str) -> None:
    """Raise CheckpointError where weights and data have different tokenizers. A task has none, and fits any text."""
    tokenizer = source.tokenizer
    if tokenizer.exists() and tokenizer_sha256 and file_sha256(tokenizer) != tokenizer_sha256:
        raise CheckpointError(
            f"training.init_from: {source.folder} has another tokenizer than {origin}; prepare that text with "
            f"--tokenizer {tokenizer}"
        )


def _changes(source: Source, config: Config) -> dict[str, tuple]:
    """List the keys of the model whose values differ, and with them what it computes."""
    then, now = (flatten(asdict(model), "model") for model in (source.config, config.model))
    idle = (*SILENT, "model.attention.kind") if config.model.attention.pattern else SILENT
    return {key: (then[key], now[key]) for key in now if then[key] != now[key] and key not in idle}
