"""Measure how well a model finds again what was planted in natural text, by context and depth, from likelihoods alone.

A sample is a stretch of one document, with the same questions in every context; the text of a shorter context is the
end of that of a longer one. What is planted takes the place of as many tokens at the beginning.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from lcpt.data import AnyTokenizer, DataError
from lcpt.evaluation.intervals import interval_over_documents
from lcpt.evaluation.retrieval_tasks import (
    CHANCE,
    PAIRS,
    PASSAGE,
    TASKS,
    Haystack,
    Layout,
    Planter,
    Reading,
    shortest_context,
)
from lcpt.model import GPT
from lcpt.model.generation import read
from lcpt.utils.progress import progress_bar

SEED = 0
COPIES = 2**24  # bytes: small caches are faster together; a softmax model's keys for all candidates could fill a GPU
SHORTEST = 512  # of the contexts that are measured unless told otherwise


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Says what to measure. Raises DataError naming what cannot be."""

    tasks: list[str]
    contexts: list[int]  # tokens of a context, with its question and answer
    depths: list[float]  # 0 is the beginning of a context, 1 right before the question
    samples: int  # of each task, context and depth
    batch: int  # contexts that are read at a time; changes no number

    def __post_init__(self):
        for name in self.tasks:
            if name not in TASKS:
                close = difflib.get_close_matches(name, TASKS, n=1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(TASKS)}"
                raise DataError(f"there is no retrieval task {name!r}; {hint}")
        for name in ("samples", "batch"):
            if (value := getattr(self, name)) < 1:
                raise DataError(f"--{name} is {value}; it must be ≥ 1")
        if not 1 <= len(self.depths) <= PAIRS:
            raise DataError(f"--depths is {len(self.depths)}; it must lie in 1 … {PAIRS}")


class Text(NamedTuple):
    """Holds a document: which one of all it is, and its tokens int32 [n], BOS first."""

    number: int
    tokens: np.ndarray


class Sample(NamedTuple):
    """Holds one draw of a task."""

    haystack: Haystack
    layouts: list[Layout]


class Outcome(NamedTuple):
    """Holds what a model made of questions, each [samples, depths]."""

    nats: np.ndarray  # -log p of the answer, all its tokens
    right: np.ndarray  # whether it is the likeliest candidate; of one alone: the share of likeliest tokens


