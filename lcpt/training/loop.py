"""Pretraining: the loop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lcpt.checkpoint import read_state
from lcpt.parallel import groups
from lcpt.training.engine import build_engine, set_learning_rate
from lcpt.training.resume import find_start, restore
from lcpt.training.run_folder import open_run_folder, write_summary
from lcpt.training.saving import save
from lcpt.training.schedule import learning_rate
from lcpt.training.setup import set_up
from lcpt.training.telemetry import Telemetry, say

if TYPE_CHECKING:
    from lcpt.config import Config


def train(config: Config, config_yaml: str) -> None:
    """Run the experiment on this rank, or continue it; every rank of the job calls it, after groups.join().

    Raises groups.SetupError, the same on all ranks, for what a user can mend; before training starts.
    """
    run, training, batch_tokens = Path(config.run.dir), config.training, config.training.global_batch_tokens
    device, world, began = groups.device(), groups.world_size(), time.perf_counter()
    checkpoint = find_start(run)
    done = read_state(checkpoint)["step"] if checkpoint else 0
    if done >= training.last_step:
        say(f"{run} is complete at step {done}; for another run name another run.dir")
        return
    with groups.agreed():
        model, corpus, batches, validation, accumulation = set_up(config, checkpoint)
        open_run_folder(run, config_yaml, done)
    engine = build_engine(model.to(device), training, config.parallel, accumulation)
    if checkpoint:
        restore(engine, checkpoint)
    telemetry = Telemetry(run, training.last_step, batch_tokens, done)

    for step in range(done + 1, training.last_step + 1):
        started, waited = time.perf_counter(), batches.waited
        rows = torch.from_numpy(batches.get(step - 1)).to(device)  # [sequences / world, context + 1]
        waited = batches.waited - waited
        rate = learning_rate(step - 1, training)
        set_learning_rate(engine, rate)
        nats = 0.0
        for sequences in rows.split(training.micro_batch):
            loss, _ = engine(sequences[:, :-1], labels=sequences[:, 1:])
            # The engine averages over ranks and micro-batches: this makes it the mean over all tokens of the step.
            engine.backward(loss * (world * accumulation / batch_tokens))
            engine.step()
            nats += loss.detach()
        [nats] = groups.total(nats, device=device)
        seconds = time.perf_counter() - started
        row = {
            "step": step,
            "tokens": step * batch_tokens,
            "loss": nats / batch_tokens,
            "learning_rate": rate,
            "grad_norm": float(engine.get_global_grad_norm()),
            "tokens_per_second": batch_tokens / seconds,
            "step_seconds": seconds,
            "data_wait_fraction": waited / seconds,
        }
        if validation and (step == training.max_steps or step % training.valid_every_steps == 0):
            row |= validation.run(engine, device)
        telemetry.step(row)
        if step == training.last_step or step % config.checkpoint.every_steps == 0:
            save(engine, run, row, corpus, config)

    telemetry.close()
    batches.close()
    write_summary(run, row, time.perf_counter() - began)
