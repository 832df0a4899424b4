"""Count what the kernels of squared attention compute and move, from their loops; and how long a GPU takes at least.

FLOPs: 2 a multiply-add of every matrix product that is started, padding and masked parts of tiles included. Bytes: each
tensor of a kernel to or from memory once, since the programs that share a state or keys run side by side and find them
in the L2 cache. Element-wise work is not counted. The model of a time is the sum over kernels of the larger of the two
at the GPU's peaks, and of their launches: a lower bound at efficiency 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from lcpt_kernels.triton.block_causal.state_layout import PAIR, Layout
from lcpt_kernels.triton.block_causal.state_walk import COLUMNS
from lcpt_kernels.triton.common import launch_configs

FP32_BYTES = 4


class Step(NamedTuple):
    """Counts a kernel over all blocks of one head."""

    kernel: str
    flops: float
    bytes: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Gives the size of one sequence of one head with q and k, no gate; tensors and states have the dtype."""

    tokens: int
    head_dim: int = 64
    sketch: int = 32
    block_size: int = 256
    local_blocks: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """The blocks, each its first token and the one after its last."""
        return [(t, min(t + self.block_size, self.tokens)) for t in range(0, self.tokens, self.block_size)]

    @property
    def layout(self) -> Layout:
        return Layout(-(-self.sketch // 8) * 8, (0, 0, 1))

    @property
    def dim(self) -> int:
        return padded(self.head_dim)

    @property
    def rank(self) -> int:
        return padded(self.layout.size)

    def rows(self, *names: str) -> float:
        """Count the bytes of tensors with a row a token: "wide" as q, k, v, o; "sketch" as a, b; "sum" as δ, the
        denominator and its reciprocal."""
        width = {
            "wide": self.head_dim * self.dtype.itemsize,
            "sketch": self.layout.size * self.dtype.itemsize,
            "sum": FP32_BYTES,
        }
        return self.tokens * sum(width[name] for name in names)

    @property
    def value_state(self) -> float:
        """Bytes of every block's numerator state."""
        return len(self.blocks) * self.layout.features * self.head_dim * self.dtype.itemsize

    @property
    def denom_state(self) -> float:
        """Bytes of every block's denominator state."""
        return len(self.blocks) * self.layout.denom_elements * FP32_BYTES


def padded(width: int) -> int:
    return max(16, 2 ** (width - 1).bit_length())


def forward(size: Size) -> list[Step]:
    return [*states(size), output(size)]


def backward(size: Size) -> list[Step]:
    s = size
    return [
        Step("backward_delta", 0, s.rows("wide", "wide", "sum", "sum", "sum")),
        *states(s),
        backward_query(s),
        *states(s, queries=True),
        backward_value(s),
        backward_key(s),
    ]


def states(size: Size, queries: bool = False) -> list[Step]:
    """Count the walk through the blocks: of keys, or of queries for the gradient of the state. The last block's keys
    reach no state. Sequences are not in pieces."""
    s = size
    tile = min(launch_configs.tiles("block_state", s.head_dim, s.dtype)["BT"], padded(s.block_size))
    rows = (len(s.blocks) - (not queries)) * steps(s.block_size, tile) * tile
    return [
        Step(
            "block_state",
            s.layout.pairs * product(PAIR, rows, s.dim + COLUMNS.value),
            s.rows("sketch", "wide", *["sum"] * 2 * queries) + s.value_state + s.denom_state,
        )
    ]


def from_state(size: Size, M: int) -> float:
    """Count the FLOPs of M queries' products with a state: of every pair of groups, and with the Gram matrix."""
    return size.layout.pairs * product(M, PAIR, size.dim) + product(M, size.rank, size.rank)


def output(size: Size) -> Step:
    s, tiles = size, launch_configs.tiles("block_forward", size.head_dim, size.dtype)
    M, N = tiles["BM"], tiles["BN"]
    programs, columns = keys_of_queries(s, M, N)
    return Step(
        "block_forward",
        programs * from_state(s, M) + columns * 2 * product(M, N, s.dim),
        s.rows("wide", "sketch", "wide", "wide", "wide", "sum") + s.value_state + s.denom_state,
    )


def backward_query(size: Size) -> Step:
    s, tiles = size, launch_configs.tiles("block_backward_dq", size.head_dim, size.dtype)
    M, N = tiles["BM"], tiles["BN"]
    programs, columns = keys_of_queries(s, M, N)
    of_state = from_state(s, M)
    if s.dim <= PAIR:  # every coordinate's rows with all of a
        of_state = s.layout.size * product(M, s.rank, s.dim) + product(M, s.rank, s.rank)
    return Step(
        "block_backward_dq",
        programs * of_state + columns * 3 * product(M, N, s.dim),
        s.rows(*["wide"] * 5, "sketch", "sketch", "sum", "sum") + s.value_state + s.denom_state,
    )


def backward_value(size: Size) -> Step:
    s, tiles = size, launch_configs.tiles("block_backward_dv", size.head_dim, size.dtype)
    M, N = tiles["BM"], tiles["BN"]
    programs, rows = queries_of_keys(s, M, N)
    state_flops = s.layout.pairs * 2 * product(N, PAIR, s.dim) + product(N, s.rank, s.rank)
    return Step(
        "block_backward_dv",
        programs * state_flops + rows * 2 * product(M, N, s.dim),
        s.rows(*["wide"] * 5, "sketch", "sketch", "sum") + s.value_state + s.denom_state,
    )


def backward_key(size: Size) -> Step:
    s, tiles = size, launch_configs.tiles("block_backward_dk", size.head_dim, size.dtype)
    M, N = tiles["BM"], tiles["BN"]
    _, rows = queries_of_keys(s, M, N)
    return Step("block_backward_dk", rows * 3 * product(M, N, s.dim), s.rows(*["wide"] * 5, "sum", "sum"))


def product(m: int, n: int, k: int) -> float:
    return 2.0 * m * n * k


def steps(tokens: int, tile: int) -> int:
    return max(0, -(-tokens // tile))


def keys_of_queries(size: Size, M: int, N: int) -> tuple[int, int]:
    """Count programs of M queries, and the tiles of N keys that they loop over; none goes past its last query."""
    programs = tiles = 0
    for first, stop in size.blocks:
        start = max(0, first - (size.local_blocks - 1) * size.block_size)
        for piece in range(steps(size.block_size, M)):
            programs += 1
            tiles += steps(min(stop, first + (piece + 1) * M) - start, N)
    return programs, tiles


def queries_of_keys(size: Size, M: int, N: int) -> tuple[int, int]:
    """Count programs of N keys, and the tiles of M queries that they loop over; none begins before its first key."""
    programs = tiles = 0
    for first, _ in size.blocks:
        last = min(size.tokens, first + size.local_blocks * size.block_size)
        for piece in range(steps(size.block_size, N)):
            programs += 1
            tiles += steps(last - first - piece * N, M)
    return programs, tiles


def squared_cost(heads: int, size: Size, mode: str) -> tuple[float, float]:
    """Count the FLOPs and bytes of a sequence."""
    kernels = forward(size) + (backward(size) if mode == "forward_backward" else [])
    return heads * sum(step.flops for step in kernels), heads * sum(step.bytes for step in kernels)


def softmax_cost(heads: int, head_dim: int, context: int, mode: str) -> tuple[float, float]:
    """Count flash attention as its authors do: the causal half of two products forward, of five backward; q, k, v and
    o, and backward their gradients too, once, in 16 bits."""
    products, tensors = (7, 12) if mode == "forward_backward" else (2, 4)
    return heads * products * 1.0 * head_dim * context**2, heads * tensors * 2.0 * head_dim * context


class Gpu(NamedTuple):
    """Gives the peaks that programs reach, and the seconds of a launch."""

    flops: float  # a second, of bf16 products
    bytes: float  # a second, of a copy, read and written
    launch: float


def seconds(kernels: list[Step], heads: int, gpu: Gpu, efficiency: float) -> float:
    """Model the time: `efficiency` is the part of the peak of products that the kernels reach."""
    return sum(
        max(heads * step.flops / (gpu.flops * efficiency), heads * step.bytes / gpu.bytes) + gpu.launch
        for step in kernels
    )
