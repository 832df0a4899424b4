"""Checks of the attention functions' arguments: one ValueError that names what does not fit.

torch.compile specialises a graph on every int that is formatted into a message, also where the message is not needed.
Sizes that differ from call to call, such as T, are therefore formatted only after a check has failed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "torch")
LEAST_GATE = -1000.0  # exp(LEAST_GATE) is 0, in float64 too


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_backend(backend: str, backends: tuple[str, ...] = BACKENDS) -> None:
    require(backend in backends, f"backend {backend!r} is none of {', '.join(backends)}")


def check_sizes(name: str, x: Tensor) -> None:
    """Raise ValueError if x [B, T, ...] has no heads or rows of no elements. B and T may be 0."""
    if 0 in x.shape[2:]:
        raise ValueError(f"{name} is {list(x.shape)}; all sizes after [B, T] must be at least 1")


def check_pair(x: Tensor, y: Tensor, v: Tensor, names: tuple[str, str]) -> None:
    """Raise ValueError if queries x [B, T, H, D], keys y [B, T, Hkv, D] and values v [B, T, Hkv, Dv] do not fit."""
    first, second = names
    for name, tensor in ((first, x), (second, y), ("v", v)):
        require(tensor.ndim == 4, f"{name} has {tensor.ndim} dimensions {tuple(tensor.shape)}; [B, T, H, D] needs 4")
        check_sizes(name, tensor)
    bt = [list(tensor.shape[:2]) for tensor in (x, y, v)]
    if not bt[0] == bt[1] == bt[2]:
        hint = "; they fit as [B, H, T, D]: give x.transpose(1, 2) of each" if _has_heads_first(x, y, v) else ""
        raise ValueError(f"{first}, {second} and v disagree on [B, T]: {bt[0]}, {bt[1]}, {bt[2]}{hint}")
    require(x.dtype == y.dtype == v.dtype, f"{first}, {second} and v differ in dtype: {x.dtype}, {y.dtype}, {v.dtype}")
    require(x.shape[3] == y.shape[3], f"{first} has head dimension {x.shape[3]}, {second} has {y.shape[3]}")
    require(y.shape[2] == v.shape[2], f"{second} has {y.shape[2]} heads, v has {v.shape[2]}")
    require(x.shape[2] % v.shape[2] == 0, f"{x.shape[2]} query heads are no multiple of {v.shape[2]} key-value heads")
    require(x.shape[1] > 0, f"{first} has no tokens")


def _has_heads_first(x: Tensor, y: Tensor, v: Tensor) -> bool:
    """Whether tensors that disagree on [B, T] would fit with heads before tokens. With as many heads of keys as of
    queries they agree, and nobody can tell."""
    same = x.shape[0] == y.shape[0] == v.shape[0] and x.shape[2] == y.shape[2] == v.shape[2]
    return same and y.shape[1] == v.shape[1] and y.shape[1] > 0 and x.shape[1] % y.shape[1] == 0


def check_power(degree: int, shift: float) -> None:
    """Raise ValueError where (s + shift)^degree is no weight of a key."""
    require(degree > 0 and degree % 2 == 0, f"degree {degree} is not positive and even: weights could be negative")
    require(0 <= shift < math.inf, f"shift is {shift}; it must be ≥ 0 and finite")


def is_on_device(x: Tensor) -> bool:
    """Return whether the host would wait for a device to read x."""
    return x.device.type != "cpu"


def check_packed(cu_seqlens: Tensor, batch: int, tokens: int) -> None:
    """Raise ValueError if cu_seqlens does not fit. On a GPU, and in compiled code, its values are checked on the
    device, so the host does not wait for them."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens is a {type(cu_seqlens).__name__}; it must be a tensor of int32 or int64")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype}; it must be int32 or int64")
    require(batch == 1, f"packed documents need B = 1, not {batch}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens is {list(cu_seqlens.shape)}; it must be [N + 1]")
    if is_on_device(cu_seqlens) or torch.compiler.is_compiling():
        rises = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens.diff() >= 0).all()
        torch._assert_async(rises, "cu_seqlens must rise from 0 to T")
        return
    ends = cu_seqlens.tolist()
    require(
        ends[0] == 0 and ends[-1] == tokens and ends == sorted(ends),
        f"cu_seqlens must rise from 0 to T = {tokens}; it is {ends}",
    )


def whole_blocks(cu_seqlens: Tensor, held: int, block_size: int) -> Tensor:
    """Return how many blocks packed documents complete, a scalar; the first one, where it is not empty, goes on after
    `held` tokens."""
    lengths = cu_seqlens.diff()
    return (lengths // block_size).sum() + torch.where(
        lengths[0] > 0, (lengths[0] + held % block_size) // block_size - lengths[0] // block_size, 0
    )


def check_packed_summaries(
    name: str, rows: int, summaries: int, block_size: int, cu_seqlens: Tensor, held: int = 0
) -> None:
    """Raise ValueError if there are fewer rows than summaries of the `whole_blocks`; on a GPU as in `check_packed`."""
    if summaries < 1 or rows % summaries:
        raise ValueError(f"{name} has {rows} rows, no multiple of {summaries} summaries")
    whole = whole_blocks(cu_seqlens, held, block_size) * summaries
    if is_on_device(cu_seqlens) or torch.compiler.is_compiling():
        torch._assert_async(whole <= rows, f"{name} has fewer rows than whole blocks have summaries")
        return
    require(
        rows >= int(whole),
        f"{name} has {rows} rows; {summaries} summaries of every whole block of {block_size} tokens are {int(whole)}",
    )


def finite_gate(log_gate: Tensor | None, backend: str) -> Tensor | None:
    """Return log_gate, clamped to LEAST_GATE for backends that subtract sums: a difference of infinite sums would be
    NaN. Clamped gates have no gradient."""
    return log_gate if log_gate is None or backend == "reference" else log_gate.clamp(min=LEAST_GATE)


def check_stream(
    v: Tensor,
    *,
    log_gate: Tensor | None,
    block_size: int,
    local_blocks: int,
    initial_state,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    exchange,
    backend: str,
) -> None:
    """Check the arguments that the functions of linear cost share."""
    require(block_size > 0, f"block_size {block_size} is not positive")
    require(local_blocks in (1, 2), f"local_blocks {local_blocks} is neither 1 nor 2")
    if log_gate is not None:
        require(log_gate.shape == v.shape[:3], f"log_gate is {list(log_gate.shape)}; it must be {list(v.shape[:3])}")
    require(initial_state is None or exchange is None, "initial_state and exchange both say what came before; give one")
    piece = initial_state is not None or output_final_state or exchange is not None
    require(not (piece and backend == "reference"), "backend reference keeps no state; take torch or auto")
    if cu_seqlens is not None:
        check_packed(cu_seqlens, *v.shape[:2])
