"""The state that each block's queries meet, from keys; the gradient of what each block adds to it, from queries.

    keys      S_{n+1} = Λ_n S_n + x_n                          x_n = Σ_{s in n} e^{u_s} φ(b_s) [v_s, 1]ᵀ
              of two local blocks Λ_n (S_n + x_{n−1})
    queries   D_n = Λ_n D_{n+1} + y_n,  from the last block    y_n = Σ_{t in n} e^{g_t} φ(a_t) [do_t, δ_t]ᵀ / l_t
              dx_n = D_{n+1},  of two local blocks Λ_{n+1} D_{n+2}

One kernel walks through the blocks, forwards or backwards (`state_walk.py`). A program holds the rows of 64 features
[64, Dv] and their sums in registers, in fp32, and writes once what a block meets. Programs of one head read the same
tokens at about the same time, so these come from memory once. Where programs are too few for a GPU, sequences are cut
into pieces: a first launch computes what each piece adds, in a second a piece begins with what those before it added.
Notation: `block_causal/__init__.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lcpt_kernels.symmetric_features import PAIR
from lcpt_kernels.triton.block_causal.problem import Problem
from lcpt_kernels.triton.block_causal.state_walk import block_state_kernel
from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tensors import padded

PROGRAMS = 264  # two for each of an H200's multiprocessors
BLOCKS = 16  # of a piece at least
Pair = tuple[Tensor | None, Tensor | None]  # a state's numerator and denominator


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """What a walk of keys met at each block, with the queries' weights, and where it ended, without; of queries, the
    gradients of what each block's keys add, and of the state before the first block."""

    value: Tensor  # [N, Hkv, F, Dv], not kept [0, Hkv, F, Dv]
    denom: Tensor  # [N, Hkv, M] fp32
    value_end: Tensor  # [docs, Hkv, F, Dv] fp32, not asked for [0, Hkv, F, Dv]
    denom_end: Tensor  # [docs, Hkv, M] fp32
    through: Tensor | None  # [N, Hkv] fp32, as in `gate.py`, of queries with a gate


class Rows(NamedTuple):
    """What a walk sums: Σ factor φ(x) [y, z]ᵀ, of x [B, T, H, R] and y [B, T, H, Dv]."""

    x: Tensor
    y: Tensor
    factor: Tensor | None  # [B, H, T] fp32; None: 1
    z: Tensor | None  # [B, H, T] fp32; None: 1


def states_at_block_starts(problem: Problem, before: Pair = (None, None), keep: bool = True) -> States:
    """Return the states at each block's start, with the queries' weights, and with problem.keep_final_state those at
    the last block's. before: [docs, Hkv, ·] fp32, those at the first block's, None: 0. Without keep, the end alone."""
    p = problem
    factor = None if p.gate_rev_cumsum is None else p.gate_rev_cumsum.exp()
    return walk(p, Rows(p.b, p.state_v, factor, p.mass), before, keep=keep, end=p.keep_final_state)


def state_gradients(
    problem: Problem, do: Tensor, delta: Tensor, reciprocal: Tensor, d_end: Pair, met: States | None
) -> States:
    """Return the gradients of what each block adds to the state and, with problem.has_initial_state, of that before.

    Args:
        do: [B, T, H, Dv]. delta, reciprocal: [B, H, T] fp32, δ and 1 / l.
        d_end: [docs, Hkv, ·] fp32, the gradient of the final state, None: 0.
        met: with a gate, what `states_at_block_starts` returned.
    """
    p = problem
    factor = reciprocal
    if p.gate_cumsum is not None:
        gates = p.gate_cumsum[..., p.past :].sum(2).exp()  # [B, Hkv, T]
        factor = (reciprocal.unflatten(1, (gates.shape[1], -1)) * gates[:, :, None]).flatten(1, 2)
    return walk(p, Rows(p.a, do, factor, delta), d_end, queries=True, keep=True, end=p.has_initial_state, met=met)