def default_contexts(context: int) -> list[int]:
    """Return 512, doubled up to the context of training, and that; of a short one, half of it and itself."""
    first = min(SHORTEST, max(1, context // 2))
    doubled = [first * 2**n for n in range(context.bit_length()) if first * 2**n < context]
    return [*doubled, context]


def even_depths(count: int) -> list[float]:
    """Return depths from 0 to 1, evenly apart; one alone is the middle."""
    return [n / (count - 1) for n in range(count)] if count > 1 else [0.5] * count


def choose_texts(documents: Iterable[tuple[str, np.ndarray, int]], settings: Settings) -> list[Text]:
    """Draw documents that hold the longest context: one for each sample, or all if there are fewer, in their order.

    documents: see lcpt.data.documents.documents. Memory is that of what is drawn. Raises DataError where none is long
    enough.
    """
    needed, longest, fitting = _tokens_needed(settings), 0, 0
    kept: list[Text] = []
    rng = np.random.default_rng(SEED)
    for number, (_, tokens, _) in enumerate(documents):
        longest = max(longest, len(tokens))
        if len(tokens) < needed:
            continue
        fitting += 1
        place = len(kept) if len(kept) < settings.samples else int(rng.integers(fitting))  # reservoir sampling
        if place < settings.samples:
            kept[place : place + 1] = [Text(number, tokens.astype(np.int32))]
    if not kept:
        raise DataError(
            f"no document is long enough: a context of {max(settings.contexts)} tokens needs one of {needed}, and the "
            f"longest has {longest}; give longer texts or smaller --contexts"
        )
    return sorted(kept, key=lambda text: text.number)


def measure(model: GPT, tokenizer: AnyTokenizer, texts: list[Text], settings: Settings, device: torch.device) -> dict:
    """Measure all tasks; returns the figures of a report, as docs/contract.md says.

    Raises DataError for a context beyond the model's positions, or that what is planted would fill by more than half.
    """
    planter = Planter(tokenizer)
    haystacks = [_haystack(planter, texts[n % len(texts)], n, settings) for n in range(settings.samples)]
    samples = {task: _draw(planter, task, haystacks, settings) for task in settings.tasks}
    _check_contexts(model, samples, settings)
    rows, summary = [], []
    readings = sum(1 + len(sample.layouts) for drawn in samples.values() for sample in drawn)
    with progress_bar(total=readings * sum(settings.contexts), unit="tok", unit_scale=True, desc="reading") as bar:
        for task, drawn in samples.items():
            for context in settings.contexts:
                planted = (planter.with_needles(x.haystack, y, context) for x in drawn for y in x.layouts)
                plain = (planter.without_needles(*sample, context) for sample in drawn)
                outcomes = [_score_all(model, x, settings, device, bar) for x in (planted, plain)]
                rows += _rows(task, context, settings, *outcomes)
                summary.append(_summary(task, context, drawn, *outcomes))
    return {
        "fingerprint": _fingerprint(texts, settings),
        "samples": settings.samples,
        "documents": len({haystack.document for haystack in haystacks}),
        "contexts": settings.contexts,
        "depths": settings.depths,
        "answer_tokens": {task: drawn[0].layouts[0].asked[0][1].answer_tokens for task, drawn in samples.items()},
        "tokens_read": readings * sum(settings.contexts),
        "rows": rows,
        "summary": summary,
    }


@torch.no_grad()
def score(model: GPT, readings: list[Reading], device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Score all candidates after readings of one length: (nats of each, the share of its tokens that are the likeliest
    next one), float64 [B, Q, K] both.

    A context is read once; candidates go on from copies of its cache, as many at a time as COPIES allows. Logits are
    made for their tokens alone.
    """
    tokens, questions, candidates = (
        torch.from_numpy(np.stack([getattr(reading, name) for reading in readings])).to(device)
        for name in ("tokens", "questions", "candidates")
    )
    _, cache = read(model, tokens)
    nats, likeliest = (np.empty(candidates.shape[:3]) for _ in range(2))
    for number, question in enumerate(questions.unbind(1)):
        hidden, asked = model.extend(question, cache)
        size = sum(x.nbytes for x in tree_leaves(asked.states) if isinstance(x, torch.Tensor))
        together = max(1, COPIES // max(1, size))  # nothing is kept where a token sees itself alone
        for first in range(0, candidates.shape[2], together):
            some = candidates[:, number, first : first + together]  # [B, k, m]
            states = hidden[:, -1:].repeat_interleave(some.shape[1], dim=0)
            if some.shape[2] > 1:
                following, _ = model.extend(some[..., :-1].flatten(0, 1), asked.repeat(some.shape[1]))
                states = torch.cat((states, following), dim=1)
            log_p = (states @ model.head_weight.mT).float().log_softmax(-1).unflatten(0, some.shape[:2])
            found = -log_p.gather(3, some[..., None])[..., 0]
            which = slice(first, first + together)
            nats[:, number, which] = found.double().sum(2).cpu().numpy()
            likeliest[:, number, which] = (log_p.argmax(-1) == some).double().mean(2).cpu().numpy()
    return nats, likeliest


def _tokens_needed(settings: Settings) -> int:
    """Count the tokens of a document that the longest context can be cut from, with BOS and the passage of `copy`."""
    return 1 + PASSAGE + max(settings.contexts)


def _haystack(planter: Planter, text: Text, sample: int, settings: Settings) -> Haystack:
    longest = max(settings.contexts)
    first = int(np.random.default_rng([SEED, sample]).integers(1 + PASSAGE, len(text.tokens) - longest + 1))
    return planter.haystack(text.number, text.tokens[first - PASSAGE : first + longest].astype(np.int64))


def _draw(planter: Planter, task: str, haystacks: list[Haystack], settings: Settings) -> list[Sample]:
    samples = []
    for number, haystack in enumerate(haystacks):
        rng = np.random.default_rng([SEED, number, list(TASKS).index(task)])
        samples.append(Sample(haystack, planter.layouts(task, haystack, settings.depths, rng)))
    return samples


def _check_contexts(model: GPT, samples: dict[str, list[Sample]], settings: Settings) -> None:
    shortest, longest, most = min(settings.contexts), max(settings.contexts), model.config.max_positions
    if most is not None and longest > most:
        raise DataError(f"--contexts has {longest}, and the model has positions for {most} tokens")
    for task, drawn in samples.items():
        if shortest < (least := shortest_context(drawn[0].layouts[0])):
            raise DataError(
                f"{task} needs a context of {least} tokens, and --contexts has {shortest}; "
                "give longer ones, or leave it out of --tasks"
            )


def _score_all(model: GPT, readings: Iterator[Reading], settings: Settings, device: torch.device, bar: tqdm) -> Outcome:
    """Score readings in batches; the questions of a sample follow each other in the order of depths."""
    nats, right = [], []
    while some := list(islice(readings, settings.batch)):
        found, likeliest = score(model, some, device)
        if not np.isfinite(found).all():
            raise DataError("the model's likelihoods are not finite; use another checkpoint")
        answers = np.stack([reading.right for reading in some])
        nats.append(np.take_along_axis(found, answers[..., None], 2).ravel())
        right.append((likeliest[..., 0] if found.shape[2] == 1 else found.argmin(2) == answers).ravel())
        bar.update(sum(reading.context for reading in some))
    shape = settings.samples, len(settings.depths)
    return Outcome(np.concatenate(nats).reshape(shape), np.concatenate(right).astype(np.float64).reshape(shape))


def _rows(task: str, context: int, settings: Settings, found: Outcome, without: Outcome) -> list[dict]:
    return [
        {
            "task": task,
            "context": context,
            "depth": depth,
            "samples": settings.samples,
            "accuracy": float(found.right[:, n].mean()),
            "accuracy_without": float(without.right[:, n].mean()),
            "chance": CHANCE.get(task, float(without.right[:, n].mean())),
            "nats": float(found.nats[:, n].mean()),
            "nats_without": float(without.nats[:, n].mean()),
        }
        for n, depth in enumerate(settings.depths)
    ]


def _summary(task: str, context: int, drawn: list[Sample], found: Outcome, without: Outcome) -> dict:
    """Average over depths and samples, with the 95 % interval over documents."""
    documents = np.unique([sample.haystack.document for sample in drawn], return_inverse=True)[1]
    right, questions = np.bincount(documents, found.right.mean(1)), np.bincount(documents)
    interval = interval_over_documents(right, questions) if right.any() else (0.0, 0.0)
    if len(questions) < 2:
        interval = None
    return {
        "task": task,
        "context": context,
        "accuracy": float(found.right.mean()),
        "interval": None if interval is None else [min(max(float(end), 0.0), 1.0) for end in interval],
        "accuracy_without": float(without.right.mean()),
        "chance": CHANCE.get(task, float(without.right.mean())),
        "gain": float((without.nats - found.nats).mean()),
    }


def _fingerprint(texts: list[Text], settings: Settings) -> str:
    """Hash what the figures depend on but for the model."""
    digest = hashlib.sha256(repr((SEED, settings.tasks, settings.contexts, settings.depths, settings.samples)).encode())
    for text in texts:
        digest.update(text.tokens.tobytes())
    return digest.hexdigest()
