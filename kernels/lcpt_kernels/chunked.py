"""Block-causal attention in PyTorch: a loop over blocks with a running state, and its derivative by hand.

Autograd would keep features and scores of every block; here the backward pass recomputes them, so memory is that of
the inputs, the output and one state. All arithmetic is fp32 (float64 for float64 inputs), one block at a time.
A column of ones behind v, v̄ = [v, 1], makes the denominator a part of every product. With G the running sum of the log
gate and B the last token before the block of t:

    [N_t, l_t] = [0, offset] + Σ_{s local} e^{G_t − G_s} w(scale·q_t·k_s) v̄_s + e^{G_t − G_B} φ(a_t)ᵀ S
    S = Σ_{s earlier} e^{G_B − G_s} φ(b_s) v̄_sᵀ          o = N / l
    n̄ = [do, -(do·o)] / l      dW_ts = n̄_t·v̄_s, the gradient of every weight, local or through S

No exponent is positive. A weight W_ts depends on G_t − G_s, so dG_t = Σ_s dW_ts W_ts − Σ_t' dW_t't W_t't. With w = exp
a row is over e^{m_i} as in FlashAttention-2 (arXiv 2307.08691). In code: acc = [N, l] of some rows, m_i their maximum,
l_i their denominator; `denominator` and `row_max` keep l and m of all rows for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lcpt_kernels.derivatives import first_derivative_only, refuse_transforms
from lcpt_kernels.local_weights import Exponential, Linear, Power, Quadratic
from lcpt_kernels.symmetric_features import Explicit, QuadraticFeatures

ROW_MAX_FLOOR = -60.0  # the least m_i of a row with more than local keys: e^{60} and 10³⁸ · e^{−60} are finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The settings of block-causal attention.

    The methods of `local` take a tile of scores s [.., rows, keys], the number `diagonal` of keys that the first row
    sees before itself, and the log of the decay:
        weights returns the weights, 0 for future keys, and m_i [.., rows, 1] where they are over e^{m_i}, else None;
        weights_and_slopes returns the weights again, over e^{m_i}, and their derivatives by s.
    """

    local: Power | Quadratic | Linear | Exponential
    features: QuadraticFeatures | Explicit | None  # None: there is no state
    scale: float
    offset: float
    block_size: int
    local_blocks: int
    summaries: int | None = None  # summaries of a block in the state; None: its tokens are in the state


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The tokens of one block, as slices of the keys. The first keys may be older than the first query."""

    whole: slice
    rows: slice  # the block's queries; empty where a state is carried to the start of an empty block
    local: slice  # the local keys of these queries
    leaving: (
        slice | None
    )  # rows of StateInput that enter the state at the start of this block, of the block that leaves
    fading: (
        slice | None
    )  # tokens whose gate sums these rows decay from: the same tokens, for summaries their block's last

    @property
    def diagonal(self) -> int:
        """Return how many local keys the first row sees before itself."""
        return self.rows.start - self.local.start

    @property
    def before(self) -> slice:
        """Return the last token before the block, if there is one."""
        return slice(max(0, self.whole.start - 1), self.whole.start)

    @classmethod
    def all(cls, plan: Plan, past: int, keys: int, to_the_end: bool) -> list[Block]:
        """Return the blocks of the queries past … keys; with to_the_end, up to the next token's block."""
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
        return cls(
            whole=slice(t, end),
            rows=slice(max(t, past), end),
            local=slice(max(0, t + c - reach), end),
            leaving=leaving,
            fading=fading,
        )


@dataclass(frozen=True, slots=True)
class StateInput:
    """The rows that enter the state, those of tokens or of summaries."""

    b: Tensor | None  # [B, H, ·, r]; None: there is no state
    v: Tensor  # [B, H, ·, Dv]
    mass: Tensor | None  # [B, H, ·], the weight of a summary in the denominator; None: 1

    def values(self, rows: slice) -> Tensor:
        """Return v̄ = [v, mass] of these rows, [.., rows, Dv + 1]."""
        if self.mass is None:
            return _with_ones(self.v, rows)
        return torch.cat((_block(self.v, rows), _block(self.mass, rows)[..., None]), dim=-1)

    def added(self, block: Block, plan: Plan, decay: Decay, out: Tensor | None = None) -> Tensor:
        """Return what the block that leaves adds to the state at the start of `block`, [.., F, Dv + 1], in `out`."""
        assert plan.features is not None and self.b is not None and block.leaving is not None
        features, values = plan.features.key(_columns(self.b, block.leaving)), self.values(block.leaving)
        return torch.matmul(features, decay.scale_by_rev_cumsum(block, values), out=out)