def walk(
    problem: Problem,
    rows: Rows,
    start: Pair,
    *,
    queries: bool = False,
    keep: bool,
    end: bool,
    met: States | None = None,
) -> States:
    """Start the kernel: once for the pairs of groups, once for x itself and 1, of what the layout has."""
    p, layout, x, y = problem, problem.layout, rows.x, rows.y
    heads, width = p.v.shape[2], y.shape[3]
    blocks = p.blocks if queries else p.state_blocks
    block_rows = blocks.size if queries or not p.summaries else p.summaries

    def empty(number: int, type: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        return (
            x.new_empty(number, heads, layout.features, width, dtype=type),
            x.new_empty(number, heads, layout.denom_elements, dtype=torch.float32),
        )

    value, denom = empty(blocks.count if keep else 0, p.state_type)
    value_end, denom_end = empty(len(blocks.documents) if end else 0)
    gated = p.log_decay is not None
    c0, c1, c2 = layout.coefficients
    through = []
    rest = layout.size * layout.linear + layout.constant
    for squares, number in ((True, layout.pairs), (False, triton.cdiv(rest, PAIR))):
        if number == 0:
            continue
        programs = len(blocks.documents) * number * heads
        pieces = number_of_pieces(programs, blocks.count // max(1, len(blocks.documents)))
        name = "block_state_gated" if gated else "block_state"
        if squares and not gated and not (queries and (end or pieces > 1)):  # else it would spill
            name = "block_state_pairs"
        tiles = launch_configs.tiles(name, width, y.dtype)
        tiles["BT"] = min(tiles["BT"], padded(block_rows))
        if queries and gated:
            through.append(x.new_zeros(blocks.count, heads, number, dtype=torch.float32))
        arguments: dict = dict(
            x=x,
            x_strides=x.stride()[:3],
            y=y,
            y_strides=y.stride()[:3],
            factor=rows.factor,
            z=rows.z,
            log_decay=p.log_decay,
            value_start=None,
            denom_start=None,
            value_met=None,
            denom_met=None,
            value_state=value,
            denom_state=denom,
            value_end=None,
            denom_end=None,
            value_part=None,
            denom_part=None,
            part_decay=None,
            through=None,
            blocks=blocks.table,
            documents=blocks.documents,
            pair_table=layout.table(x.device),
            tokens=x.shape[1],
            past=p.past if queries else 0,
            group=x.shape[2] // heads,
            block_rows=block_rows,
            tiles=number,
            kept=0,
            c0=float(c0),
            c1=float(c1),
            c2=float(c2),
            R=layout.size,
            F=layout.features,
            M=layout.denom_elements,
            DV=width,
            DV_PAD=padded(width),
            PAIRS=layout.pairs,
            LINEAR=layout.linear,
            CONSTANT=layout.constant,
            SQUARES=squares,
            LOCAL_BLOCKS=p.local_blocks,
            Z=rows.z is not None,
            FACTOR=rows.factor is not None,
            GATED=gated,
            QUERIES=queries,
            START=False,
            END=False,
            PARTS=False,
            AFTER_PARTS=False,
            STEPS=triton.cdiv(block_rows, tiles["BT"]),
            STAGES=tiles["num_stages"],
            **tiles,
        )
        grid = (len(blocks.documents) * number, heads, pieces)
        if pieces > 1:
            value_part, denom_part = empty(len(blocks.documents) * pieces)
            part_decay = x.new_empty(len(blocks.documents), pieces, heads, dtype=torch.float32)
            parts = dict(value_part=value_part, denom_part=denom_part, part_decay=part_decay)
            block_state_kernel[grid](**arguments | parts | dict(PARTS=True))
            arguments |= parts | dict(AFTER_PARTS=True)
        arguments |= dict(value_start=start[0], denom_start=start[1], START=start[0] is not None)
        arguments |= dict(value_end=value_end, denom_end=denom_end, END=end, kept=int(keep))
        if met is not None:
            arguments |= dict(value_met=met.value, denom_met=met.denom, through=through[-1])
        block_state_kernel[grid](**arguments)
    return States(
        value=value,
        denom=denom,
        value_end=value_end,
        denom_end=denom_end,
        through=torch.cat(through, 2).sum(2) if through else None,
    )


def number_of_pieces(programs: int, blocks: int) -> int:
    """Return how many pieces the `blocks` of a sequence are cut into: 1 where `programs` fill an H200 half. All but the
    last piece are walked through twice, and the first time all start with 0, so two pieces would gain nothing."""
    pieces = min(PROGRAMS // max(1, programs), blocks // BLOCKS)
    return pieces if pieces > 2 else 1
