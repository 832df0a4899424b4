"""Normalise queries and keys over the head dimension, and give them their positions.

All forms map [B, T, H, D] -> (the result, and if asked for the same without positions); the arguments are those of
lcpt_kernels.norm_rotary, and rotary=None leaves positions out.
"""

from __future__ import annotations

import torch.nn.functional as F
from lcpt_kernels.norm_rotary import apply_rotary, norm_rotary, shift_keys
from torch import Tensor, nn


class NormRotary(nn.LayerNorm):
    """A key shift if there is one, LayerNorm, then positions: one kernel on a GPU."""

    def forward(  # type: ignore[override]  # a LayerNorm that takes positions too
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        keep_plain: bool = False,
        key_shift: Tensor | None = None,
        before: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if rotary is None:
            x = x if key_shift is None else shift_keys(x, key_shift, before, starts)
            plain = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)
            return plain, plain if keep_plain else None
        return norm_rotary(
            x,
            self.weight,
            self.bias,
            *rotary,
            key_shift=key_shift,
            before=before,
            starts=starts,
            eps=self.eps,
            keep_plain=keep_plain,
        )


class RMSNormRotary(nn.RMSNorm):
    """The same with RMSNorm, as in Qwen3."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        keep_plain: bool = False,
        key_shift: Tensor | None = None,
        before: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        x = x if key_shift is None else shift_keys(x, key_shift, before, starts)
        plain = super().forward(x).to(x.dtype)
        return plain if rotary is None else apply_rotary(plain, *rotary), plain if keep_plain else None


class Rotary(nn.Module):
    """The same without a norm, as in GPT-2 and Llama."""

    def __init__(self, head_dim: int, eps: float):
        super().__init__()

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        keep_plain: bool = False,
        key_shift: Tensor | None = None,
        before: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        x = x if key_shift is None else shift_keys(x, key_shift, before, starts)
        return x if rotary is None else apply_rotary(x, *rotary), x if keep_plain else None


QK_NORMS: dict[str, type[nn.Module]] = {"layer_norm": NormRotary, "rms_norm": RMSNormRotary, "none": Rotary}
