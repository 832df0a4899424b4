"""Evaluate a model on whole documents: the record of each, and every figure that is computed from these records."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lcpt.data import DataError
from lcpt.data.documents import documents
from lcpt.evaluation import context_gain, perplexity
from lcpt.evaluation.context_gain import ContextGain, target_windows
from lcpt.evaluation.perplexity import DocumentRecords
from lcpt.evaluation.repeated_bigrams import RepeatedBigrams
from lcpt.evaluation.scoring import score, score_with_carried_state
from lcpt.evaluation.windows import Window, text_bytes, windows
from lcpt.model.pretrained import Pretrained
from lcpt.parallel import groups
from lcpt.utils.progress import progress_bar


@dataclass(frozen=True, kw_only=True, slots=True)
class TextScoring:
    """Says how documents are cut and scored."""

    window: int  # tokens; with carried state, of a piece
    stride: int
    carry_state: bool = False
    full_last_window: bool = False  # see windows.py
    batch: int = 1
    gain_contexts: tuple[int, ...] = ()  # ascending; none: no context gain

    def __post_init__(self):
        """Raise DataError naming what is out of its range."""
        gain = [("context-gain", context) for context in self.gain_contexts]
        for name, value in [("context", self.window), ("batch", self.batch), *gain]:
            if value < 1:
                raise DataError(f"--{name} is {value}; it must be ≥ 1")
        if not 0 < self.stride <= self.window:
            raise DataError(f"stride {self.stride} must lie in 1 … {self.window} (the context)")


def evaluate_text(
    trained: Pretrained, data: str | Path, scoring: TextScoring, device: torch.device
) -> tuple[dict, list[dict]]:
    """Score documents -> (the figures of OUT.json, the rows of OUT.documents.jsonl), on the first rank; else empty.

    Every rank calls it with the same. Raises DataError for data without text, or too short for a context gain.
    """
    records, bigrams = DocumentRecords(trained.model.config.vocab_size), RepeatedBigrams()
    identifiers: list[str] = []
    digest = hashlib.sha256()
    if scoring.carry_state:
        cut = _cut(trained, data, scoring, identifiers, digest)
        scored = score_with_carried_state(trained.model, cut, scoring.batch, scoring.window, device)
    else:
        scored = score(trained.model, _cut(trained, data, scoring, identifiers, digest), scoring.batch, device)
    for window, losses in _progress(scored, "scoring"):
        records.add(window, losses)
        bigrams.add(window, losses)
    gain = _context_gain(trained, data, scoring, device) if scoring.gain_contexts else None
    if not groups.is_first():
        return {}, []
    rows = records.rows(identifiers)
    if not any(row["tokens"] for row in rows):
        raise DataError(f"{data} holds no text to score")
    figures = {"fingerprint": digest.hexdigest(), **perplexity.report(rows), "repeated_bigrams": bigrams.report()}
    for part, loss in zip(figures["loss_by_position"], records.unigram_losses(rows), strict=True):
        part["unigram"] = loss
    if gain:
        for number, row in enumerate(rows):
            if (of_document := gain.row(number)) is not None:
                row["context_gain"] = of_document
        figures["context_gain"] = context_gain.report(rows)
    settings = {
        "window": scoring.window,
        "stride": scoring.stride,
        "carry_state": scoring.carry_state,
        "last_window": "full" if scoring.full_last_window else "short",
    }
    return figures | settings, rows


def _cut(
    trained: Pretrained, data: str | Path, scoring: TextScoring, identifiers: list[str], digest
) -> Iterator[Window]:
    """Yield windows of documents, or whole documents where the state is carried; note what they are."""
    tokenizer = trained.open_tokenizer()
    token_bytes = tokenizer.token_bytes()
    for number, (identifier, tokens, n_bytes) in enumerate(documents(data, tokenizer)):
        identifiers.append(identifier)
        digest.update(tokens.tobytes())
        text = text_bytes([tokens[1:]], n_bytes, token_bytes)
        whole = max(1, len(tokens) - 1)
        window, stride = (whole, whole) if scoring.carry_state else (scoring.window, scoring.stride)
        yield from windows(number, tokens, window, stride, text, full_last=scoring.full_last_window)


def _context_gain(trained: Pretrained, data: str | Path, scoring: TextScoring, device: torch.device) -> ContextGain:
    contexts = list(scoring.gain_contexts)
    gain, read = ContextGain(contexts), documents(data, trained.open_tokenizer())
    cut = (window for number, (_, tokens, _) in enumerate(read) for window in target_windows(number, tokens, contexts))
    for window, losses in _progress(score(trained.model, cut, scoring.batch, device), "context gain"):
        gain.add(window, losses)
    if groups.is_first() and not gain.nats:
        raise DataError(f"{data} has no document of {max(contexts):,} tokens; give --context-gain shorter contexts")
    return gain


def _progress(scored, what: str):
    with progress_bar(unit="tok", unit_scale=True, desc=what, hidden=not groups.is_first()) as bar:
        for window, losses in scored:
            yield window, losses
            bar.update(len(losses))
