"""Average the weights of checkpoints of one model: steps at the end of a run, or the ends of its branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lcpt.checkpoint import CheckpointError, TensorReader, open_checkpoint, read_state
from lcpt.data import find_tokenizer
from lcpt.model.gpt import GPT, ModelConfig
from lcpt.model.pretrained import Pretrained, check_output, step_config, write_pretrained
from lcpt.model.weights import check_tensors
from lcpt.utils.progress import progress_bar


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Holds a verified step folder and what it says of its model."""

    step: Path
    manifest: dict
    state: dict
    config: ModelConfig
    context: int

    @property
    def tokenizer(self) -> str | None:
        """The sha256 of its tokenizer."""
        return self.manifest["files"].get(find_tokenizer(self.step).name, {}).get("sha256")

    @property
    def origin(self) -> dict:
        return {
            "run": self.step.absolute().parents[1].name,
            "step": self.state["step"],
            "sha256": self.manifest["sha256"],
        }


def write_average(sources: Sequence[str | Path], output: str | Path) -> dict:
    """Export the mean of checkpoints to a new folder that appears whole or not at all; returns its config.json.

    sources: step folders, or runs (their newest whole step). Each tensor is summed in float64, one after the other.
    Raises CheckpointError where there are fewer than two, one twice, a damaged one, or of different models.
    """
    if len(sources) < 2:
        raise CheckpointError(f"a mean takes two checkpoints or more, and here is {len(sources)}; name another")
    check_output(output)
    opened = [_open(source) for source in progress_bar(sources, desc="checking", unit=" checkpoints")]
    newest = max(opened, key=lambda checkpoint: checkpoint.state["tokens"])
    _check_alike(opened)
    with torch.random.fork_rng(devices=[]):  # building it draws the initial weights
        model = GPT(newest.config)
    trained = Pretrained(
        folder=newest.step,
        model=model.eval(),
        tokenizer=find_tokenizer(newest.step),
        context=newest.context,
        step=newest.state["step"],
        tokens=newest.state["tokens"],
    )
    trained.check_tokenizer()
    _load_mean(model, opened)
    return write_pretrained(trained, output, [checkpoint.origin for checkpoint in opened])


def _open(source: str | Path) -> Checkpoint:
    step, manifest = open_checkpoint(source)
    config, context = step_config(step)
    return Checkpoint(step=step, manifest=manifest, state=read_state(step), config=config, context=context)


def _check_alike(opened: list[Checkpoint]) -> None:
    first, by_content = opened[0], dict[str, Path]()
    for checkpoint in opened:
        if (twin := by_content.setdefault(checkpoint.manifest["sha256"], checkpoint.step)) is not checkpoint.step:
            raise CheckpointError(f"{twin} and {checkpoint.step} are the same checkpoint; name it once")
        here, there = _computed(checkpoint.config), _computed(first.config)
        if here != there:
            key, *values = _first_difference(there, here)
            raise CheckpointError(
                f"{first.step} and {checkpoint.step} hold different models: model.{key} is {values[0]} and "
                f"{values[1]}; take checkpoints of one"
            )
        if checkpoint.tokenizer != first.tokenizer:
            raise CheckpointError(
                f"{first.step} and {checkpoint.step} have different tokenizers; take checkpoints of one"
            )


def _computed(config: ModelConfig) -> dict:
    """Return a config without the settings that leave what a model computes as it is."""
    return asdict(replace(config, activation_checkpointing=False, z_loss=0.0))


def _first_difference(one: dict, other: dict) -> tuple[str, object, object]:
    """Return (key, its value in one, in the other) of two nested mappings with the same keys."""
    key = next(key for key in one if one[key] != other[key])
    if not isinstance(one[key], dict):
        return key, one[key], other[key]
    inner, *values = _first_difference(one[key], other[key])
    return f"{key}.{inner}", values[0], values[1]


@torch.no_grad()
def _load_mean(model: GPT, opened: list[Checkpoint]) -> None:
    """Set every parameter to its mean. Buffers, such as random features, have no mean: they must be equal."""
    readers = [TensorReader(checkpoint.step, checkpoint.manifest) for checkpoint in opened]
    tensors, parameters = model.state_dict(), {name for name, _ in model.named_parameters()}
    wanted = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for checkpoint in opened:
        shapes = {name: entry["shape"] for name, entry in checkpoint.manifest["tensors"]["weights"].items()}
        check_tensors(shapes, wanted, checkpoint.step)
    for name, tensor in progress_bar(tensors.items(), desc="averaging", unit=" tensors"):
        first = readers[0].whole("weights", name)
        total = first.double()
        for checkpoint, reader in zip(opened[1:], readers[1:], strict=True):
            part = reader.whole("weights", name)
            if name not in parameters and not torch.equal(part, first):
                raise CheckpointError(
                    f"{opened[0].step} and {checkpoint.step} differ in {name}, which was drawn at random and has no "
                    "mean; take checkpoints of one run and its branches"
                )
            total += part
        tensor.copy_(total.div_(len(opened)))
