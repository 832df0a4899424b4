"""Pretraining: the loop."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import torch

from lcpt.checkpoint import find_checkpoint, read_manifest, read_tensors, write_checkpoint
from lcpt.checkpoint.files import replace_text
from lcpt.data import Corpus, Prefetcher
from lcpt.evaluation.memory import peak_memory_bytes
from lcpt.model import GPT
from lcpt.parallel import groups
from lcpt.training.engine import MOMENTS, build_engine, named_tensors, set_learning_rate
from lcpt.training.run_folder import create_run_folder
from lcpt.training.schedule import learning_rate
from lcpt.training.telemetry import Telemetry
from lcpt.training.validation import Validation

if TYPE_CHECKING:
    from lcpt.config import Config


@dataclass
class TrainingConfig:
    max_steps: int = 10_000  # sets the schedule
    stop_after_steps: Optional[int] = None  # noqa: UP045  stops early, and changes nothing else
    global_batch_tokens: int = 2**19  # of one optimizer step, over all ranks
    micro_batch: int = 1  # sequences a rank holds at one time
    lr: float = 6e-4
    schedule: str = "cosine"  # cosine | wsd
    warmup_steps: int = 100
    final_lr_fraction: float = 0.1
    decay_fraction: float = 0.2  # of all steps, wsd only
    weight_decay: float = 0.1  # of matrices; vectors are not decayed
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    grad_clip: float = 1.0  # of the global norm
    precision: str = "fp32"  # fp32 | bf16
    init_from: Optional[str] = None  # noqa: UP045  a run or step folder whose weights to start from
    valid_every_steps: int = 250
    valid_tokens: int = 2**18  # scored at each validation

    def __post_init__(self):
        if self.schedule not in ("cosine", "wsd"):
            raise ValueError(f"training.schedule is {self.schedule!r}; it is cosine or wsd")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"training.precision is {self.precision!r}; it is fp32 or bf16")
        if len(self.betas) != 2:
            raise ValueError(f"training.betas has {len(self.betas)} numbers; AdamW takes 2")
        for name in ("max_steps", "global_batch_tokens", "micro_batch", "valid_every_steps", "valid_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}; it must be ≥ 1")
        if not 0 <= self.warmup_steps < self.max_steps:
            raise ValueError(f"training.warmup_steps is {self.warmup_steps}; it must lie in 0 … {self.max_steps - 1}")
        if self.lr <= 0:
            raise ValueError(f"training.lr is {self.lr}; it must be > 0")

    @property
    def last_step(self) -> int:
        return min(self.max_steps, self.stop_after_steps or self.max_steps)


def train(config: Config, config_yaml: str) -> None:
    """Run the experiment on this rank; every rank of the job calls it, after groups.join().

    Raises groups.SetupError, on all ranks, for what a user can mend; before training starts.
    """
    run, training, first = Path(config.run.dir), config.training, groups.rank() == 0
    device, world, began = groups.device(), groups.world_size(), time.perf_counter()
    with groups.agreed():
        accumulation = micro_batches(config.sequences, training.micro_batch, world)
        corpus = open_corpus(config.data.path, config.model.vocab_size, first)
        valid = config.data.valid_path and open_corpus(config.data.valid_path, config.model.vocab_size, first)
        if valid and valid.manifest["tokenizer_sha256"] != corpus.manifest["tokenizer_sha256"]:
            raise ValueError(f"{valid.folder} and {corpus.folder} were made with different tokenizers; "
                             f"prepare one with --tokenizer of the other")
        batches = Prefetcher(corpus, config.run.seed, config.sequences, config.data.context, groups.rank(), world)
        validation = valid and Validation(valid, training.valid_tokens, config.data.context, training.micro_batch)
        torch.manual_seed(config.run.seed)
        model = GPT(config.model)
        if training.init_from:
            load_weights(model, training.init_from)
        if first:
            create_run_folder(run, config_yaml, world)

    engine = build_engine(model.to(device), training, config.parallel, accumulation)
    telemetry = Telemetry(run, training.last_step * training.global_batch_tokens, speaks=first)
    for step in range(training.last_step):
        started, waited = time.perf_counter(), batches.waited
        rows = torch.from_numpy(batches.get(step)).to(device)  # [sequences / world, context + 1]
        waited = batches.waited - waited
        rate = learning_rate(step, training)
        set_learning_rate(engine, rate)
        nats = 0.0
        for sequences in rows.split(training.micro_batch):
            loss, _ = engine(sequences[:, :-1], labels=sequences[:, 1:])
            # The engine averages over ranks and micro-batches: this makes it the mean over all tokens of the step.
            engine.backward(loss * (world * accumulation / training.global_batch_tokens))
            engine.step()
            nats += loss.detach()
        [nats] = groups.total(nats, device=device)
        seconds = time.perf_counter() - started
        row = {
            "step": step + 1,
            "tokens": (step + 1) * training.global_batch_tokens,
            "loss": nats / training.global_batch_tokens,
            "learning_rate": rate,
            "grad_norm": float(engine.get_global_grad_norm()),
            "tokens_per_second": training.global_batch_tokens / seconds,
            "step_seconds": seconds,
            "data_wait_fraction": waited / seconds,
        }
        last = step + 1 == training.last_step
        if validation and (last or (step + 1) % training.valid_every_steps == 0):
            row |= validation.run(engine.module, device)
        telemetry.step(row)
        if last or (step + 1) % config.checkpoint.every_steps == 0:
            save(engine, run, row, corpus, config)
    telemetry.close()
    batches.close()
    if first:
        summary = row | {"wall_seconds": time.perf_counter() - began, "world_size": world,
                         "peak_memory_bytes": peak_memory_bytes(device)}
        replace_text(run / "summary.json", json.dumps(summary, indent=2) + "\n")


def micro_batches(sequences: int, micro_batch: int, world: int) -> int:
    """Micro-batches of a rank in one step; ValueError if they do not come out even."""
    if sequences % (world * micro_batch):
        raise ValueError(f"{sequences} sequences a step (training.global_batch_tokens / data.context) do not divide "
                         f"among {world} ranks in micro-batches of {micro_batch}; change one of them")
    return sequences // (world * micro_batch)


def open_corpus(path: str, vocab_size: int, first: bool) -> Corpus:
    corpus = Corpus(path, hash_shards=first)
    if corpus.vocab_size != vocab_size:
        raise ValueError(f"{path} was tokenised with {corpus.vocab_size} pieces; set model.vocab_size={corpus.vocab_size}")
    return corpus


def load_weights(model: GPT, source: str) -> None:
    """Start from the weights of another run; ValueError if they are not this model's."""
    step = find_checkpoint(source)
    tensors = read_tensors(step, read_manifest(step))
    missing, unexpected = model.state_dict().keys() - tensors.keys(), tensors.keys() - model.state_dict().keys()
    if missing or unexpected:
        name = min(missing or unexpected)
        raise ValueError(f"{step} holds another model: {name} is {'missing' if missing else 'not in this config'}")
    for name, tensor in model.state_dict().items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{step} holds another model: {name} is {list(tensors[name].shape)} there, "
                             f"{list(tensor.shape)} in this config")
    model.load_state_dict(tensors)


def save(engine, run: Path, row: dict, corpus: Corpus, config: Config) -> None:
    """Gather the state from all ranks; rank 0 writes it."""
    tensors = {group: dict(named_tensors(engine, group)) for group in ("weights", *MOMENTS)}
    if groups.rank() == 0:
        state = {
            "step": row["step"], "tokens": row["tokens"], "seed": config.run.seed,
            "data_fingerprint": corpus.fingerprint, "sequences": config.sequences, "context": config.data.context,
        }
        attachments = {"config.yaml": run / "config.yaml", "tokenizer.model": corpus.tokenizer}
        write_checkpoint(run / "checkpoints", row["step"], tensors, state, attachments)
    groups.barrier()
