"""Block-causal attention of linear cost, and what stands around it in a model, as pure functions of tensors.

Needs torch, its kernels triton; not lcpt."""

from lcpt_kernels.add_norm import add_layer_norm, add_rms_norm
from lcpt_kernels.cross_entropy import linear_cross_entropy, linear_token_losses
from lcpt_kernels.feature import feature_attention
from lcpt_kernels.flurka import flurka_attention
from lcpt_kernels.gated_activation import gated_activation
from lcpt_kernels.lowrank import lowrank_attention
from lcpt_kernels.polynomial import polynomial_attention
from lcpt_kernels.sparse import sparse_attention
from lcpt_kernels.squared import squared_attention
from lcpt_kernels.state import State

__version__ = "0.1.0"

__all__ = [
    "State",
    "add_layer_norm",
    "add_rms_norm",
    "feature_attention",
    "flurka_attention",
    "gated_activation",
    "linear_cross_entropy",
    "linear_token_losses",
    "lowrank_attention",
    "polynomial_attention",
    "sparse_attention",
    "squared_attention",
]
