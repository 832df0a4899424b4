"""Check a start before anything changes: everything that a user can get wrong fails here, in one line.

launch/pretrain.py makes these checks before it trains, and alone in a dry run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lcpt.checkpoint import read_state
from lcpt.data import Corpus, CorpusSamples, Mixture, Task, is_task
from lcpt.parallel import groups
from lcpt.training.branching import KEYS as BRANCH_KEYS
from lcpt.training.branching import check_same_tokenizer, drawn_before, find_trunk
from lcpt.training.engine import check_deepspeed
from lcpt.training.initial_weights import find_initial_weights
from lcpt.training.out_of_memory import check_fits
from lcpt.training.parameter_groups import check_groups
from lcpt.training.phase_data import OpenPhase, open_phases
from lcpt.training.phases import Phase, divide
from lcpt.training.resume import find_start
from lcpt.training.run_folder import check_writable, lock
from lcpt.training.same_run import (
    Changes,
    changed_settings,
    check_not_finished_otherwise,
    check_rate,
    check_same_data,
    check_same_run,
    shown,
)
from lcpt.training.slices import check_slices, either
from lcpt.training.telemetry import log_rank0

if TYPE_CHECKING:
    from lcpt.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Holds what the checks found out: where training starts from, and on what."""

    checkpoint: Path | None  # to continue from
    damaged: list[Path]  # newer ones that are not whole
    init_from: Path | None  # the step folder or export whose weights a new run begins with
    branch_from: Path | None  # the one that a new run begins with whole
    branch: dict  # what every checkpoint of a branch says of its trunk
    state: dict  # of the checkpoint
    complete: bool  # there is nothing left to do
    changes: Changes  # of settings since the checkpoint
    phases: list[OpenPhase]
    valid: dict[str, Corpus | Task]  # by name; that of data.valid_path has the name ""


def check_start(config: Config, world: int, lock_seconds: float | None = None) -> Start:
    """Make every check of a start on `world` ranks; every rank calls it.

    It changes nothing on the disk, but takes the lock of a run folder that is there; lock_seconds: see `lock`.
    Raises SetupError, the same on all ranks.
    """
    run, init_from, trunk = Path(config.run.dir), None, None
    branch: dict = {}
    with groups.raise_on_all_ranks():
        if groups.rank() == 0 and run.is_dir():
            lock(run, lock_seconds)
    checkpoint, damaged = find_start(run)
    with groups.raise_on_all_ranks():
        if groups.rank() == 0 and config.training.branch_from:
            if checkpoint:
                log_rank0("note: training.branch_from is passed over, since the run goes on from its own checkpoint")
            else:
                trunk, branch = find_trunk(config)
    trunk, branch = groups.broadcast((trunk, branch))
    with groups.raise_on_all_ranks():
        start = _check_on_this_rank(config, world, checkpoint, damaged, branch)
        tokenizer = start.phases[0].source.tokenizer_sha256
        if trunk:
            check_same_tokenizer(trunk, tokenizer, config.data.origin)
        if groups.rank() == 0 and not start.complete:
            check_writable(run)
            if config.training.init_from and checkpoint:
                log_rank0("note: training.init_from is passed over, since the run goes on from its own checkpoint")
            elif config.training.init_from:
                init_from = find_initial_weights(config, tokenizer, config.data.origin)
    init_from = groups.broadcast(init_from)
    for name, (then, now) in ({} if start.complete else start.changes).items():
        log_rank0(f"{name} {shown(then)} -> {shown(now)}")
    return replace(start, init_from=init_from, branch_from=trunk)


def _check_on_this_rank(
    config: Config, world: int, checkpoint: Path | None, damaged: list[Path], branch: dict
) -> Start:
    training, phases = config.training, divide(config)
    state = read_state(checkpoint) if checkpoint else {"step": 0, **branch}
    complete = state["step"] >= training.last_step and "unvalidated" not in state
    changes: Changes = {}
    if checkpoint:
        check_same_run(checkpoint, config, phases)
        changes = changed_settings(checkpoint, config)
        if complete:
            check_not_finished_otherwise(checkpoint, changes)
        elif state["step"] < training.last_step:
            check_rate(checkpoint, config, phases)
    if not complete:
        check_groups(training.parameter_groups, config.model)
        for phase in phases:
            check_slices(phase.config, world)
            check_fits(phase.config, world)
        check_deepspeed(training, config.parallel)
    accumulation = [0 if complete else _accumulation(phase, world) for phase in phases]
    opened = open_phases(phases, accumulation, hashed=not complete, before=drawn_before(state))
    if checkpoint:
        check_same_data(checkpoint, opened)
    for each in opened:
        check_vocabulary(config, each.source)
        if not complete:
            each.check_lasts(training.last_step)
    if (pieces := opened[0].source.vocab_size) < config.model.vocab_size:
        log_rank0(f"note: model.vocab_size is {config.model.vocab_size}, of which the data use {pieces} at most")
    return Start(
        checkpoint=checkpoint,
        damaged=damaged,
        init_from=None,
        branch_from=None,
        branch={key: state[key] for key in BRANCH_KEYS if key in state},
        state=state,
        complete=complete,
        changes=changes,
        phases=opened,
        valid={} if complete else open_valid_sets(config, opened[0].source.tokenizer_sha256),
    )


