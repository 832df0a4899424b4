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

from lcpt_kernels.derivatives import first_derivative_only, refuse_transforms
from lcpt_kernels.symmetric_features import Explicit, QuadraticFeatures

FAINTEST = -60.0  # the least log M of a row that is not of local keys alone: e^{60} is finite, and 10³⁸ · e^{−60} too


class Power(NamedTuple):
    """The local weight w(s) = s^degree. See `Plan.local` for what its methods give."""

    degree: int

    def weights(self, s: Tensor, diagonal: int, decay: Tensor | None) -> tuple[Tensor, None]:
        return _decayed(_power(s.tril_(diagonal), self.degree), decay), None

    def weights_and_slopes(self, s: Tensor, diagonal: int, decay: Tensor | None, M: None) -> tuple[Tensor, Tensor]:
        lower = _decayed(_power(s.tril_(diagonal), self.degree - 1), decay)
        return lower * s, lower.mul_(self.degree)  # in this order: the second may overwrite s


class Quadratic(NamedTuple):
    """w(s) = c₀ + c₁ s + c₂ s²: the local weight where it is the same as that of the state."""

    c0: float
    c1: float
    c2: float

    def weights(self, s: Tensor, diagonal: int, decay: Tensor | None) -> tuple[Tensor, None]:
        return _decayed((self.c0 + s * (self.c1 + self.c2 * s)).tril_(diagonal), decay), None

    def weights_and_slopes(self, s: Tensor, diagonal: int, decay: Tensor | None, M: None) -> tuple[Tensor, Tensor]:
        return self.weights(s, diagonal, decay)[0], _decayed((self.c1 + 2 * self.c2 * s).tril_(diagonal), decay)


class Linear(NamedTuple):
    """w(s) = s, of features that are given."""

    def weights(self, s: Tensor, diagonal: int, decay: Tensor | None) -> tuple[Tensor, None]:
        return _decayed(s.tril_(diagonal), decay), None

    def weights_and_slopes(self, s: Tensor, diagonal: int, decay: Tensor | None, M: None) -> tuple[Tensor, Tensor]:
        return _decayed(s.tril_(diagonal), decay), _decayed(torch.ones_like(s).tril_(diagonal), decay)


class Exponential(NamedTuple):
    """w(s) = e^s. A row is over e^M, M the logarithm of its greatest term, so that nothing overflows and not all of it
    underflows; see `_joined`."""

    def weights(self, s: Tensor, diagonal: int, decay: Tensor | None) -> tuple[Tensor, Tensor]:
        """Over e^top, and top [.., rows, 1], each row's greatest exponent."""
        exponent = self._exponents(s, diagonal, decay)
        top = exponent.amax(-1, keepdim=True)
        return exponent.sub_(top).exp_(), top

    def weights_and_slopes(self, s: Tensor, diagonal: int, decay: Tensor | None, M: Tensor) -> tuple[Tensor, Tensor]:
        w = self._exponents(s, diagonal, decay).sub_(M).exp_()
        return w, w

    @staticmethod
    def _exponents(s: Tensor, diagonal: int, decay: Tensor | None) -> Tensor:
        exponent = s if decay is None else s + decay
        future = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu_(diagonal + 1)
        return exponent.masked_fill_(future, -torch.inf)


class Plan(NamedTuple):
    """Everything about block-causal attention that is no tensor.

    local, for a tile of scores s [.., rows, near], of which the first row sees `diagonal` keys before itself, and the
    logs of their decay:
        weights -> weights [.., rows, near], 0 in the future; the log [.., rows, 1] of what the rows are over, or None
        weights_and_slopes -> the weights again, over e^M, and their derivatives by s; M [.., rows, 1] or None
    features None: there is no state. summaries: how many stand for a block in the state; None: its tokens do.
    """

    local: Power | Quadratic | Linear | Exponential
    features: QuadraticFeatures | Explicit | None
    scale: float
    offset: float
    block_size: int
    local_blocks: int
    summaries: int | None = None


