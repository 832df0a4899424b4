"""Block-causal attention of linear cost, as pure functions of tensors. Needs torch alone; knows nothing of lcpt."""

from lcpt_kernels.polynomial import polynomial_attention
from lcpt_kernels.squared import squared_attention

__all__ = ["polynomial_attention", "squared_attention"]
