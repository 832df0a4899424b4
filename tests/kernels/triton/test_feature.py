"""feature_attention, backend="triton", against the definition: output and every gradient."""

import pytest
import torch
from lcpt_kernels import feature_attention

from tests.kernels.triton.conftest import DEVICE

C = 40
OFFSET = {"offset": 0.01}


def inputs(t, *, b=1, h=1, hkv=None, m=16, dv=16, gated=False, seed=0):
    torch.manual_seed(seed)
    hkv = hkv or h
    made = {
        "phi_q": torch.rand(b, t, h, m, dtype=torch.float64) / m**0.5,
        "phi_k": torch.rand(b, t, hkv, m, dtype=torch.float64) / m**0.5,
        "v": torch.randn(b, t, hkv, dv, dtype=torch.float64),
    }
    if gated:
        made["log_gate"] = -0.1 * torch.rand(b, t, hkv, dtype=torch.float64)
    return made


@pytest.mark.parametrize("t, local_blocks", [(1, 1), (C + 1, 2), (3 * C + 7, 1), (3 * C + 7, 2)])
def test_every_length(agree, small_tiles, t, local_blocks):
    agree(inputs(t), attention=feature_attention, block_size=C, local_blocks=local_blocks, **OFFSET)


@pytest.mark.parametrize(
    "shape",
    [
        {"m": 72, "dv": 24, "h": 4, "hkv": 2, "gated": True},
        {"m": 5, "b": 2, "gated": True},
        {"m": 256, "dv": 48},
    ],
    ids=str,
)
def test_shapes(agree, shape):
    """Features in one tile of 64, in two of which one is partial, in four."""
    agree(inputs(C + 9, **shape), attention=feature_attention, block_size=C, **OFFSET)


@pytest.mark.parametrize("dtype, gated", [(torch.bfloat16, True), (torch.float16, False)])
def test_16_bits(agree, dtype, gated):
    agree(inputs(2 * C + 7, m=72, gated=gated), 5e-3, feature_attention, dtype=dtype, block_size=C, **OFFSET)


def test_packed_documents(agree, small_tiles):
    lengths = [C, 1, C + 3, 0, 3, 0, 0]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    agree(inputs(sum(lengths), gated=True), attention=feature_attention, block_size=C, cu_seqlens=ends, **OFFSET)


def test_zero_over_zero_is_zero():
    given = {name: (x * (name == "v")).float().to(DEVICE).requires_grad_() for name, x in inputs(C + 3).items()}
    o, _ = feature_attention(**given, block_size=C, backend="triton")
    o.sum().backward()
    for name, x in {"o": o, **{name: x.grad for name, x in given.items()}}.items():
        assert torch.equal(x, torch.zeros_like(x)), name


def test_what_the_kernels_do_not_take_is_named():
    given = {name: x.float().to(DEVICE) for name, x in inputs(3, m=264).items()}
    with pytest.raises(ValueError, match="264 wide, 256"):
        feature_attention(**given, backend="triton")