class Block(NamedTuple):
    """Tokens of one block, as slices of the keys, of which the first may be older than the first query."""

    whole: slice
    rows: slice  # those of its tokens that ask; none where a state is carried to the start of an empty block
    near: slice  # the keys that they see exactly
    leaving: slice | None  # the block that goes over into the state at the start of this one: its rows of the far keys
    fading: slice | None  # the tokens since which these decay: they themselves, or for summaries the block's last

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
        c = plan.block_size
        last = keys // c if to_the_end else (keys - 1) // c
        return [cls._at(plan, t, past, keys) for t in range(past // c * c, last * c + 1, c)]

    @classmethod
    def _at(cls, plan: Plan, t: int, past: int, keys: int) -> Block:
        c, reach = plan.block_size, plan.block_size * plan.local_blocks
        leaving = fading = None
        if t >= reach and plan.features:
            r, first = plan.summaries or c, t - reach
            leaving = slice(first // c * r, first // c * r + r)
            fading = slice(first + c - 1, first + c) if plan.summaries else leaving
        end = min(t + c, keys)
        return cls(slice(t, end), slice(max(t, past), end), slice(max(0, t + c - reach), end), leaving, fading)


class Far(NamedTuple):
    """What goes over into the state: b [B, H, ·, r] beside v [B, H, ·, Dv], of tokens or of summaries. mass [B, H, ·]:
    what a summary counts for in the normaliser; None: 1, as a token."""

    b: Tensor | None
    v: Tensor
    mass: Tensor | None

    def values(self, block: Block) -> Tensor:
        """v̄ = [v, mass] of what leaves at `block`, [.., rows, Dv + 1]."""
        if self.mass is None:
            return _with_ones(self.v, block.leaving)
        return torch.cat((_block(self.v, block.leaving), _block(self.mass, block.leaving)[..., None]), dim=-1)


def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    far: Far,
    plan: Plan,
    log_gate: Tensor | None = None,
    initial: Tensor | None = None,
    final: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """q [B, T, H, D] against k [B, P + T, H, D] and v [B, P + T, H, Dv]: the first P keys, which begin a block, are of
    tokens before the queries. For the state, a [B, T, H, r], and far, its tensors with heads third too, of the same
    P + T tokens or of their whole blocks' summaries; and `initial` [B, H, F, Dv + 1], that of what came before these
    keys. log_gate [B, P + T, H], ≤ 0, or None.

    -> (o [B, T, H, Dv] in q's dtype, with `final` the state [B, H, F, Dv + 1] for the token after the last).
    """
    refuse_transforms("block-causal attention", "reference")
    far_v = None if far.v is v else far.v
    heads_first = [x if x is None else x.transpose(1, 2) for x in (q, k, v, a, far.b, far_v, far.mass, log_gate)]
    o, state = _BlockCausal.apply(*heads_first, initial, plan, final)
    return o.transpose(1, 2), state


class _BlockCausal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, a, b, far_v, mass, log_gate, initial, plan, final):
        past, decay, features = k.shape[2] - q.shape[2], Decay(log_gate), plan.features
        far = Far(b, v if far_v is None else far_v, mass)
        o = q.new_empty(*q.shape[:3], v.shape[3])
        z = q.new_empty(*q.shape[:3], 1, dtype=accumulator(v))
        peak = torch.empty_like(z) if isinstance(plan.local, Exponential) else None
        state = _state(plan, v, initial)
        blocks = Block.all(plan, past, k.shape[2], final)
        for number, block in enumerate(blocks):
            state = decay.through(blocks[number - 1], state) if number else state
            if block.leaving:
                state += features.key(_columns(b, block.leaving)) @ decay.until(block, far.values(block))
            rows = _shift(block.rows, past)
            if rows.start == rows.stop:
                continue
            s = plan.scale * _block(q, rows) @ _block(k, block.near).mT  # [.., c, ≤ ℓc]
            w, top = plan.local.weights(s, block.diagonal, decay.between(block))
            nz, remote = w @ _with_ones(v, block.near), None  # [.., c, Dv + 1]
            if block.leaving or initial is not None:
                remote = decay.since(block, features.query(_columns(a, rows)).mT @ state)  # state [.., F, Dv + 1]
            if top is None:
                nz = nz if remote is None else nz.add_(remote)
                z_rows = nz[..., -1:] + plan.offset
            else:
                nz, M = _joined(nz, top, remote, plan.offset)
                z_rows, peak[:, :, rows] = nz[..., -1:].clone(), M
            z_rows.masked_fill_(z_rows == 0, torch.inf)  # 0/0 is 0, and so are its gradients
            o[:, :, rows] = nz[..., :-1] / z_rows
            z[:, :, rows] = z_rows
        ctx.save_for_backward(q, k, v, a, b, far_v, mass, log_gate, initial, o, z, peak, state if final else None)
        ctx.plan = plan
        return o, state if final else None

    @staticmethod
    @first_derivative_only("block-causal attention", "reference")
    def backward(ctx, do, d_final):
        q, k, v, a, b, far_v, mass, log_gate, initial, o, z, peak, final = ctx.saved_tensors
        plan, features, past, decay = ctx.plan, ctx.plan.features, k.shape[2] - q.shape[2], Decay(log_gate)
        far = Far(b, v if far_v is None else far_v, mass)
        blocks = Block.all(plan, past, k.shape[2], final is not None)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=accumulator(x)) for x in (k, v))  # a block's share comes in parts
        da, db, d_far_v, d_mass = (x if x is None else torch.zeros_like(x) for x in (a, b, far_v, mass))

        def output_gradient(rows):
            do_rows = _block(do, rows)
            dz = -(do_rows * o[:, :, rows]).sum(-1, keepdim=True)
            return torch.cat((do_rows, dz), dim=-1) / z[:, :, rows]  # n̄ [.., c, Dv + 1]

        def remote_gradient(block, n):
            """n̄ of the state's part alone."""
            n = decay.since(block, n)
            return n if peak is None else _damping(peak[:, :, _shift(block.rows, past)]) * n

        state = _state(plan, v, initial)
        for number, block in enumerate(blocks):  # forwards, with the state: gradients of the local scores and of a
            state = decay.through(blocks[number - 1], state) if number else state
            if block.leaving:
                state += features.key(_columns(b, block.leaving)) @ decay.until(block, far.values(block))
            rows, near = _shift(block.rows, past), block.near
            if rows.start == rows.stop:
                continue
            n, q_rows, k_near = output_gradient(rows), plan.scale * _block(q, rows), _block(k, near)
            w, slope = plan.local.weights_and_slopes(
                q_rows @ k_near.mT, block.diagonal, decay.between(block), None if peak is None else peak[:, :, rows]
            )
            dw = n @ _with_ones(v, near).mT
            decay.depends(block.rows, near, w, dw)
            dv[:, :, near] += w.mT @ n[..., :-1]
            ds = slope.mul_(dw)
            dq[:, :, rows] = plan.scale * (ds @ k_near)
            dk[:, :, near] += ds.mT @ q_rows
            if block.leaving or initial is not None:
                n, a_rows = remote_gradient(block, n), _columns(a, rows)
                da[:, :, rows] = features.query_backward(a_rows, state @ n.mT).mT
                decay.grows(block.rows, lambda a=a_rows, n=n, S=state: (features.query(a).mT @ S * n).sum(-1))

        d_state = _state(plan, v, d_final)
        if final is not None:
            decay.grows(blocks[-1].before, lambda: (final * d_final).sum((-2, -1))[..., None])
        for number, block in reversed(list(enumerate(blocks))):  # backwards, with the state's gradient: the far keys
            rows = _shift(block.rows, past)
            if block.leaving or initial is not None:
                d_state += features.query(_columns(a, rows)) @ remote_gradient(block, output_gradient(rows))
            if block.leaving:
                b_leaving, v_leaving = _columns(b, block.leaving), decay.until(block, far.values(block))
                d_leaving = features.key(b_leaving).mT @ d_state
                db[:, :, block.leaving] = features.key_backward(b_leaving, d_state @ v_leaving.mT).mT
                decay.grows(block.fading, lambda f=block.fading, d=d_leaving, v=v_leaving: -_per_token(f, d * v))
                d_leaving = decay.until(block, d_leaving)
                if far_v is None:
                    dv[:, :, block.leaving] += d_leaving[..., :-1]
                else:
                    d_far_v[:, :, block.leaving] = d_leaving[..., :-1]
                if mass is not None:
                    d_mass[:, :, block.leaving] = d_leaving[..., -1]
            d_state = decay.through(blocks[number - 1], d_state) if number else d_state
        if initial is not None:
            decay.grows(blocks[0].before, lambda: -(initial * d_state).sum((-2, -1))[..., None])
        d_initial = None if initial is None else d_state
        dk, dv = dk.to(k.dtype), dv.to(v.dtype)
        return dq, dk, dv, da, db, d_far_v, d_mass, decay.gradient(), d_initial, None, None


