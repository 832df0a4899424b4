"""Give a model the weights of one whose attention may differ: chosen layers of softmax become linear, say.

A layer whose kind changes keeps what all kinds share: projections, norms of queries and keys, key shift, gate. What a
kind has of its own passes to a layer of that kind alone, since the same name and shape may mean something else in
another: flurka's gamma is not polysketch's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lcpt.attention.base import SHARED
from lcpt.checkpoint import CheckpointError, TensorReader, open_checkpoint, read_manifest
from lcpt.data.open_tokenizer import find_tokenizer
from lcpt.model.gpt import GPT, ModelConfig
from lcpt.model.pretrained import CONFIG, REMEDY, WEIGHTS, check_export, is_export, model_config, step_config
from lcpt.utils.errors import first_line

Shapes = Mapping[str, list[int]]
STRUCTURE = {  # what must be the same: key of the section `model` -> its value in a config
    "n_layers": lambda config: config.n_layers,
    "d_model": lambda config: config.d_model,
    "n_heads": lambda config: config.n_heads,
    "n_kv_heads": lambda config: config.kv_heads,
    "vocab_size": lambda config: config.vocab_size,
    "norm": lambda config: config.norm,
    "feed_forward": lambda config: config.feed_forward,
    "d_ff": lambda config: config.ff_width,
    "bias": lambda config: config.bias,
    "tie_embeddings": lambda config: config.tie_embeddings,
    "positions": lambda config: config.positions,
    "max_positions": lambda config: config.max_positions,
    "attention.head_dim": lambda config: config.head_dim,
}
OF_ATTENTION = re.compile(r"blocks\.(\d+)\.attention\.(\w+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Holds what there is to know of stored weights before they are read."""

    folder: Path  # a step folder or an export
    config: ModelConfig
    shapes: Shapes
    is_export: bool

    @property
    def tokenizer(self) -> Path:
        """Its tokenizer's file, which is not there where it was trained on a task."""
        return find_tokenizer(self.folder)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors by name, each whole, fp32 on the CPU."""
        if self.is_export:
            with safe_open(self.folder / WEIGHTS, framework="pt") as file:
                yield from ((name, _widened(file.get_tensor(name))) for name in names)
        else:
            reader = TensorReader(self.folder, read_manifest(self.folder, hashes=False))
            yield from ((name, reader.whole("weights", name)) for name in names)


class Fit(NamedTuple):
    """Says which tensors a model takes from a source, in the order of names."""

    taken: list[str]
    initialised: list[str]  # that the source lacks: they stay as they were drawn
    dropped: list[str]  # of the source, that the model has no place for


def open_source(path: str | Path, *, hashes: bool = True) -> Source:
    """Open a run folder (its newest whole step), a step folder or an export; without `hashes` its files were checked a
    moment ago. Raises CheckpointError naming the file that is missing, damaged or not understood."""
    path = Path(path)
    if is_export(path):
        content = check_export(path, hashes=hashes)
        try:
            with safe_open(path / WEIGHTS, framework="pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  no mapping
        except SafetensorError as error:
            raise CheckpointError(f"{path / WEIGHTS} is no safetensors file ({first_line(error)}); {REMEDY}") from error
        config = model_config(content["model"], path / CONFIG)
        return Source(folder=path, config=config, shapes=shapes, is_export=True)
    step, manifest = open_checkpoint(path, hashes=hashes)
    shapes = {name: entry["shape"] for name, entry in manifest["tensors"]["weights"].items()}
    return Source(folder=step, config=step_config(step)[0], shapes=shapes, is_export=False)


def fit(source: Source, config: ModelConfig) -> Fit:
    """Say what a model of this config takes from the source. CheckpointError where more than attention differs."""
    differing = [
        f"model.{key} is {then} there and {now} in the config"
        for key, of in STRUCTURE.items()
        if (then := of(source.config)) != (now := of(config))
    ]
    if differing:
        raise CheckpointError(
            f"{source.folder} holds another model: {'; '.join(differing)}; only kinds of attention and their options "
            "may differ, so take the other keys of the config that it was trained with"
        )
    with torch.device("meta"):
        wanted = {name: list(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    found = Fit([], [], [])
    for name in sorted(source.shapes.keys() | wanted.keys()):
        there, here = source.shapes.get(name), wanted.get(name)
        if there == here and _means_the_same(name, source.config, config):
            found.taken.append(name)
            continue
        if not _may_differ(name, there, here, source.config, config):
            then, now = ("absent" if shape is None else shape for shape in (there, here))
            raise CheckpointError(
                f"{source.folder} holds another model: {name} is {then} there and {now} in the config, and no kind of "
                "attention explains it; take the config that it was trained with"
            )
        if here is not None:
            found.initialised.append(name)
        if there is not None:
            found.dropped.append(name)
    return found


def load_fitting(model: GPT, source: Source) -> Fit:
    """Load what `fit` says into a model, whose other tensors stay as they are. CheckpointError as in `fit`."""
    found, own = fit(source, model.config), model.state_dict()
    for name, tensor in source.read(found.taken):
        own[name].copy_(tensor)
    return found


def by_layer(names: Sequence[str]) -> str:
    """List names of blocks' tensors, those of layers that have the same once: blocks 0-2, 4: attention.gamma"""
    of_layer: defaultdict[int, list[str]] = defaultdict(list)
    for name in names:
        _, layer, rest = name.split(".", 2)
        of_layer[int(layer)].append(rest)
    layers: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for number in sorted(of_layer):
        layers[tuple(of_layer[number])].append(number)
    return "; ".join(f"blocks {_ranges(numbers)}: {', '.join(rest)}" for rest, numbers in layers.items())


def _means_the_same(name: str, then: ModelConfig, now: ModelConfig) -> bool:
    """Whether a tensor of this name is of the same use in both models."""
    if not (match := OF_ATTENTION.match(name)) or match[2] in SHARED:
        return True
    layer = int(match[1])
    return then.attention.kind_of_layer(layer) == now.attention.kind_of_layer(layer)


def _may_differ(
    name: str, there: list[int] | None, here: list[int] | None, then: ModelConfig, now: ModelConfig
) -> bool:
    """Whether another kind of attention, or other options of it, explain that a tensor is not the same in both."""
    match = OF_ATTENTION.match(name)
    if not match or (match[2] in SHARED and None not in (there, here)):  # what all kinds share is of one shape
        return False
    layer = int(match[1])
    kinds = then.attention.kind_of_layer(layer), now.attention.kind_of_layer(layer)
    return kinds[0] != kinds[1] or _options(then) != _options(now)


def _options(config: ModelConfig) -> dict:
    return {key: value for key, value in asdict(config.attention).items() if key not in ("kind", "pattern", "head_dim")}


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 4] -> 0-2, 4"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
