"""Block-causal attention in PyTorch: a loop over blocks with a running state, and its derivative by hand.

Autograd would keep features and scores of every block; here the backward pass recomputes them, so memory is that of
the inputs, the output and one state. All arithmetic is fp32 (float64 for float64 inputs), one block at a time.
A column of ones behind v, v̄ = [v, 1], makes the normaliser a part of every product:

    [N_t, Z_t] = [0, offset] + Σ_{s local} w(scale·q_t·k_s) v̄_s + φ(a_t)ᵀ S      S = Σ_{s earlier} φ(b_s) v̄_sᵀ
    o = N / Z      n̄ = [do, -(do·o)] / Z      dW_ts = n̄_t·v̄_s, the gradient of every weight, local or through S
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lcpt_kernels.features import QuadraticFeatures


class Power(NamedTuple):
    """The local weight w(s) = s^degree and its derivative, for a tile of scores s, 0 above `diagonal`."""

    degree: int

    def weight(self, s: Tensor, diagonal: int) -> Tensor:
        return _power(s.tril_(diagonal), self.degree)

    def weight_and_derivative(self, s: Tensor, diagonal: int) -> tuple[Tensor, Tensor]:
        lower = _power(s.tril_(diagonal), self.degree - 1)
        return lower * s, lower.mul_(self.degree)  # in this order: the second may overwrite s


class Quadratic(NamedTuple):
    """w(s) = c₀ + c₁ s + c₂ s²: the local weight where it is the same as that of the state."""

    c0: float
    c1: float
    c2: float

    def weight(self, s: Tensor, diagonal: int) -> Tensor:
        return (self.c0 + s * (self.c1 + self.c2 * s)).tril_(diagonal)

    def weight_and_derivative(self, s: Tensor, diagonal: int) -> tuple[Tensor, Tensor]:
        return self.weight(s, diagonal), (self.c1 + 2 * self.c2 * s).tril_(diagonal)


class Plan(NamedTuple):
    """Everything about block-causal attention that is no tensor. `features` None: there is no state."""

    local: Power | Quadratic
    features: QuadraticFeatures | None
    scale: float
    offset: float
    block_size: int
    local_blocks: int

    def blocks(self, tokens: int) -> list[tuple[slice, slice, slice | None]]:
        """For each block: its rows, the keys it sees exactly, and the block that leaves them for the state."""
        c, reach = self.block_size, self.block_size * self.local_blocks
        return [
            (slice(t, min(t + c, tokens)), slice(max(0, t + c - reach), min(t + c, tokens)),
             slice(t - reach, t - reach + c) if t >= reach and self.features else None)
            for t in range(0, tokens, c)
        ]


def block_causal_attention(q: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, plan: Plan) -> Tensor:
    """q, k [B, T, H, D], v [B, T, H, Dv], and for the state a, b [B, T, H, r] -> o [B, T, H, Dv] in q's dtype."""
    heads_first = [x if x is None else x.transpose(1, 2) for x in (q, k, v, a, b)]
    return _BlockCausal.apply(*heads_first, plan).transpose(1, 2)


class _BlockCausal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, a, b, plan):
        o = torch.empty_like(v, dtype=q.dtype)
        z = v.new_empty(*v.shape[:-1], 1, dtype=_accumulator(v))
        state = _empty_state(plan, v)
        for rows, near, leaving in plan.blocks(v.shape[2]):
            s = plan.scale * _block(q, rows) @ _block(k, near).mT  # [.., c, ≤ ℓc]
            nz = plan.local.weight(s, rows.start - near.start) @ _with_ones(v, near)  # [.., c, Dv + 1]
            if leaving:
                state += plan.features.key(_columns(b, leaving)) @ _with_ones(v, leaving)  # [.., F, Dv + 1]
                nz += plan.features.query(_columns(a, rows)).mT @ state
            z_rows = nz[..., -1:] + plan.offset
            z_rows.masked_fill_(z_rows == 0, torch.inf)  # 0/0 is 0, and so are its gradients
            o[:, :, rows] = nz[..., :-1] / z_rows
            z[:, :, rows] = z_rows
        ctx.save_for_backward(q, k, v, a, b, o, z)
        ctx.plan = plan
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, a, b, o, z = ctx.saved_tensors
        plan, features = ctx.plan, ctx.plan.features
        blocks = plan.blocks(v.shape[2])
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=_accumulator(x)) for x in (k, v))  # a block's share comes in parts
        da, db = (x if x is None else torch.zeros_like(x) for x in (a, b))

        def output_gradient(rows):
            do_rows = _block(do, rows)
            dz = -(do_rows * o[:, :, rows]).sum(-1, keepdim=True)
            return torch.cat((do_rows, dz), dim=-1) / z[:, :, rows]  # n̄ [.., c, Dv + 1]

        state = _empty_state(plan, v)
        for rows, near, leaving in blocks:  # forwards, with the state: gradients of the local scores and of a
            n, q_rows, k_near = output_gradient(rows), plan.scale * _block(q, rows), _block(k, near)
            w, slope = plan.local.weight_and_derivative(q_rows @ k_near.mT, rows.start - near.start)
            ds = slope.mul_(n @ _with_ones(v, near).mT)
            dv[:, :, near] += w.mT @ n[..., :-1]
            dq[:, :, rows] = plan.scale * (ds @ k_near)
            dk[:, :, near] += ds.mT @ q_rows
            if leaving:
                state += features.key(_columns(b, leaving)) @ _with_ones(v, leaving)
                da[:, :, rows] = features.query_backward(_columns(a, rows), state @ n.mT).mT

        d_state = _empty_state(plan, v)
        for rows, _, leaving in reversed(blocks):  # backwards, with the state's gradient: b and the rest of v
            if leaving:
                d_state += features.query(_columns(a, rows)) @ output_gradient(rows)
                b_leaving = _columns(b, leaving)
                dv[:, :, leaving] += features.key(b_leaving).mT @ d_state[..., :-1]
                db[:, :, leaving] = features.key_backward(b_leaving, d_state @ _with_ones(v, leaving).mT).mT
        return dq, dk.to(k.dtype), dv.to(v.dtype), da, db, None


def _empty_state(plan: Plan, v: Tensor) -> Tensor | None:
    """S [B, H, F, Dv + 1] of the blocks that are no longer local, before there are any; or its gradient."""
    if plan.features:
        return v.new_zeros(*v.shape[:2], plan.features.dimension, v.shape[-1] + 1, dtype=_accumulator(v))
    return None


def _block(x: Tensor, rows: slice) -> Tensor:
    return x[:, :, rows].to(_accumulator(x))


def _with_ones(v: Tensor, rows: slice) -> Tensor:
    return torch.nn.functional.pad(_block(v, rows), (0, 1), value=1.0)


def _columns(x: Tensor, rows: slice) -> Tensor:
    return _block(x, rows).mT.contiguous()


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _power(x: Tensor, n: int) -> Tensor:
    """x^n by squaring: torch.pow is a transcendental for n > 3."""
    if n == 1:
        return x
    half = _power(x, n // 2)
    return half.square() if n % 2 == 0 else half.square().mul_(x)