class Decay:
    """The factors e^{G_t − G_s} of a log gate [B, H, K], and in backward its gradient; without a gate, factors of 1.

    B is the last token before a block. No factor is greater than 1. Sums are float64: what counts are small differences
    of sums that may be large.
    """

    def __init__(self, log_gate: Tensor | None):
        self._log_gate = log_gate
        self._dG = None if log_gate is None else torch.zeros_like(log_gate, dtype=torch.float64)

    def between(self, block: Block) -> Tensor | None:
        """G_t − G_s of the tile [.., rows, near], 0 above its diagonal."""
        if self._log_gate is None:
            return None
        G = self._sums(block.near)
        return (G[..., block.diagonal :, None] - G[..., None, :]).clamp_(max=0).to(accumulator(self._log_gate))

    def since(self, block: Block, x: Tensor) -> Tensor:
        """x [.., rows, ·] · e^{G_t − G_B}."""
        if self._log_gate is None:
            return x
        return _faded(x, self._sums(block.whole)[..., block.rows.start - block.whole.start :, None])

    def until(self, block: Block, x: Tensor) -> Tensor:
        """x [.., leaving, ·] · e^{G_B − G_s}."""
        if self._log_gate is None:
            return x
        G = self._sums(slice(block.fading.start, block.whole.start))
        return _faded(x, (G[..., -1:] - G[..., : block.fading.stop - block.fading.start])[..., None])

    def through(self, block: Block, state: Tensor | None) -> Tensor | None:
        """A state at the start of `block`, carried to its end."""
        if self._log_gate is None or state is None:
            return state
        return _faded(state, self._sums(block.whole)[..., -1:, None])

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
        return self._log_gate[..., tokens].double().cumsum(-1)


