"""Open the data of a run's phases: each goes on in every folder where those before it have come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

from lcpt.data import (
    BatchPhase,
    Corpus,
    CorpusSamples,
    DataError,
    Drawn,
    Mixture,
    Task,
    batch_documents,
    is_task,
    open_text,
)
from lcpt.parallel import groups
from lcpt.training.phases import Phase
from lcpt.training.telemetry import log_rank0

if TYPE_CHECKING:
    from lcpt.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenPhase:
    """Holds a phase and what it is trained on."""

    phase: Phase
    source: CorpusSamples | Mixture | Task
    before: Mapping[str, Drawn]  # by path, what the run has drawn before it
    accumulation: int  # micro-batches of a rank in a step

    @property
    def config(self) -> Config:
        return self.phase.config

    @property
    def last_step(self) -> int:
        return self.phase.last_step

    def samples(self, step: int) -> int:
        """Count the samples of this phase up to and with a step."""
        return (step - self.phase.first_step + 1) * self.config.sequences

    def drawn(self, step: int) -> dict[str, Drawn]:
        """Count what the run has drawn of each folder or task, by its path, up to and with a step of this phase."""
        now = self.source.drawn(self.samples(step), self.config.data.context)
        moved = {each.fingerprint for each in now.values()}  # a folder's path may be another than before
        return {path: each for path, each in self.before.items() if each.fingerprint not in moved} | now

    def documents(self, step: int) -> list[str]:
        """List the ids of the documents in the batch of a step."""
        config = self.config
        number = step - self.phase.first_step
        return batch_documents(self.source, config.run.seed, number, config.sequences, config.data.context)

    def check_lasts(self, end: int) -> None:
        """Raise DataError where a source of a mixture runs out in this phase, or before step `end`."""
        phase, steps = self.phase, min(self.phase.last_step, end) - self.phase.first_step + 1
        if isinstance(self.source, Mixture) and steps > 0:
            config = phase.config
            self.source.check_lasts(steps, config.sequences, config.data.context, done=phase.first_step - 1)

    def batches(self) -> BatchPhase:
        config = self.config
        return BatchPhase(
            first=self.phase.first_step - 1,
            source=self.source,
            context=config.data.context,
            sequences=config.sequences,
            micro_batch=config.training.micro_batch,
        )


def open_phases(
    phases: Sequence[Phase], accumulation: Sequence[int], hashed: bool, before: Mapping[str, Drawn]
) -> list[OpenPhase]:
    """Open the data of all phases; with `hashed` rank 0 reads prepared folders whole to check their hashes.

    accumulation: of each phase. before: what was drawn, by path, before the first step. Raises DataError where a folder
    cannot be opened, has no window of a phase's context, or has another tokenizer than the first phase.
    """
    open_corpus = cache(partial(Corpus, hash_shards=hashed and groups.rank() == 0))
    longest = _longest(phases, open_corpus)
    found: list[OpenPhase] = []
    for phase, micro_batches in zip(phases, accumulation, strict=True):
        source = _open(phase.config, open_corpus, longest, before)
        try:
            source.check_context(phase.config.data.context)
        except DataError as error:
            raise DataError(f"{phase.name}{error}") from None
        if found and source.tokenizer_sha256 != (first := found[0].source.tokenizer_sha256):
            both = f"{phase.name}{phase.config.data.origin} and {phases[0].config.data.origin} of the first phase"
            if None in (source.tokenizer_sha256, first):
                raise DataError(f"{both} are a task and text; a run trains on one of them in all its phases")
            raise DataError(
                f"{both} were made with different tokenizers; prepare one of them again with --tokenizer of the other"
            )
        _note_next_epochs(phase, source, before)
        found.append(OpenPhase(phase=phase, source=source, before=before, accumulation=micro_batches))
        before = found[-1].drawn(phase.last_step)
    return found


def _open(
    config: Config, open_corpus: Callable[[str], Corpus], longest: Mapping[str, int], before: Mapping[str, Drawn]
) -> CorpusSamples | Mixture | Task:
    path = config.data.path
    if path is None or not is_task(path):
        return open_text(config.data, open_corpus, longest, before.values())
    task = Task(path, config.data.synthetic, config.model.vocab_size, "train")
    if path in before:
        task.used = before[path].tokens
    return task


def _note_next_epochs(phase: Phase, source: CorpusSamples | Mixture | Task, before: Mapping[str, Drawn]) -> None:
    """Say of which folders a phase passes over the rest of an epoch: in another order there is no such place."""
    then = {each.fingerprint: each for each in before.values()}
    for path, now in source.drawn(0, phase.config.data.context).items():
        drawn = then.get(now.fingerprint)
        if drawn and drawn.epochs and drawn.order != now.order:
            log_rank0(
                f"note: {phase.name}{path} goes on with its next epoch, since its {now.order} have another order than "
                f"the {drawn.order} before"
            )


def _longest(phases: Sequence[Phase], open_corpus: Callable[[str], Corpus]) -> dict[str, int]:
    """Find the longest context in which each prepared folder is cut into windows, by its fingerprint."""
    found: dict[str, int] = {}
    for data in (phase.config.data for phase in phases):
        paths = [data.path or ""] if data.sources is None else [source.path for source in data.sources]
        if data.packing == "contiguous" and not is_task(paths[0]):
            for content in (open_corpus(path).fingerprint for path in paths):
                found[content] = max(found.get(content, 0), data.context)
    return found
