"""The decay that a gate gives to keys and states, and its gradient. Notation: `chunked.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lcpt_kernels.accumulation import accumulator
from lcpt_kernels.plan import Block


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


def _scaled_by_exp(x: Tensor, log_decay: Tensor) -> Tensor:
    return x * log_decay.exp().to(x.dtype)
