"""pool_blocks against its definition, and what it refuses. (tests/attention/test_summaries.py: as a layer calls it.)"""

import pytest
import torch
from lcpt_kernels.pooling import pool_blocks

B, N, C, H, D, DV, R = 2, 3, 6, 2, 4, 5, 3


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    made = {
        "k": torch.randn(B, N, C, H, D),
        "v": torch.randn(B, N, C, H, DV),
        "logits": torch.randn(B, N, C, H, R),
        "segments": torch.randn(C, 1, R),
        "gamma": torch.rand(B, N, C, H),
    }
    return {name: x.to(dtype) for name, x in made.items()}


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_by_hand(table, gated):
    """Every summary of every block and head is a mean under a softmax of its own."""
    given = inputs()
    if table:
        given["logits"] = given["logits"][1, 2]
    gamma = given["gamma"] if gated else torch.ones_like(given["gamma"])
    if not gated:
        del given["gamma"]
    k, v, mass = pool_blocks(**given)
    assert k.shape == (B, N * R, H, D) and v.shape == (B, N * R, H, DV) and (mass is None) == (not gated)
    for b, n, h, j in torch.cartesian_prod(*map(torch.arange, (B, N, H, R))):
        logits = (given["logits"] if table else given["logits"][b, n])[:, h, j] + given["segments"][:, 0, j]
        weight, at = logits.exp() / logits.exp().sum(), (b, n * R + j, h)
        faded = weight * gamma[b, n, :, h]
        torch.testing.assert_close(k[at], weight @ given["k"][b, n, :, h])
        torch.testing.assert_close(v[at], faded @ given["v"][b, n, :, h])
        if gated:
            torch.testing.assert_close(mass[at], faded.sum())


def test_large_logits_do_not_overflow():
    given = inputs(torch.float32)
    given["logits"] *= 1e4
    assert all(x.isfinite().all() for x in pool_blocks(**given))


def test_16_bits_add_up_in_fp32():
    given = {name: x.float() if name == "gamma" else x.bfloat16() for name, x in inputs().items()}
    k, v, mass = pool_blocks(**given)
    assert k.dtype == v.dtype == torch.bfloat16 and mass.dtype == torch.float32
    exact = pool_blocks(**{name: x.double() for name, x in given.items()})[2]
    torch.testing.assert_close(mass.double(), exact, rtol=1e-5, atol=0)


def test_under_autocast():
    """k and v are taken in 16 bits; logits, segments and gamma as they are."""
    given = inputs(torch.float32)
    lower = given | {name: given[name].bfloat16() for name in ("k", "v")}
    with torch.autocast("cpu", torch.bfloat16):
        found = pool_blocks(given["k"], lower["v"], **{name: given[name] for name in ("logits", "segments", "gamma")})
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert all(map(torch.equal, found, pool_blocks(**lower)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(B, N, C, D)}, "k has 4 dimensions"),
        ({"v": torch.zeros(B, N, C, H + 1, DV).double()}, r"\[2, 3, 6, 2\], \[2, 3, 6, 3\]"),
        ({"v": torch.zeros(B, N, C, H, DV)}, "torch.float64, torch.float32"),
        ({"logits": torch.zeros(B, N, C + 1, H, R)}, r"logits are \[2, 3, 7, 2, 3\]"),
        ({"logits": torch.zeros(N, C, H, R)}, r"they must be \[2, 3, 6, 2, 3\] or \[6, 2, 3\]"),
        ({"logits": torch.zeros(B, N, C, H, 0)}, "0 summaries"),
        ({"segments": torch.zeros(C, H, R)}, r"segments are \[6, 2, 3\], not \[6, 1, 3\]"),
        ({"gamma": torch.zeros(B, N, C, 1)}, r"gamma is \[2, 3, 6, 1\]"),
        ({"k": torch.zeros(B, N, 0, H, D), "v": torch.zeros(B, N, 0, H, D)}, "0 tokens"),
        ({"backend": "reference"}, "'reference' is none of auto, torch, triton"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        pool_blocks(**inputs() | change)
