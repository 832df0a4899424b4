"""Attention under autocast is attention of arguments in 16 bits, but for gates; no sum is in 16 bits."""

import pytest
import torch
from lcpt_kernels import (
    feature_attention,
    flurka_attention,
    lowrank_attention,
    polynomial_attention,
    sparse_attention,
    squared_attention,
)

T, H, D, C, R = 21, 2, 8, 4, 2


def tokens(*size, rows=T):
    return torch.rand(1, rows, H, *size)


CALLS = {
    squared_attention: lambda: dict(a=tokens(D), b=tokens(D), v=tokens(D), log_gate=-tokens(), block_size=C),
    feature_attention: lambda: dict(phi_q=tokens(D), phi_k=tokens(D), v=tokens(D), log_gate=-tokens(), block_size=C),
    flurka_attention: lambda: dict(
        q=tokens(D),
        k=tokens(D),
        v=tokens(D),
        phi_q=tokens(D),
        phi_summary=tokens(D, rows=T // C * R),
        v_summary=tokens(D, rows=T // C * R),
        mass_summary=tokens(rows=T // C * R),
        gain=torch.rand(H),
        block_size=C,
    ),
    lowrank_attention: lambda: dict(
        q=tokens(D),
        k=tokens(D),
        v=tokens(D),
        q_far=tokens(D),
        k_summary=tokens(D, rows=T // C * R),
        v_summary=tokens(D, rows=T // C * R),
        summaries=R,
        block_size=C,
    ),
    polynomial_attention: lambda: dict(q=tokens(D), k=tokens(D), v=tokens(D)),
    sparse_attention: lambda: dict(q=tokens(D), k=tokens(D), v=tokens(D), k_keep=tokens() > 0.3),
}
AS_THEY_ARE = ("log_gate", "gain", "mass_summary")


@pytest.mark.parametrize("attention", CALLS, ids=lambda f: f.__name__)
def test_under_autocast(attention):
    torch.manual_seed(0)
    given = CALLS[attention]()
    lower = {
        name: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() and name not in AS_THEY_ARE else x
        for name, x in given.items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(**given)
    expected = attention(**lower)
    found, expected = (x[0] if isinstance(x, tuple) else x for x in (found, expected))
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_float64_stays():
    given = {name: x.double() for name, x in CALLS[polynomial_attention]().items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = polynomial_attention(**given)
    assert torch.equal(found, polynomial_attention(**given))
