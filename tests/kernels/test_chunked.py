"""The records of block-causal attention."""

from lcpt_kernels.local_weights import Exponential, Linear, Power, Quadratic


def test_local_weights_are_told_apart():
    weights = [Linear(), Exponential(), Power(2), Power(4), Quadratic(0, 0, 1)]
    assert all(weights) and len(set(weights)) == len(weights)
    assert Power(2) == Power(2) and Linear() != Exponential()
