"""Block-causal attention in PyTorch: a loop over blocks with a running state, and its derivative by hand.

Autograd would keep features and scores of every block; here the backward pass recomputes them, so memory is that of
the inputs, the output and one state. All arithmetic is fp32 (float64 for float64 inputs), one block at a time.
A column of ones behind v, v̄ = [v, 1], makes the normaliser a part of every product. With G the running sum of the log
gate and B the last token before the block of t:

    [N_t, Z_t] = [0, offset] + Σ_{s local} e^{G_t − G_s} w(scale·q_t·k_s) v̄_s + e^{G_t − G_B} φ(a_t)ᵀ S
    S = Σ_{s earlier} e^{G_B − G_s} φ(b_s) v̄_sᵀ          o = N / Z
    n̄ = [do, -(do·o)] / Z      dW_ts = n̄_t·v̄_s, the gradient of every weight, local or through S

No exponent is positive. A weight W_ts depends on G_t − G_s, so dG_t = Σ_s dW_ts W_ts − Σ_t' dW_t't W_t't.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lcpt_kernels.features import Explicit, QuadraticFeatures


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


class Linear(NamedTuple):
    """w(s) = s, of features that are given."""

    def weight(self, s: Tensor, diagonal: int) -> Tensor:
        return s.tril_(diagonal)

    def weight_and_derivative(self, s: Tensor, diagonal: int) -> tuple[Tensor, Tensor]:
        return s.tril_(diagonal), torch.ones_like(s).tril_(diagonal)


class Plan(NamedTuple):
    """Everything about block-causal attention that is no tensor. `features` None: there is no state."""

    local: Power | Quadratic | Linear
    features: QuadraticFeatures | Explicit | None
    scale: float
    offset: float
    block_size: int
    local_blocks: int


class Block(NamedTuple):
    """Tokens of one block, as slices of the keys, of which the first may be older than the first query."""

    whole: slice
    rows: slice  # those of its tokens that ask; none where a state is carried to the start of an empty block
    near: slice  # the keys that they see exactly
    leaving: slice | None  # the block that goes over into the state at the start of this one

    @property
    def diagonal(self) -> int:
        """Of the tile rows × near: how many keys the first row sees before itself."""
        return self.rows.start - self.near.start

    @property
    def before(self) -> slice:
        """The last token before the block, if there is one."""
        return slice(max(0, self.whole.start - 1), self.whole.start)

    @classmethod
    def all(cls, plan: Plan, past: int, keys: int, to_the_end: bool) -> list[Block]:
        """The blocks of the queries past … keys; to_the_end: up to the one that the next token will be in."""
        c, reach = plan.block_size, plan.block_size * plan.local_blocks
        last = keys // c if to_the_end else (keys - 1) // c
        return [
            cls(
                whole=slice(t, min(t + c, keys)),
                rows=slice(max(t, past), min(t + c, keys)),
                near=slice(max(0, t + c - reach), min(t + c, keys)),
                leaving=slice(t - reach, t - reach + c) if t >= reach and plan.features else None,
            )
            for t in range(past // c * c, last * c + 1, c)
        ]


def block_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, plan: Plan, log_gate: Tensor | None = None,
    initial: Tensor | None = None, final: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """q [B, T, H, D] against k [B, P + T, H, D] and v [B, P + T, H, Dv]: the first P keys, which begin a block, are of
    tokens before the queries. For the state, a [B, T, H, r] and b [B, P + T, H, r], and `initial` [B, H, F, Dv + 1],
    that of what came before these keys. log_gate [B, P + T, H], ≤ 0, or None.

    -> (o [B, T, H, Dv] in q's dtype, with `final` the state [B, H, F, Dv + 1] for the token after the last).
    """
    heads_first = [x if x is None else x.transpose(1, 2) for x in (q, k, v, a, b, log_gate)]
    o, state = _BlockCausal.apply(*heads_first, initial, plan, final)
    return o.transpose(1, 2), state


class _BlockCausal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, a, b, log_gate, initial, plan, final):
        past, decay, features = k.shape[2] - q.shape[2], Decay(log_gate), plan.features
        o = q.new_empty(*q.shape[:3], v.shape[3])
        z = q.new_empty(*q.shape[:3], 1, dtype=_accumulator(v))
        state = _state(plan, v, initial)
        blocks = Block.all(plan, past, k.shape[2], final)
        for number, block in enumerate(blocks):
            state = decay.through(blocks[number - 1], state) if number else state
            if block.leaving:
                state += features.key(_columns(b, block.leaving)) @ decay.until(block, _with_ones(v, block.leaving))
            rows = _shift(block.rows, past)
            s = plan.scale * _block(q, rows) @ _block(k, block.near).mT  # [.., c, ≤ ℓc]
            w = decay.between(block, plan.local.weight(s, block.diagonal))
            nz = w @ _with_ones(v, block.near)  # [.., c, Dv + 1]
            if block.leaving or initial is not None:
                nz += decay.since(block, features.query(_columns(a, rows)).mT @ state)  # state [.., F, Dv + 1]
            z_rows = nz[..., -1:] + plan.offset
            z_rows.masked_fill_(z_rows == 0, torch.inf)  # 0/0 is 0, and so are its gradients
            o[:, :, rows] = nz[..., :-1] / z_rows
            z[:, :, rows] = z_rows
        ctx.save_for_backward(q, k, v, a, b, log_gate, initial, o, z, state if final else None)
        ctx.plan = plan
        return o, state if final else None

    @staticmethod
    def backward(ctx, do, d_final):
        q, k, v, a, b, log_gate, initial, o, z, final = ctx.saved_tensors
        plan, features, past, decay = ctx.plan, ctx.plan.features, k.shape[2] - q.shape[2], Decay(log_gate)
        blocks = Block.all(plan, past, k.shape[2], final is not None)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=_accumulator(x)) for x in (k, v))  # a block's share comes in parts
        da, db = (x if x is None else torch.zeros_like(x) for x in (a, b))

        def output_gradient(rows):
            do_rows = _block(do, rows)
            dz = -(do_rows * o[:, :, rows]).sum(-1, keepdim=True)
            return torch.cat((do_rows, dz), dim=-1) / z[:, :, rows]  # n̄ [.., c, Dv + 1]

        state = _state(plan, v, initial)
        for number, block in enumerate(blocks):  # forwards, with the state: gradients of the local scores and of a
            state = decay.through(blocks[number - 1], state) if number else state
            if block.leaving:
                state += features.key(_columns(b, block.leaving)) @ decay.until(block, _with_ones(v, block.leaving))
            rows, near = _shift(block.rows, past), block.near
            n, q_rows, k_near = output_gradient(rows), plan.scale * _block(q, rows), _block(k, near)
            w, slope = plan.local.weight_and_derivative(q_rows @ k_near.mT, block.diagonal)
            w, dw = decay.between(block, w), n @ _with_ones(v, near).mT
            decay.depends(block.rows, near, w, dw)
            ds = decay.between(block, slope.mul_(dw))
            dv[:, :, near] += w.mT @ n[..., :-1]
            dq[:, :, rows] = plan.scale * (ds @ k_near)
            dk[:, :, near] += ds.mT @ q_rows
            if block.leaving or initial is not None:
                n, a_rows = decay.since(block, n), _columns(a, rows)
                da[:, :, rows] = features.query_backward(a_rows, state @ n.mT).mT
                decay.grows(block.rows, lambda a=a_rows, n=n, S=state: (features.query(a).mT @ S * n).sum(-1))

        d_state = _state(plan, v, d_final)
        if final is not None:
            decay.grows(blocks[-1].before, lambda: (final * d_final).sum((-2, -1))[..., None])
        for number, block in reversed(list(enumerate(blocks))):  # backwards, with the state's gradient: b, rest of v
            rows = _shift(block.rows, past)
            if block.leaving or initial is not None:
                d_state += features.query(_columns(a, rows)) @ decay.since(block, output_gradient(rows))
            if block.leaving:
                b_leaving, v_leaving = _columns(b, block.leaving), decay.until(block, _with_ones(v, block.leaving))
                d_leaving = features.key(b_leaving).mT @ d_state
                dv[:, :, block.leaving] += decay.until(block, d_leaving)[..., :-1]
                db[:, :, block.leaving] = features.key_backward(b_leaving, d_state @ v_leaving.mT).mT
                decay.grows(block.leaving, lambda d=d_leaving, v=v_leaving: -(d * v).sum(-1))
            d_state = decay.through(blocks[number - 1], d_state) if number else d_state
        if initial is not None:
            decay.grows(blocks[0].before, lambda: -(initial * d_state).sum((-2, -1))[..., None])
        d_initial = None if initial is None else d_state
        return dq, dk.to(k.dtype), dv.to(v.dtype), da, db, decay.gradient(), d_initial, None, None


class Decay:
    """The factors e^{G_t − G_s} of a log gate [B, H, K], and in backward its gradient; without a gate, factors of 1.

    B is the last token before a block. No factor is greater than 1.
    """

    def __init__(self, log_gate: Tensor | None):
        self._log_gate = log_gate
        self._dG = None if log_gate is None else torch.zeros_like(log_gate, dtype=_accumulator(log_gate))

    def between(self, block: Block, x: Tensor) -> Tensor:
        """x [.., rows, near] · e^{G_t − G_s}."""
        if self._log_gate is None:
            return x
        G = self._sums(block.near)
        first = block.rows.start - block.near.start
        return x * (G[..., first:, None] - G[..., None, :]).clamp_(max=0).exp_()  # above the diagonal x is 0

    def since(self, block: Block, x: Tensor) -> Tensor:
        """x [.., rows, ·] · e^{G_t − G_B}."""
        if self._log_gate is None:
            return x
        return x * self._sums(block.whole)[..., block.rows.start - block.whole.start :, None].exp()

    def until(self, block: Block, x: Tensor) -> Tensor:
        """x [.., leaving, ·] · e^{G_B − G_s}."""
        if self._log_gate is None:
            return x
        G = self._sums(slice(block.leaving.start, block.whole.start))
        return x * (G[..., -1:] - G[..., : x.shape[-2]])[..., None].exp()

    def through(self, block: Block, state: Tensor | None) -> Tensor | None:
        """A state at the start of `block`, carried to its end."""
        if self._log_gate is None or state is None:
            return state
        return state * self._sums(block.whole)[..., -1:, None].exp()

    def depends(self, rows: slice, keys: slice, w: Tensor, dw: Tensor) -> None:
        """Weights w [.., rows, keys] with gradients dw: dG_t += Σ_s dw w, dG_s -= Σ_t dw w."""
        if self._log_gate is not None:
            product = w * dw
            self._dG[..., rows] += product.sum(-1)
            self._dG[..., keys] -= product.sum(-2)

    def grows(self, tokens: slice, gradient) -> None:
        """dG of these tokens grows by gradient(), which without a gate is not computed."""
        if self._log_gate is not None and tokens.start < tokens.stop:
            self._dG[..., tokens] += gradient()

    def gradient(self) -> Tensor | None:
        """Of the log gate: every later G contains it."""
        if self._log_gate is None:
            return None
        return self._dG.flip(-1).cumsum(-1).flip(-1).to(self._log_gate.dtype)

    def _sums(self, tokens: slice) -> Tensor:
        return _accumulated(self._log_gate[..., tokens]).cumsum(-1)


def _state(plan: Plan, v: Tensor, given: Tensor | None) -> Tensor | None:
    """S [B, H, F, Dv + 1], or its gradient: a copy of the given one, else zeros."""
    if plan.features is None:
        return None
    if given is not None:
        return _accumulated(given).clone()
    return v.new_zeros(*v.shape[:2], plan.features.dimension, v.shape[-1] + 1, dtype=_accumulator(v))


def _shift(rows: slice, past: int) -> slice:
    return slice(rows.start - past, rows.stop - past)


def _block(x: Tensor, rows: slice) -> Tensor:
    return _accumulated(x[:, :, rows])


def _with_ones(v: Tensor, rows: slice) -> Tensor:
    return torch.nn.functional.pad(_block(v, rows), (0, 1), value=1.0)


def _columns(x: Tensor, rows: slice) -> Tensor:
    return _block(x, rows).mT.contiguous()


def _accumulated(x: Tensor) -> Tensor:
    return x.to(_accumulator(x))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _power(x: Tensor, n: int) -> Tensor:
    """x^n by squaring: torch.pow is a transcendental for n > 3."""
    if n == 1:
        return x
    half = _power(x, n // 2)
    return half.square() if n % 2 == 0 else half.square().mul_(x)
