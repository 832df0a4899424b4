import pytest
import torch
from lcpt_kernels.symmetric_features import QuadraticFeatures

COEFFICIENTS = [(0, 0, 1), (1, 1, 0.5), (1, 1, 0), (2.5, 0, 3), (0, 0.5, 0)]
SIZES = [1, 5, 8, 12, 32]


def columns(*shape):
    torch.manual_seed(sum(shape))
    return torch.randn(2, *shape, dtype=torch.float64)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("size", SIZES)
def test_query_times_key_is_the_polynomial(size, coefficients):
    features = QuadraticFeatures(size, coefficients)
    a, b = columns(size, 7), columns(size, 6)
    query, key = features.query(a), features.key(b)
    assert query.shape == (2, features.dimension, 7) and key.shape == (2, features.dimension, 6)
    s = a.mT @ b
    c0, c1, c2 = coefficients
    torch.testing.assert_close(query.mT @ key, c0 + c1 * s + c2 * s**2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("size", SIZES)
def test_backward_is_the_transposed_derivative(size, coefficients, side):
    """Features are quadratic, so central differences with a step of 1 are exact."""
    features = QuadraticFeatures(size, coefficients)
    x = columns(size, 3)
    expand, contract = getattr(features, side), getattr(features, f"{side}_backward")
    dphi = torch.randn(2, features.dimension, 3, dtype=torch.float64)
    for i in range(size):
        step = torch.zeros_like(x)
        step[:, i] = 1
        expected = ((expand(x + step) - expand(x - step)) / 2 * dphi).sum(1)
        torch.testing.assert_close(contract(x, dphi)[:, i], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size, dimension", [(32, 640), (16, 192), (8, 64), (64, 2304)])
def test_dimension(size, dimension):
    assert QuadraticFeatures(size, (0, 0, 1)).dimension == dimension
    assert QuadraticFeatures(size, (1, 1, 1)).dimension == dimension + size + 1
    assert QuadraticFeatures(size, (1, 1, 0)).dimension == size + 1