@dataclass(frozen=True, slots=True)
class StateInputGradient:
    """The gradients of a StateInput."""

    b: Tensor
    v: Tensor
    mass: Tensor | None

    def add(self, block: Block, d_added: Tensor, given: StateInput, plan: Plan, decay: Decay) -> None:
        """Add those of the block that leaves at the start of `block`, from that of what it adds to the state."""
        features, leaving, fading = plan.features, block.leaving, block.fading
        assert features is not None and given.b is not None and leaving is not None and fading is not None
        b, v = _columns(given.b, leaving), decay.scale_by_rev_cumsum(block, given.values(leaving))
        d_values = features.key(b).mT @ d_added
        self.b[:, :, leaving] = features.key_backward(b, d_added @ v.mT).mT
        decay.add_gradient(fading, lambda: -_per_token(fading, d_values * v))
        d_values = decay.scale_by_rev_cumsum(block, d_values)
        self.v[:, :, leaving] += d_values[..., :-1]
        if self.mass is not None:
            self.mass[:, :, leaving] = d_values[..., -1]


def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    state_input: StateInput,
    plan: Plan,
    log_gate: Tensor | None = None,
    initial: Tensor | None = None,
    final: bool = False,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return o [B, T, H, Dv] in q's dtype, and with `final` the state [B, H, F, Dv + 1] after the last token.

    Args:
        q: [B, T, H, D], of the last T of the keys' P + T tokens.
        k: [B, P + T, H, D], v: [B, P + T, H, Dv]; the first P tokens start a block.
        a: [B, T, H, r]; None: there is no state.
        state_input: b, v and mass with heads third, [B, ·, H, ·], of the P + T tokens or of their whole blocks'
            summaries.
        log_gate: [B, P + T, H], ≤ 0.
        initial: [B, H, F, Dv + 1], the state before the keys.
        added: what blocks add to the state, from `state_pass`, which then has their gradient; None: computed here.
    """
    refuse_transforms("block-causal attention", "reference")
    state_v = None if state_input.v is v else state_input.v
    tensors = heads_first(q, k, v, a, state_input.b, state_v, state_input.mass, log_gate)
    o, state = _BlockCausal.apply(*tensors, initial, added, plan, final)
    return o.transpose(1, 2), state


def heads_first(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return views [B, H, T, ...] of tensors [B, T, H, ...]."""
    return [x if x is None else x.transpose(1, 2) for x in tensors]


