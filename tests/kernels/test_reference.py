"""The definition itself, against docs/mathematics.md written out in plain Python: loops over tokens, no tensors."""

import pytest
import torch
from lcpt_kernels import polynomial_attention, squared_attention


def written_out(t, weight, v, offset):
    """o_t of one head: weight(t, s) is a number, v a list of lists."""
    weights = [weight(t, s) for s in range(t + 1)]
    denominator = offset + sum(weights)
    if denominator == 0:
        return [0.0] * len(v[0])
    return [sum(w * v[s][e] for s, w in enumerate(weights)) / denominator for e in range(len(v[0]))]


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("with_qk", [True, False])
@pytest.mark.parametrize("local_blocks", [1, 2])
@pytest.mark.parametrize("coefficients, offset", [((0, 0, 1), None), ((2.0, 0.5, 3.0), 0.25)])
def test_squared(with_qk, local_blocks, coefficients, offset):
    torch.manual_seed(0)
    tokens, h, hkv, block_size, degree, scale = 8, 4, 2, 3, 4, 0.5
    a, q = torch.rand(1, tokens, h, 3).double(), torch.randn(1, tokens, h, 4).double()
    b, k, v = (torch.rand(1, tokens, hkv, n).double() for n in (3, 4, 2))
    local = {"q": q, "k": k, "degree": degree, "scale": scale} if with_qk else {}
    found, _ = squared_attention(
        a,
        b,
        v,
        **local,
        offset=offset,
        coefficients=coefficients,
        block_size=block_size,
        local_blocks=local_blocks,
        backend="reference",
    )
    if offset is None:
        offset = scale**degree if with_qk else 0.0
    for head in range(h):

        def rows(x, head=head):
            return x[0, :, head * x.shape[2] // h].tolist()

        def weight(t, s, rows=rows):
            if with_qk and s // block_size > t // block_size - local_blocks:
                return (scale * dot(rows(q)[t], rows(k)[s])) ** degree
            score = dot(rows(a)[t], rows(b)[s])
            return coefficients[0] + coefficients[1] * score + coefficients[2] * score**2

        for t in range(tokens):
            assert found[0, t, head].tolist() == pytest.approx(written_out(t, weight, rows(v), offset), rel=1e-12)


def test_polynomial():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 6, 1, n).double() for n in (4, 4, 2))
    found = polynomial_attention(q, k, v, degree=6, scale=0.5, backend="reference")

    def weight(t, s):
        return (0.5 * dot(q[0, t, 0].tolist(), k[0, s, 0].tolist())) ** 6

    for t in range(6):
        assert found[0, t, 0].tolist() == pytest.approx(written_out(t, weight, v[0, :, 0].tolist(), 0.5**6), rel=1e-12)
