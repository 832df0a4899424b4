"""Train a model: the pretraining loop."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch

from lcpt.parallel import groups
from lcpt.parallel.sequence import join_sequence_group
from lcpt.training.announcement import start_block
from lcpt.training.bad_steps import BadSteps
from lcpt.training.checks import Start, check_start
from lcpt.training.device_batches import DeviceBatches
from lcpt.training.engine import build_engine, set_accumulation, update
from lcpt.training.exit_codes import GiveUp, Preempted
from lcpt.training.history import History
from lcpt.training.layer_norms import layer_norms
from lcpt.training.metric_sinks import build_sinks
from lcpt.training.optimizer import clip_factor, enter_step
from lcpt.training.phase_data import OpenPhase
from lcpt.training.phases import phase_of
from lcpt.training.preemption import Preemption
from lcpt.training.profiling import Profiler
from lcpt.training.resume import restore, restore_weights
from lcpt.training.run_folder import begin, finish, write_marker
from lcpt.training.same_run import data_position
from lcpt.training.samples import open_samples
from lcpt.training.saving import Saver
from lcpt.training.schedule import Schedule
from lcpt.training.setup import set_up
from lcpt.training.step_clock import StepClock
from lcpt.training.telemetry import Telemetry, log_rank0
from lcpt.training.throughput import Throughput, of_ranks
from lcpt.training.validation import validate
from lcpt.training.watchdog import STARTUP_TIMEOUT_S, Watchdog
from lcpt.training.zero_shards import adam_steps, gradient_norm_squared
from lcpt.utils.memory import peak_memory_bytes

if TYPE_CHECKING:
    from lcpt.config import Config


class Computed(NamedTuple):
    """Holds what a rank's forward and backward passes have summed up; not yet read from the device."""

    nats: torch.Tensor  # of its losses
    labels: torch.Tensor  # that they are of
    padding: int  # tokens that belong to no document


class Agreed(NamedTuple):
    """Holds what all ranks know of a step before its update."""

    loss: float  # mean over its labels, in nats
    has_labels: bool  # a batch may have none, where all documents are of one token
    scale: float  # of the gradient that is there, for it to be that of the loss
    grad_norm: float  # global, of the loss
    padding_fraction: float  # of the step's tokens
    leave: bool  # a rank was asked to
    save: bool  # by the clock
    rank_seconds: list[float]  # that each needed for data and forward passes of the step before


def train(config: Config, config_yaml: str, history: History, preemption: Preemption, watch: Watchdog) -> None:
    """Run the experiment on this rank, or continue it; every rank of the job calls it, after groups.join().

    Raises, the same on all ranks: groups.SetupError for bad input, before training starts; Preempted, GiveUp
    or saving.SaveError.
    """
    run = Path(config.run.dir)
    start = check_start(config, groups.world_size())
    with groups.raise_on_all_ranks():
        if groups.rank() == 0:
            history.read()
    if start.complete:
        log_rank0(f"{run} is complete at step {start.state['step']}; for another run name another run.dir")
        finish(run, history)
    else:
        if start.checkpoint:
            log_rank0(f"{run} continues from {start.checkpoint.name}")
        elif start.branch_from:
            log_rank0(f"{run} branches off {start.branch_from}")
        training = Training(config, config_yaml, start, history, preemption, watch)
        training.loop()
        saver = training.saver
        finish(
            run,
            history,
            save_stall_fraction=training.save_stall_fraction,
            saves=saver.saves,
            save_stall_seconds=saver.stalled / saver.saves,
            save_seconds=saver.writing / saver.saves,
        )