class _BlockCausal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, a, b, state_v, mass, log_gate, initial, added, plan, final):
        past, decay, features = k.shape[2] - q.shape[2], Decay(log_gate), plan.features
        state_input = StateInput(b, v if state_v is None else state_v, mass)
        o = q.new_empty(*q.shape[:3], v.shape[3])
        denominator = q.new_empty(*q.shape[:3], 1, dtype=accumulator(v))
        row_max = torch.empty_like(denominator) if isinstance(plan.local, Exponential) else None
        state = _state(plan, v, initial)
        blocks, additions = Block.all(plan, past, k.shape[2], final), iter(() if added is None else added)
        for number, block in enumerate(blocks):
            state = decay.decay_state(blocks[number - 1], state) if number else state
            if block.leaving:
                state += state_input.added(block, plan, decay) if added is None else next(additions)
            rows = _shift_slice(block.rows, past)
            if rows.start == rows.stop:
                continue
            s = plan.scale * _block(q, rows) @ _block(k, block.local).mT  # [.., c, ≤ ℓc]
            w, m_i = plan.local.weights(s, block.diagonal, decay.tile_log_decay(block))
            acc, state_terms = w @ _with_ones(v, block.local), None  # [.., c, Dv + 1]
            if block.leaving or initial is not None:
                state_terms = decay.scale_by_cumsum(
                    block, features.query(_columns(a, rows)).mT @ state
                )  # state [.., F, Dv + 1]
            if m_i is None:
                acc = acc if state_terms is None else acc.add_(state_terms)
                l_i = acc[..., -1:] + plan.offset
            else:
                acc, m_new = _add_state(acc, m_i, state_terms, plan.offset)
                l_i, row_max[:, :, rows] = acc[..., -1:].clone(), m_new
            l_i.masked_fill_(l_i == 0, torch.inf)  # 0/0 is 0, and so are its gradients
            o[:, :, rows] = acc[..., :-1] / l_i
            denominator[:, :, rows] = l_i
        ctx.save_for_backward(
            q, k, v, a, b, state_v, mass, log_gate, initial, o, denominator, row_max, state if final else None
        )
        ctx.plan = plan
        ctx.added_shape = None if added is None else added.shape  # not kept: they would be a layer's largest tensor
        return o, state if final else None

    @staticmethod
    @first_derivative_only("block-causal attention", "reference")
    def backward(ctx, do, d_final):
        q, k, v, a, b, state_v, mass, log_gate, initial, o, denominator, row_max, final = ctx.saved_tensors
        plan, features, past, decay = ctx.plan, ctx.plan.features, k.shape[2] - q.shape[2], Decay(log_gate)
        state_input = StateInput(b, v if state_v is None else state_v, mass)
        blocks = Block.all(plan, past, k.shape[2], final is not None)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=accumulator(x)) for x in (k, v))  # a block's share comes in parts
        da = a if a is None else torch.zeros_like(a)
        db = d_state_v = d_mass = d_added = None
        if ctx.added_shape is not None:
            d_added = v.new_zeros(ctx.added_shape, dtype=accumulator(v))
        else:
            db, d_state_v, d_mass = (x if x is None else torch.zeros_like(x) for x in (b, state_v, mass))

        def output_gradient(rows):
            do_rows = _block(do, rows)
            dz = -(do_rows * o[:, :, rows]).sum(-1, keepdim=True)
            return torch.cat((do_rows, dz), dim=-1) / denominator[:, :, rows]  # n̄ [.., c, Dv + 1]

        def state_output_gradient(block, n):
            """Return n̄ of the state's part alone."""
            n = decay.scale_by_cumsum(block, n)
            return n if row_max is None else _state_alpha(row_max[:, :, _shift_slice(block.rows, past)]) * n

        state = _state(plan, v, initial)
        for number, block in enumerate(blocks):  # forwards, with the state: gradients of the local scores and of a
            state = decay.decay_state(blocks[number - 1], state) if number else state
            if block.leaving:
                state += state_input.added(block, plan, decay)
            rows, local = _shift_slice(block.rows, past), block.local
            if rows.start == rows.stop:
                continue
            n, q_rows, k_local = output_gradient(rows), plan.scale * _block(q, rows), _block(k, local)
            w, slope = plan.local.weights_and_slopes(
                q_rows @ k_local.mT,
                block.diagonal,
                decay.tile_log_decay(block),
                None if row_max is None else row_max[:, :, rows],
            )
            dw = n @ _with_ones(v, local).mT
            decay.add_weight_gradient(block.rows, local, w, dw)
            dv[:, :, local] += w.mT @ n[..., :-1]
            ds = slope.mul_(dw)
            dq[:, :, rows] = plan.scale * (ds @ k_local)
            dk[:, :, local] += ds.mT @ q_rows
            if block.leaving or initial is not None:
                n, a_rows = state_output_gradient(block, n), _columns(a, rows)
                da[:, :, rows] = features.query_backward(a_rows, state @ n.mT).mT
                decay.add_gradient(block.rows, lambda a=a_rows, n=n, S=state: (features.query(a).mT @ S * n).sum(-1))

        d_state = _state(plan, v, d_final)
        if final is not None:
            decay.add_gradient(blocks[-1].before, lambda: (final * d_final).sum((-2, -1))[..., None])
        # Backwards, with the state's gradient: the gradients of the state's input.
        d_input = StateInputGradient(db, dv if state_v is None else d_state_v, d_mass)
        leaving = sum(block.leaving is not None for block in blocks)
        for number, block in reversed(list(enumerate(blocks))):
            rows = _shift_slice(block.rows, past)
            if block.leaving or initial is not None:
                d_state += features.query(_columns(a, rows)) @ state_output_gradient(block, output_gradient(rows))
            if block.leaving:
                leaving -= 1
                if d_added is not None:
                    d_added[leaving] = d_state
                else:
                    d_input.add(block, d_state, state_input, plan, decay)
            d_state = decay.decay_state(blocks[number - 1], d_state) if number else d_state
        if initial is not None:
            decay.add_gradient(blocks[0].before, lambda: -(initial * d_state).sum((-2, -1))[..., None])
        d_initial = None if initial is None else d_state
        dk, dv = dk.to(k.dtype), dv.to(v.dtype)
        return dq, dk, dv, da, db, d_state_v, d_mass, decay.gradient(), d_initial, d_added, None, None