def _accumulation(phase: Phase, world: int) -> int:
    try:
        config = phase.config
        return micro_batches(config.sequences, config.training.micro_batch, world, config.parallel.sequence)
    except ValueError as error:
        raise ValueError(f"{phase.name}{error}") from None


def micro_batches(sequences: int, micro_batch: int, world: int, shared: int = 1) -> int:
    """Count the micro-batches of a rank in one step, where `shared` of `world` ranks work on the same sequences;
    ValueError, with rank counts that work, if they do not divide."""
    groups_of_ranks = world // shared
    if sequences % (groups_of_ranks * micro_batch):
        of_which = f", of which {shared} share each sequence," if shared > 1 else ""
        raise ValueError(
            f"{sequences} sequences a step (training.global_batch_tokens / data.context) do not divide "
            f"among {world} ranks{of_which} in micro-batches of {micro_batch}; "
            f"{_what_divides(sequences, micro_batch, groups_of_ranks, shared)}"
        )
    return sequences // (groups_of_ranks * micro_batch)


def _what_divides(sequences: int, micro_batch: int, groups_of_ranks: int, shared: int) -> str:
    if sequences % micro_batch:
        fitting = _nearest_divisors(sequences, micro_batch)
        return f"training.micro_batch can be {either(fitting)}"
    ranks = [shared * n for n in _nearest_divisors(sequences // micro_batch, groups_of_ranks)]
    among = f"they do among {either(ranks)} ranks"
    if sequences % groups_of_ranks:
        return among
    largest = max(n for n in range(1, micro_batch) if sequences % (groups_of_ranks * n) == 0)
    return f"{among}, or with training.micro_batch={largest}"


def _nearest_divisors(number: int, wanted: int, count: int = 8) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    divisors = {*small, *(number // n for n in small)}
    return sorted(sorted(divisors, key=lambda n: abs(math.log(n / wanted)))[:count])


def open_valid_sets(config: Config, tokenizer_sha256: str | None) -> dict[str, Corpus | Task]:
    """Open the validation sets, by name. ValueError where one does not fit the training data, or is there twice."""
    opened: dict[str, Corpus | Task] = {}
    by_content: dict[str, str] = {}
    for name, path in config.data.valid_sets.items():
        opened[name] = valid = open_source(config, path, "valid", hashed=True)
        check_vocabulary(config, valid)
        if valid.tokenizer_sha256 != tokenizer_sha256:
            raise ValueError(
                f"{path} and {config.data.origin} were made with different tokenizers; "
                "prepare one of them again with --tokenizer of the other"
            )
        if (twin := by_content.setdefault(valid.fingerprint, name)) != name:
            raise ValueError(f"data.valid: {twin} and {name} hold the same, {path}; list it under one name")
    return opened


def open_source(config: Config, path: str, stream: str, hashed: bool) -> Corpus | Task:
    """Open a task or a prepared folder; with `hashed` rank 0 reads all of it to check its hashes."""
    if is_task(path):
        return Task(path, config.data.synthetic, config.model.vocab_size, stream)
    return Corpus(path, hash_shards=hashed and groups.rank() == 0)


def check_vocabulary(config: Config, source: Corpus | CorpusSamples | Mixture | Task) -> None:
    """Raise ValueError where the model has too few embeddings. Published models have more than their tokenizers."""
    corpus = source.parts[0] if isinstance(source, Mixture) else source  # the others have the same tokenizer
    if isinstance(corpus, Corpus | CorpusSamples) and corpus.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{corpus.folder} was tokenised with {corpus.vocab_size} pieces and model.vocab_size is "
            f"{config.model.vocab_size}; set model.vocab_size={corpus.vocab_size}"
        )