class Training:
    """Holds what the loop works with; `state` is that of the checkpoint to continue from."""

    def __init__(
        self,
        config: Config,
        config_yaml: str,
        start: Start,
        history: History,
        preemption: Preemption,
        watch: Watchdog,
    ):
        self.config, self.state, self.preemption, self.watch = config, start.state, preemption, watch
        self.phases, self.branch = start.phases, start.branch
        self.schedule = Schedule(config.training, [each.phase for each in start.phases])
        self.run, self.device, self.began = Path(config.run.dir), groups.device(), time.perf_counter()
        group = join_sequence_group(config.parallel.sequence)
        with groups.raise_on_all_ranks():
            model, batches, self.validations = set_up(config, start, group)
            self.batches = DeviceBatches(batches, self.device, group)
            self.samples = open_samples(config.data) if config.training.sample_every_steps else None
        parameters = sum(tensor.numel() for tensor in model.parameters())  # before ZeRO divides them
        begin(self.run, config_yaml, history, start)
        watch.write_stacks_to(self.run / "stacks")
        self.engine = build_engine(model, config.training, config.parallel, start.phases[0].accumulation)
        if moments := start.checkpoint or start.branch_from:
            restore(self.engine, moments)
        elif start.init_from and config.training.precision == "bf16":
            restore_weights(self.engine, start.init_from)
        attachments = {"config.yaml": self.run / "config.yaml", **start.phases[0].source.attachments}
        self.saver = Saver(self.engine, self.run / "checkpoints", config.checkpoint, attachments, watch)
        self.bad_steps = BadSteps(config.training.bad_steps, self.state.get("bad_steps"))
        with groups.raise_on_all_ranks():
            is_main, done = groups.rank() == 0, self.state["step"]
            sinks = build_sinks(self.run, config.run.wandb_project, config_yaml, done) if is_main else []
        last_step = config.training.last_step
        self.telemetry = Telemetry(self.run, last_step, self.tokens_after(last_step), self.tokens_after(done), sinks)
        self.profiler, self.clock = Profiler(self.run, config.training.profile), StepClock(self.device)
        log_rank0(start_block(config, parameters, done, self.tokens_after(last_step), groups.world_size(), self.device))
        self.own_seconds = 0.0  # that this rank needed for data and forward passes of the step before
        self.enter(phase_of(self.phases, done))

    def loop(self) -> None:
        training = self.config.training
        try:
            if "unvalidated" in self.state:
                self.end_step(self.state["unvalidated"], save=True, leave=False)
            if self.state["step"] == 0:
                self.validate_start()
            for step in range(self.state["step"] + 1, training.last_step + 1):
                self.profiler.before(step)
                if step > self.phase.last_step:
                    self.enter(phase_of(self.phases, step))
                started, waited = time.perf_counter(), self.batches.waited
                enter_step(self.engine.basic_optimizer, step, training.warmup_steps)
                # What is first of its shapes compiles and allocates.
                first = step in (self.state["step"] + 1, self.phase.phase.first_step)
                timeout_s = STARTUP_TIMEOUT_S if first else None
                computed = self.forward_and_backward(step, timeout_s)
                if step < training.last_step:
                    with self.clock.part("data"):
                        self.batches.copy_ahead(step)  # that of step + 1, while the device still works on this one
                agreed = self.agree(computed)
                loss, grad_norm = agreed.loss, agreed.grad_norm
                rate, skip_reason = self.schedule.rate(step), self.bad_steps.skip_reason(loss, grad_norm)
                self.watch.heartbeat(f"the update of step {step}", timeout_s)
                norms = layer_norms(self.engine, agreed.scale) if training.norms_due(step) else {}
                seconds = self.clock.seconds()
                with self.clock.part("update"):
                    factor = agreed.scale * clip_factor(grad_norm, training.grad_clip)
                    update(self.engine, rate, None if skip_reason else factor)
                row = {
                    "step": step,
                    "tokens": self.tokens_after(step),
                    "loss": loss,
                    "learning_rate": rate,
                    **self.rates_by_group(rate),
                    "grad_norm": grad_norm,
                    **norms,
                    **self.used(step),
                    "padding_fraction": agreed.padding_fraction,
                    **self.speed(time.perf_counter() - started, self.batches.waited - waited),
                    "update_seconds": None,  # that of the step before
                    **seconds,
                    **of_ranks(agreed.rank_seconds),
                }
                self.own_seconds = seconds["data_seconds"] + seconds["forward_seconds"]
                self.bad_steps.record(loss if agreed.has_labels else None, skip_reason)
                if skip_reason:
                    self.report_skipped_step(row, skip_reason)
                if said := self.profiler.after(step, last=agreed.leave or step == training.last_step):
                    log_rank0(said)
                self.end_step(row, save=agreed.save, leave=agreed.leave)
            self.saver.finish()
        finally:
            self.saver.settle()
            self.telemetry.close()
            self.batches.close()

    def enter(self, opened: OpenPhase) -> None:
        """Go over to a phase: its batches come by themselves."""
        self.phase, config = opened, opened.config
        set_accumulation(self.engine, config.training.micro_batch, opened.accumulation)
        self.engine.module.config = config.model
        self.throughput = Throughput(config.model, config.data.context, self.device)

    def tokens_after(self, step: int) -> int:
        """Count the tokens of the run up to and with a step."""
        return phase_of(self.phases, step).phase.tokens_after(step)

    def validate_start(self) -> None:
        """Validate the weights that a new run begins with, as step 0; raises Preempted when asked to leave."""
        measured = self.validate("the first validation")
        if measured is None:
            self.leave(0)  # unsaved: the next start begins anew
        if measured:
            self.telemetry.start({"step": 0, "tokens": 0, **measured})

    def validate(self, place: str = "validation") -> dict[str, float] | None:
        """Measure every validation set, none where there is none; None if any rank was asked to leave."""
        validations = self.validations[self.phase.phase.number]
        return validate(validations, self.engine, self.device, self.watch, self.preemption, place)

    @property
    def save_stall_fraction(self) -> float:
        """The part of the time since this start in which saving stalled training."""
        return self.saver.stalled / (time.perf_counter() - self.began)

    def used(self, step: int) -> dict[str, dict[str, float]]:
        """Count what the run has drawn from each folder or task up to and with this step."""
        drawn = self.phase.drawn(step)
        return {
            "source_tokens": {path: each.tokens - each.passed for path, each in drawn.items()},
            "source_epochs": {path: each.epochs for path, each in drawn.items() if each.epochs is not None},
        }

    def rates_by_group(self, rate: float) -> dict[str, dict[str, float]]:
        """Say what each rule of training.parameter_groups makes of the learning rate; nothing where there is none."""
        rates = {g["rule"].name: rate * g["share"] for g in self.engine.basic_optimizer.param_groups}
        return {"learning_rates": rates} if self.config.training.parameter_groups else {}

    def speed(self, seconds: float, waited: float) -> dict[str, float | None]:
        """Say how fast a step was that took so many seconds, of which it waited some for data, and in what memory."""
        return {
            **self.throughput.of(self.phase.config.training.global_batch_tokens / seconds),
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "step_seconds": seconds,
            "data_wait_fraction": waited / seconds,
            "save_stall_fraction": self.save_stall_fraction,
        }

    def forward_and_backward(self, step: int, timeout_s: float | None) -> Computed:
        """Accumulate the step's gradients for `update`, as if every token had a label: `agree` counts them."""
        training, accumulation = self.phase.config.training, self.phase.accumulation
        self.watch.heartbeat(f"the data of step {step}", timeout_s)
        with self.clock.part("data"):
            batch = self.batches.get(step - 1)
        nats, labels = torch.zeros(2, device=self.device, dtype=torch.float64)
        for number, (inputs, targets, cu_seqlens, part) in enumerate(batch.micro_batches, start=1):
            self.watch.heartbeat(f"micro-batch {number} of step {step}", timeout_s)
            with self.clock.part("forward"):
                loss, count = self.engine(inputs, labels=targets, cu_seqlens=cu_seqlens, part=part)
            with self.clock.part("backward"):
                # The engine averages over all ranks, those that share a sequence too, and micro-batches.
                self.engine.backward(loss * (groups.world_size() * accumulation / training.global_batch_tokens))
            nats += loss.detach()
            labels += count
            if number < accumulation:
                self.engine.step()  # DeepSpeed counts micro-batches in it; no update
        return Computed(nats, labels, batch.padding)

    def agree(self, computed: Computed) -> Agreed:
        """Sum over ranks what the step's decisions depend on: the only read from the device in a step."""
        rank_seconds = [0.0] * groups.world_size()
        rank_seconds[groups.rank()] = self.own_seconds
        nats, labels, padding, squares, leave, save, *rank_seconds = groups.all_reduce_sum(
            *computed,
            gradient_norm_squared(self.engine),
            bool(self.preemption.requested_by),
            groups.rank() == 0 and self.saver.minutes_are_up(),
            *rank_seconds,
            device=self.device,
        )
        tokens, has_labels, labels = self.phase.config.training.global_batch_tokens, labels > 0, max(labels, 1.0)
        scale = tokens / labels
        return Agreed(
            loss=nats / labels,
            has_labels=has_labels,
            scale=scale,
            grad_norm=scale * math.sqrt(squares),
            padding_fraction=padding / tokens,
            leave=bool(leave),
            save=bool(save),
            rank_seconds=rank_seconds,
        )

    def report_skipped_step(self, row: dict, skip_reason: str) -> None:
        """Write down a bad step; raises GiveUp if there are too many."""
        step, documents = row["step"], self.phase.documents(row["step"])
        self.telemetry.skipped(step, skip_reason, documents)
        if self.bad_steps.are_too_many:
            self.telemetry.step(row)
            raise GiveUp(self.bad_steps.explain(step, skip_reason, documents, self.run))

    def check_end(self, row: dict) -> None:
        """Raise GiveUp, before that is saved as the end of the run, if its last loss or validation is not finite."""
        step, first, broken = row["step"], row["step"] - self.bad_steps.streak + 1, not_finite(row)
        if broken:
            raise GiveUp(
                f"the run ends at step {step} with {' and '.join(f'{name} {row[name]}' for name in broken)}, so this "
                f"step is not saved: if the weights broke, remove what {self.run}/checkpoints has of step {first - 1} "
                f"and later, and lower training.lr; if the batch is at fault ({self.run}/skipped.jsonl), mend the "
                "data; then start again"
            )

    def end_step(self, row: dict, save: bool, leave: bool) -> None:
        """Validate, write down and save what is due after a step; raises Preempted when asked to leave."""
        training, step, unvalidated = self.config.training, row["step"], {}
        if step == training.max_steps or step % training.valid_every_steps == 0:
            measured = self.validate()
            if measured is None:
                leave, unvalidated = True, {"unvalidated": row}  # the next start begins with this validation
            else:
                row |= measured
        if not unvalidated:
            self.telemetry.step(row)
            if self.samples and training.sample_due(step):
                text = self.samples.draw(self.engine, self.device, self.watch, step)
                self.telemetry.sample(step, self.samples.name, self.samples.prompt, text)
            leave = leave and step < training.last_step
            if step == training.last_step:
                self.check_end(row)
        # A bad step may mean broken weights: those must not push out the checkpoints from before.
        due = (save or self.config.checkpoint.due(step)) and not self.bad_steps.streak and not not_finite(row)
        if due or leave or step == training.last_step:
            self.saver.save(
                step,
                {
                    "step": step,
                    "tokens": row["tokens"],
                    **adam_steps(self.engine),
                    **data_position(self.phase, step),
                    **self.branch,
                    "bad_steps": self.bad_steps.state(),
                    **unvalidated,
                },
                blocked=self.telemetry.flush(),
            )
        if leave:
            self.saver.finish()
            self.leave(step)

    def leave(self, step: int) -> NoReturn:
        """End this start after a step, since a rank was asked to leave."""
        asked = self.preemption.requested_by or "another rank's signal"
        write_marker(self.run, step, asked)
        raise Preempted(f"{asked} ended the run after step {step}; the same command continues it")


def not_finite(row: dict) -> list[str]:
    """List the losses of a row, in training and in validation, that are NaN or Inf."""
    return [name for name in row if name.startswith(("loss", "valid")) and not math.isfinite(row[name])]