class Decay:
    """The factors e^{G_t − G_s} of a log gate [B, H, K] and, in the backward pass, its gradient. Without a gate,
    factors are 1.

    B is the last token before a block. No factor is greater than 1. Sums are float64, since small differences of large
    sums matter.
    """

    def __init__(self, log_gate: Tensor | None):
        self._log_gate = log_gate
        self._dG = None if log_gate is None else torch.zeros_like(log_gate, dtype=torch.float64)

    def tile_log_decay(self, block: Block) -> Tensor | None:
        """Return G_t − G_s of the tile [.., rows, local], 0 above its diagonal."""
        if self._log_gate is None:
            return None
        G = self._sums(block.local)
        return (G[..., block.diagonal :, None] - G[..., None, :]).clamp_(max=0).to(accumulator(self._log_gate))

    def scale_by_cumsum(self, block: Block, x: Tensor) -> Tensor:
        """Return x [.., rows, ·] times e to the gate_cumsum, G_t − G_B."""
        if self._log_gate is None:
            return x
        return _scaled_by_exp(x, self._sums(block.whole)[..., block.rows.start - block.whole.start :, None])

    def scale_by_rev_cumsum(self, block: Block, x: Tensor) -> Tensor:
        """Return x [.., leaving, ·] times e to the gate_rev_cumsum, G_B − G_s."""
        if self._log_gate is None:
            return x
        assert block.fading is not None
        G = self._sums(slice(block.fading.start, block.whole.start))
        return _scaled_by_exp(x, (G[..., -1:] - G[..., : block.fading.stop - block.fading.start])[..., None])

    def decay_state(self, block: Block, state: Tensor | None) -> Tensor | None:
        """Return a state at the start of `block`, decayed to its end."""
        if self._log_gate is None or state is None:
            return state
        return _scaled_by_exp(state, self._sums(block.whole)[..., -1:, None])

    def add_weight_gradient(self, rows: slice, keys: slice, w: Tensor, dw: Tensor) -> None:
        """Add the part of weights w [.., rows, keys] with gradients dw: dG_t += Σ_s dw w, dG_s -= Σ_t dw w."""
        if self._dG is not None:
            product = w * dw
            self._dG[..., rows] += product.sum(-1)
            self._dG[..., keys] -= product.sum(-2)

    def add_gradient(self, tokens: slice, gradient: Callable[[], Tensor]) -> None:
        """Add gradient() to dG of these tokens; without a gate it is not computed."""
        if self._dG is not None and tokens.start < tokens.stop:
            self._dG[..., tokens] += gradient()

    def gradient(self) -> Tensor | None:
        """Return the gradient of the log gate: dG summed over all later tokens, whose G contains it."""
        if self._log_gate is None or self._dG is None:
            return None
        return self._dG.flip(-1).cumsum(-1).flip(-1).to(self._log_gate.dtype)

    def _sums(self, tokens: slice) -> Tensor:
        assert self._log_gate is not None
        return self._log_gate[..., tokens].double().cumsum(-1)


def _state(plan: Plan, v: Tensor, given: Tensor | None) -> Tensor | None:
    """Return S [B, H, F, Dv + 1] or its gradient: a copy of the given one, else zeros."""
    if plan.features is None:
        return None
    if given is not None:
        return accumulated(given).clone()
    return v.new_zeros(*v.shape[:2], plan.features.dimension, v.shape[-1] + 1, dtype=accumulator(v))


def _shift_slice(rows: slice, past: int) -> slice:
    return slice(rows.start - past, rows.stop - past)


def _scaled_by_exp(x: Tensor, log_decay: Tensor) -> Tensor:
    return x * log_decay.exp().to(x.dtype)


def _add_state(acc: Tensor, m_i: Tensor, state_terms: Tensor | None, offset: float) -> tuple[Tensor, Tensor]:
    """Add state and offset to acc [.., rows, Dv + 1], the local sums over e^{m_i}. Return acc over e^{m_new}, and m_new
    [.., rows, 1]."""
    if state_terms is None:
        state_terms = torch.zeros_like(acc)
    state_terms[..., -1:] += offset
    state_max = state_terms.abs().amax(-1, keepdim=True)
    m_state = torch.where(state_max > 0, state_max.log().clamp_(ROW_MAX_FLOOR, 0.0), -torch.inf)
    m_new = torch.maximum(m_i, m_state)
    alpha = (m_i - m_new).exp_()
    return acc.mul_(alpha).add_(state_terms.mul_(_state_alpha(m_new))), m_new


def _state_alpha(m: Tensor) -> Tensor:
    """Return e^{−m}, the factor of state and offset. Where m is below ROW_MAX_FLOOR, both are 0."""
    return m.clamp(min=ROW_MAX_FLOOR).neg_().exp_()


def _per_token(fading: slice, x: Tensor) -> Tensor:
    """Sum x [.., rows, ·] over the rows that decay from the same token: [.., fading]."""
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
