"""What the block-causal kernels compute and move, counted from their loops: squared attention and FLuRKA.

FLOPs: 2 a multiply-add of every matrix product that is started, padding and masked parts of tiles included. Bytes: each
tensor of a kernel to or from memory once, since the programs that share a state or keys run side by side and find them
in the L2 cache. Element-wise work is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from lcpt_kernels.triton.block_causal.state_layout import PAIR, Layout
from lcpt_kernels.triton.block_causal.state_walk import COLUMNS
from lcpt_kernels.triton.common import launch_configs

FP32_BYTES = 4


class Work(NamedTuple):
    """One launch, for one head of one sequence."""

    kernel: str  # as in the kernel report, without "_kernel"
    bytes: float
    programs: float  # 0: an operator of PyTorch
    flops: float = 0.0  # of all loops, and outside of them
    loops: tuple[float, ...] = ()  # the FLOPs of each innermost loop with products
    steps: tuple[float, ...] = ()  # those of all programs, of each innermost loop without
    blocks: int = 0  # that a program walks through, in pieces where programs are few
    settings: dict | None = None  # of the kernel report, where they are not those of the method


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Gives the size of one sequence of one head with q and k, no gate; tensors have the dtype."""

    tokens: int
    head_dim: int = 64
    features: int = 32  # coordinates of a sketch, or features that are given
    block_size: int = 256
    local_blocks: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """The blocks, each its first token and the one after its last."""
        return [(t, min(t + self.block_size, self.tokens)) for t in range(0, self.tokens, self.block_size)]

    @property
    def layout(self) -> Layout:
        return Layout(-(-self.features // 8) * 8, (0, 0, 1))

    @property
    def dim(self) -> int:
        return padded(self.head_dim)

    @property
    def rank(self) -> int:
        return padded(self.layout.size)

    @property
    def width(self) -> int:
        """The width that the table of tiles is asked for."""
        return max(self.head_dim, 2 * self.layout.size if self.layout.pairs else 0)

    def rows(self, *names: str, number: int | None = None) -> float:
        """Count the bytes of tensors with a row a token, or `number` rows: "wide" as q, k, v, o; "features" as a, b;
        "sum" as δ, the denominator and its reciprocal."""
        width = {
            "wide": self.head_dim * self.dtype.itemsize,
            "features": self.layout.size * self.dtype.itemsize,
            "sum": FP32_BYTES,
        }
        return (self.tokens if number is None else number) * sum(width[name] for name in names)

    @property
    def states(self) -> float:
        """Bytes of every block's state, numerator and denominator."""
        size = self.dtype.itemsize if self.layout.pairs else FP32_BYTES
        each = self.layout.features * self.head_dim * size + self.layout.denom_elements * FP32_BYTES
        return len(self.blocks) * each

    def tiles(self, kernel: str) -> tuple[int, int]:
        """Return BM and BN, queries and keys of a tile."""
        found = launch_configs.tiles(kernel, self.width, self.dtype)
        return found["BM"], found["BN"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FlurkaSize(Size):
    """Gives the size of a sequence of FLuRKA with softmax local weights, whose whole blocks have summaries."""

    features: int = 64
    local_blocks: int = 2
    summaries: int = 32  # of a block

    @property
    def layout(self) -> Layout:
        return Layout(-(-self.features // 8) * 8, (0, 1, 0))

    @property
    def all_summaries(self) -> int:
        return self.tokens // self.block_size * self.summaries


def forward(size: Size) -> list[Work]:
    return [states(size), output(size)]


def backward(size: Size) -> list[Work]:
    values = [backward_values(size)]
    if isinstance(size, FlurkaSize):
        values = [backward_values_local(size), backward_summaries(size)]
    return [
        Work("backward_delta", size.rows("wide", "wide", "sum", "sum", "sum"), size.tokens / 64),
        states(size),
        backward_queries(size),
        states_of_queries(size),
        *values,
        backward_keys(size),
    ]


def states(size: Size) -> Work:
    """Count the walk of keys, or of summaries, through the blocks, in one piece. The last block's reach no state."""
    rows, number = size.block_size, size.tokens
    if isinstance(size, FlurkaSize):
        rows, number = size.summaries, size.all_summaries
    columns = COLUMNS.value
    return walk(size, "block_state", len(size.blocks) - 1, rows, columns, size.rows("features", "wide", number=number))


def states_of_queries(size: Size) -> Work:
    """Count the walk of queries, for the gradient of the state."""
    columns = COLUMNS.value if size.layout.pairs else 2 * COLUMNS.value  # those of given features are more exact
    n_bytes = size.rows("features", "wide", "sum", "sum")
    return walk(size, "block_state, backward", len(size.blocks), size.block_size, columns, n_bytes)


def walk(size: Size, kernel: str, blocks: int, block_rows: int, columns: int, n_bytes: float) -> Work:
    """Count a walk whose sums z have `columns`."""
    s = size
    of_pairs = "block_state_pairs" if s.layout.pairs else "block_state"
    tile = min(launch_configs.tiles(of_pairs, s.head_dim, s.dtype)["BT"], padded(block_rows))
    programs = s.layout.pairs or steps(s.layout.size, PAIR)
    flops = programs * blocks * steps(block_rows, tile) * product(PAIR, tile, s.dim + columns)
    return Work(kernel, n_bytes + s.states, programs, flops, (flops,), blocks=blocks)


def of_softmax(size: Size) -> list[str]:
    """Return what row_max is to `rows`, where there is one."""
    return ["sum"] if isinstance(size, FlurkaSize) else []


def output(size: Size) -> Work:
    s = size
    M, N = s.tiles("block_forward")
    programs, tiles = keys_of_queries(s, M, N)
    # Of every pair of groups, unrolled, and with the Gram matrix.
    of_state = s.layout.pairs * product(M, PAIR, s.dim) + product(M, s.rank, s.rank)
    if not s.layout.pairs:
        of_state = of_features(s, M)
    local = tiles * 2 * product(M, N, s.dim)
    n_bytes = s.rows("wide", "features", "wide", "wide", "wide", "sum", *of_softmax(s)) + s.states
    return Work("block_forward", n_bytes, programs, programs * of_state + local, (local,))


def of_features(size: Size, rows: int) -> float:
    """Count the FLOPs of a product of rows and a state of given features, a loop that is unrolled."""
    return steps(size.layout.size, size.layout.tile) * product(rows, size.layout.tile, size.dim)


def backward_queries(size: Size) -> Work:
    s = size
    M, N = s.tiles("block_backward_dq")
    programs, tiles = keys_of_queries(s, M, N)
    local = tiles * 3 * product(M, N, s.dim)
    n_bytes = s.rows(*["wide"] * 5, "features", "features", "sum", "sum", *of_softmax(s)) + s.states
    if not s.layout.pairs:
        return Work("block_backward_dq", n_bytes, programs, programs * of_features(s, M) + local, (local,))
    of_state = s.layout.pairs * product(M, PAIR, s.dim)
    if s.dim <= PAIR:  # every coordinate's rows with all of a
        of_state = s.layout.size * product(M, s.rank, s.dim)
    flops = programs * (of_state + product(M, s.rank, s.rank)) + local
    return Work("block_backward_dq", n_bytes, programs, flops, (programs * of_state, local))


def backward_values(size: Size) -> Work:
    """Count the gradients of v and b where tokens are added to the state."""
    s = size
    M, N = s.tiles("block_backward_dv")
    programs, tiles = queries_of_keys(s, M, N)
    of_state, local = programs * s.layout.pairs * 2 * product(N, PAIR, s.dim), tiles * 2 * product(M, N, s.dim)
    n_bytes = s.rows(*["wide"] * 5, "features", "features", "sum") + s.states
    flops = of_state + programs * product(N, s.rank, s.rank) + local
    return Work("block_backward_dv", n_bytes, programs, flops, (of_state, local))


def backward_values_local(size: Size) -> Work:
    s = size
    M, N = s.tiles("block_backward_dv")
    programs, tiles = queries_of_keys(s, M, N)
    local = tiles * 2 * product(M, N, s.dim)
    n_bytes = s.rows(*["wide"] * 4, "sum", *of_softmax(s))
    return Work("block_backward_dv, local alone", n_bytes, programs, local, (local,))


def backward_summaries(size: FlurkaSize) -> Work:
    s = size
    M, N = s.tiles("block_backward_dv_summaries")
    programs = s.tokens // s.block_size * steps(s.summaries, N)  # an unfinished block has none
    n_bytes = s.rows(*["features"] * 2, *["wide"] * 2, number=s.all_summaries)
    return Work("block_backward_dv, state alone", n_bytes + s.states, programs, programs * 2 * of_features(s, N))


def backward_keys(size: Size) -> Work:
    s = size
    M, N = s.tiles("block_backward_dk")
    programs, tiles = queries_of_keys(s, M, N)
    local = tiles * 3 * product(M, N, s.dim)
    n_bytes = s.rows(*["wide"] * 5, "sum", "sum", *of_softmax(s))
    return Work("block_backward_dk", n_bytes, programs, local, (local,))


def padded(width: int) -> int:
    return max(16, 2 ** (width - 1).bit_length())


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


def block_causal_cost(heads: int, size: Size, mode: str) -> tuple[float, float]:
    """Count the FLOPs and bytes of a sequence."""
    kernels = forward(size) + (backward(size) if mode == "forward_backward" else [])
    return heads * sum(work.flops for work in kernels), heads * sum(work.bytes for work in kernels)
