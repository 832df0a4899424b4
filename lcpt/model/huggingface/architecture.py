"""Define what lcpt must know of an architecture of transformers to import its models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lcpt.model.gpt import ModelConfig
from lcpt.model.huggingface.import_settings import Settings
from lcpt.model.huggingface.import_tensors import Made


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Says how config.json and the tensors of an architecture become ours."""

    classes: tuple[str, ...]  # of transformers, that have these tensors and no other head
    read_config: Callable[[Settings], tuple[ModelConfig, int]]  # and the tokens of a sequence
    harmless: frozenset[str]  # keys of its config.json that leave logits as they are
    recipe: Callable[[ModelConfig], Mapping[str, Made]]  # our name -> theirs, without the prefix
    prefix: str  # that tensors have in a model with a head
    ignored: str = r"(?!)"  # a pattern of tensors that hold nothing learned
    embedding: str  # that the head may be tied to
