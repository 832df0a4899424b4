"""A step folder of a run, and ways to damage its files."""

import pytest
import torch

from lcpt.checkpoint import (
    Slice,
    commit_checkpoint,
    open_partial,
    write_piece,
)

STATE = {"step": 7, "tokens": 700, "loss": 0.1 + 0.2}
GROUPS = ("weights", "exp_avg", "exp_avg_sq")


def tensors(seed=0):
    """A matrix, a vector, a scalar, a transposed view, and one in bf16."""
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(5, 3, generator=draw)
    return {
        "matrix": matrix,
        "vector": torch.randn(4, generator=draw),
        "scalar": torch.randn((), generator=draw),
        "transposed": matrix.T,
        "half": matrix.bfloat16(),
    }


@pytest.fixture
def write(tmp_path):
    """write(step, seed) -> the step folder, of a run in tmp_path / "run"."""
    config = tmp_path / "config.yaml"
    config.write_text("run: {dir: x}\n")

    def write(step=7, seed=0):
        groups = {
            group: [
                Slice(name, tuple(tensor.shape), 0, tensor.float().flatten())
                for name, tensor in tensors(seed + n).items()
            ]
            for n, group in enumerate(GROUPS)
        }
        partial = open_partial(tmp_path / "run/checkpoints", step)
        return commit_checkpoint(partial, step, [write_piece(partial, 0, groups)], STATE, {"config.yaml": config})

    return write


def damage(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        path.write_bytes(flipped)