def _state(plan: Plan, v: Tensor, given: Tensor | None) -> Tensor | None:
    """S [B, H, F, Dv + 1], or its gradient: a copy of the given one, else zeros."""
    if plan.features is None:
        return None
    if given is not None:
        return accumulated(given).clone()
    return v.new_zeros(*v.shape[:2], plan.features.dimension, v.shape[-1] + 1, dtype=accumulator(v))


def _shift(rows: slice, past: int) -> slice:
    return slice(rows.start - past, rows.stop - past)


def _decayed(w: Tensor, decay: Tensor | None) -> Tensor:
    return w if decay is None else w * decay.exp()


def _faded(x: Tensor, log_decay: Tensor) -> Tensor:
    return x * log_decay.exp().to(x.dtype)


def _joined(near: Tensor, top: Tensor, far: Tensor | None, offset: float) -> tuple[Tensor, Tensor]:
    """[N, Z] [.., rows, Dv + 1] and the log M [.., rows, 1] of what it is over: of `near`, which is over e^top, of what
    the state gives, far, None: 0, and of the offset."""
    if far is None:
        far = torch.zeros_like(near)
    far[..., -1:] += offset
    others = far.abs().amax(-1, keepdim=True)
    log_others = torch.where(others > 0, others.log().clamp_(FAINTEST, 0.0), -torch.inf)
    M = torch.maximum(top, log_others)
    return near.mul_((top - M).exp_()).add_(far.mul_(_damping(M))), M


def _damping(M: Tensor) -> Tensor:
    """e^{−M} for what is no local key; where M is below FAINTEST there is none."""
    return M.clamp(min=FAINTEST).neg_().exp_()


def _per_token(fading: slice, x: Tensor) -> Tensor:
    """x [.., rows, ·] summed over all that decays since one token: [.., fading]."""
    return x.sum(-1).unflatten(-1, (fading.stop - fading.start, -1)).sum(-1)


def _block(x: Tensor, rows: slice) -> Tensor:
    return accumulated(x[:, :, rows])


def _with_ones(v: Tensor, rows: slice) -> Tensor:
    return torch.nn.functional.pad(_block(v, rows), (0, 1), value=1.0)


def _columns(x: Tensor, rows: slice) -> Tensor:
    return _block(x, rows).mT.contiguous()


def accumulated(x: Tensor) -> Tensor:
    return x.to(accumulator(x))


def accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _power(x: Tensor, n: int) -> Tensor:
    """x^n by squaring: torch.pow is a transcendental for n > 3."""
    if n == 1:
        return x
    half = _power(x, n // 2)
    return half.square() if n % 2 == 0 else half.square().mul_(x)
