"""Measure recall: answers to a task's questions, by the distance from where an answer stands to its question."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import torch
from omegaconf import OmegaConf

from lcpt.data import SyntheticConfig, Task
from lcpt.evaluation.positions import position_edges
from lcpt.evaluation.scoring import in_turn
from lcpt.model import GPT
from lcpt.model.pretrained import Pretrained

SEED = 0


class Answers(NamedTuple):
    """Holds, [n] each: tokens from the answer to its question, whether it is the likeliest token, -log p."""

    distance: np.ndarray  # int64
    correct: np.ndarray  # bool
    nats: np.ndarray  # fp32


def open_task(trained: Pretrained, path: str) -> Task:
    """Open fresh samples of a task, with the settings that the model was trained with where it was trained on tasks.

    Raises DataError for an unknown task.
    """
    file = trained.folder / "config.yaml"
    given = OmegaConf.load(file).data.get("synthetic") if file.exists() else None
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SyntheticConfig), given or {}))
    return Task(path, cast(SyntheticConfig, settings), trained.model.config.vocab_size, "test")


def answers(model: GPT, task: Task, samples: int, context: int, batch: int, device: torch.device) -> Iterator[Answers]:
    """Yield the answers to the first `samples` samples, `batch` at a time, on the first rank; ranks share the work."""
    batches = (range(first, min(first + batch, samples)) for first in range(0, samples, batch))
    for _, part in in_turn(batches, partial(_answers, model, task, context, device)):
        yield part


@torch.no_grad()
def _answers(model: GPT, task: Task, context: int, device: torch.device, numbers: range) -> Answers:
    """Ask samples of these numbers. Only the questions' logits are computed."""
    chosen = [task.full_sample(number, SEED, context) for number in numbers]
    inputs, labels, origins = (np.stack(x) for x in zip(*chosen, strict=True))
    asked = labels >= 0
    hidden = model.hidden(torch.from_numpy(inputs).to(device))[torch.from_numpy(asked).to(device)]
    log_p = (hidden @ model.head_weight.mT).float().log_softmax(-1)
    wanted = torch.from_numpy(labels[asked]).to(device)
    return Answers(
        distance=np.nonzero(asked)[1] - origins[asked],
        correct=(log_p.argmax(-1) == wanted).cpu().numpy(),
        nats=-log_p.gather(1, wanted[:, None])[:, 0].cpu().numpy(),
    )


def report(parts: list[Answers], context: int) -> dict:
    """Report answers, accuracy, loss (nats an answer) and recall_by_distance: those where the answer stood
    start … end - 1 tokens before its question."""
    distance, correct, nats = (np.concatenate(x) for x in zip(*parts, strict=True))
    bins = []
    for start, end in itertools.pairwise(position_edges(context)):
        inside = (distance >= start) & (distance < end)
        if inside.any():
            bins.append({"start": start, "end": end, **_means(correct[inside], nats[inside])})
    return {**_means(correct, nats), "recall_by_distance": bins}


def _means(correct: np.ndarray, nats: np.ndarray) -> dict:
    return {"answers": len(correct), "accuracy": float(correct.mean()), "loss": float(nats.mean(dtype=np.float64))}
