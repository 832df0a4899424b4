"""Collect what features, sketches and score functions cost and lose, for one head."""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt.analysis.feature_costs import costs, dimensions, kinds
from lcpt.analysis.ranks import random_ranks
from lcpt.analysis.real_heads import heads, passage_length
from lcpt.analysis.sketch_error import errors
from lcpt.data import AnyTokenizer, DataError
from lcpt.data.documents import documents
from lcpt.model.pretrained import Pretrained


def feature_report(head_dim: int, degree: int, sketch_size: int, block_size: int) -> dict:
    """Collect the report of one head. ValueError names an argument that does not fit."""
    for name, value, least in (
        ("head dimension", head_dim, 2),
        ("degree", degree, 2),
        ("sketch size", sketch_size, 1),
        ("block size", block_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} {value} must be ≥ {least}")
    return {
        "settings": {"head_dim": head_dim, "degree": degree, "sketch_size": sketch_size, "block_size": block_size},
        "dimensions": dimensions(head_dim, degree, sketch_size),
        "costs": costs(head_dim, kinds(degree, sketch_size, block_size)),
        "sketch_error": errors(head_dim, sketch_size),
        "ranks": random_ranks(),
    }


def checkpoint_report(trained: Pretrained, data: str, device: torch.device) -> dict:
    """Report on the heads of a trained model at the beginning of a document. DataError: `data` holds none to read."""
    model = trained.model.to(device)
    tokens = passage(data, trained.open_tokenizer(), passage_length(model)).to(device)
    return {
        "checkpoint": str(trained.folder),
        "step": trained.step,
        "data": str(data),
        "tokens": tokens.shape[1],
        "heads": heads(model, tokens),
    }


def passage(data: str, tokenizer: AnyTokenizer, length: int) -> Tensor:
    """Read int64 [1, ≤ length]: the beginning of the first document that has as many tokens, else the longest one."""
    longest = None
    for _, tokens, _ in documents(data, tokenizer):
        if longest is None or len(tokens) > len(longest):
            longest = tokens
        if len(longest) >= length:
            break
    if longest is None or len(longest) < 2:
        raise DataError(f"{data} holds no text")
    return torch.from_numpy(longest[:length]).long()[None]
