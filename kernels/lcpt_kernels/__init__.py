"""Block-causal attention of linear cost, as pure functions of tensors. Needs torch, its kernels triton; not lcpt."""

from lcpt_kernels.feature import feature_attention
from lcpt_kernels.flurka import flurka_attention
from lcpt_kernels.lowrank import lowrank_attention
from lcpt_kernels.polynomial import polynomial_attention
from lcpt_kernels.sparse import sparse_attention
from lcpt_kernels.squared import squared_attention
from lcpt_kernels.streaming import State

__all__ = [
    "State",
    "feature_attention",
    "flurka_attention",
    "lowrank_attention",
    "polynomial_attention",
    "sparse_attention",
    "squared_attention",
]
