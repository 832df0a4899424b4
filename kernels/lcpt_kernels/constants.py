"""Numbers that PyTorch and Triton code of this package share."""

TINY = 1e-6  # keeps a feature, and so a denominator, above zero
