"""Numbers that PyTorch and Triton code of this package share."""

TINY = 1e-6  # keeps a feature, and so a denominator, above zero
ROW_MAX_FLOOR = -60.0  # the least m_i of a row with more than local keys: e^{60} and 10³⁸ · e^{−60} are finite
