"""Read tensors of a safetensors folder, one file or several with an index, and put ours together from them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lcpt.checkpoint import CheckpointError
from lcpt.model.huggingface.import_settings import read_json
from lcpt.utils.errors import first_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Source(NamedTuple):
    """Names a tensor of theirs, and the shape that it must have."""

    name: str
    shape: tuple[int, ...]


class Made(NamedTuple):
    """Says how one of our tensors is made: of theirs, one below the other, each transposed first where they are."""

    sources: tuple[Source, ...]
    transposed: bool = False


def one(name: str, *shape: int) -> Made:
    """Take one tensor of theirs as it is."""
    return Made((Source(name, shape),))


class TensorFiles:
    """Opens the files of a folder. Raises CheckpointError naming the one that is missing or damaged.

    Attributes: folder, shapes and dtypes (of safetensors) by name.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._opened: dict[Path, Any] = {}
        self._places = self._find()
        slices = {name: self._opened[path].get_slice(name) for name, path in self._places.items()}
        self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        self.dtypes = {name: part.get_dtype() for name, part in slices.items()}

    @property
    def widened(self) -> list[str]:
        """Name the narrower types whose values become fp32."""
        return sorted({FLOATS[dtype] for dtype in self.dtypes.values() if dtype in ("BF16", "F16")})

    def read(self, name: str) -> Tensor:
        """Read a tensor into memory; bf16 and fp16 become fp32, which holds all of their values."""
        tensor = self._opened[self._places[name]].get_tensor(name)
        # A copy, since the tensor is a window on the file.
        return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)

    def place(self, name: str) -> str:
        """Name a tensor and its file, for messages."""
        return f"{self._places[name]}: {name}"

    def _find(self) -> dict[str, Path]:
        if (path := self.folder / SINGLE).exists():
            return dict.fromkeys(self._open(path), path)
        if (index := self.folder / INDEX).exists():
            return self._find_sharded(index)
        if pickles := sorted(path for pattern in PICKLES for path in self.folder.glob(pattern)):
            raise CheckpointError(
                f"{pickles[0]} is pickle, which lcpt does not read; convert to safetensors: in transformers, load the "
                "model and call save_pretrained"
            )
        raise CheckpointError(f"{self.folder} holds neither {SINGLE} nor {INDEX}; name the folder of a model")

    def _find_sharded(self, index: Path) -> dict[str, Path]:
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise CheckpointError(f"{index} has no weight_map, from tensors to files; fetch it again")
        for file in sorted(set(listed.values())):
            if Path(file).name != file:
                raise CheckpointError(f"{index} names {file}, which is no file of the folder")
            path = self.folder / file
            there = self._open(path)
            if lacking := [name for name, its in listed.items() if its == file and name not in there]:
                raise CheckpointError(f"{path} lacks {lacking[0]}, which {INDEX} lists; fetch both again")
        return {name: self.folder / file for name, file in listed.items()}

    def _open(self, path: Path) -> set[str]:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; fetch it again")
        try:
            self._opened[path] = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is no whole safetensors file ({first_line(error)}); fetch it again"
            ) from None
        return set(self._opened[path].keys())


def make_tensors(
    files: TensorFiles, recipe: Mapping[str, Made], *, prefix: str, ignored: str, tied: tuple[str, str] | None
) -> dict[str, Tensor]:
    """Make our tensors, fp32, by a recipe that names theirs without `prefix`, which a file may have or not.

    ignored: a pattern of buffers that hold nothing learned. tied: a tensor that a file may hold again, and the one that
    it must be equal to. Raises CheckpointError naming a tensor that is missing, extra, of another shape or quantized.
    """
    names = {name.removeprefix(prefix): name for name in files.shapes}
    if len(names) != len(files.shapes):
        raise CheckpointError(f"{files.folder} holds tensors both with and without the prefix {prefix}; take one model")
    sources = {source.name: source.shape for made in recipe.values() for source in made.sources}
    for name, shape in sources.items():
        if name not in names:
            raise CheckpointError(f"{files.folder} lacks the tensor {prefix}{name}, which its config.json asks for")
        if files.shapes[names[name]] != shape:
            raise CheckpointError(
                f"{files.place(names[name])} is {list(files.shapes[names[name]])}, and by config.json {list(shape)}"
            )
        if (dtype := files.dtypes[names[name]]) not in FLOATS:
            raise CheckpointError(f"{files.place(names[name])} is of dtype {dtype}; lcpt reads {', '.join(FLOATS)}")
    for name in sorted(names.keys() - sources.keys()):
        if tied and name == tied[0]:
            if not torch.equal(files.read(names[name]), files.read(names[tied[1]])):
                raise CheckpointError(
                    f"{files.place(names[name])} differs from {tied[1]}, and by config.json both are one matrix; "
                    "set tie_word_embeddings to false"
                )
        elif not re.fullmatch(ignored, name):
            raise CheckpointError(f"{files.place(names[name])} has no place in this model of lcpt")
    return {name: _make(files, made, names) for name, made in recipe.items()}


def _make(files: TensorFiles, made: Made, names: Mapping[str, str]) -> Tensor:
    parts = [files.read(names[source.name]) for source in made.sources]
    parts = [part.T for part in parts] if made.transposed else parts
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
