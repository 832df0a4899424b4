"""Train a small model on a recall task until it recalls, and count the steps: how soon does a kind of attention learn?

A plain loop on one device, with the batches, the optimizer and the schedule of `launch/pretrain.py`. It saves nothing,
and stops as soon as the model has learned.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from lcpt.data import Task
from lcpt.data.batches import batch
from lcpt.evaluation.recall import answers
from lcpt.model import GPT
from lcpt.training.optimizer import parameter_groups
from lcpt.training.schedule import learning_rate

if TYPE_CHECKING:
    from lcpt.config import Config

LEARNED = 0.9  # share of right answers that counts as learned
SURE = 0.995  # where there is nothing left to learn: training ends


def learn(config: Config) -> dict:
    """Train config.model on config.data.path from config.run.seed, fp32 on the CPU, until `SURE` or the last step.

    Every training.valid_every_steps steps it asks training.valid_tokens of samples that no training draws. Returns
    steps_to_90 (None: never), best_accuracy, curve [{step, accuracy, loss}], parameters, and cpu_seconds of training
    and asking. Raises DataError where data.path is no task that fits.
    """
    training, context = config.training, config.data.context
    source, test = (
        Task(config.data.path or "", config.data.synthetic, config.model.vocab_size, s) for s in ("train", "test")
    )
    torch.manual_seed(config.run.seed)
    model = GPT(config.model)
    groups = parameter_groups(model, training.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=training.lr, betas=(training.betas[0], training.betas[1]), eps=1e-8)
    began, curve = time.process_time(), []
    for step in range(training.last_step):
        drawn = batch(source, config.run.seed, step, config.sequences, context)
        inputs, labels = torch.from_numpy(drawn.inputs), torch.from_numpy(drawn.labels)
        nats, count = model(inputs, labels=labels)
        (nats / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % training.valid_every_steps == 0 or step + 1 == training.last_step:
            accuracy = ask(model, test, training.valid_tokens // context, context)
            curve.append({"step": step + 1, "accuracy": accuracy, "loss": nats.item() / count.item()})
            if accuracy >= SURE:
                break
    return {
        "steps_to_90": next((point["step"] for point in curve if point["accuracy"] >= LEARNED), None),
        "best_accuracy": max(point["accuracy"] for point in curve),
        "curve": curve,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_seconds": time.process_time() - began,
    }


def ask(model: GPT, test: Task, samples: int, context: int) -> float:
    """Compute the share of right answers to the first `samples` test samples."""
    parts = answers(model, test, samples, context, batch=64, device=torch.device("cpu"))
    correct = itertools.chain.from_iterable(part.correct for part in parts)
    return float(np.mean(list(correct)))
