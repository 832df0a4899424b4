"""add_layer_norm and add_rms_norm in PyTorch: their definitions, what they are in a block, and what they refuse."""

import pytest
import torch
from lcpt_kernels import add_layer_norm, add_rms_norm
from lcpt_kernels.gated_activation import gated_activation
from torch import nn

from lcpt.benchmarking.traffic import Traffic

D = 6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_are_the_modules_of_pytorch_after_an_addition(dtype, bias):
    x, delta = torch.randn(2, 3, 5, D).to(dtype)
    layer, rms = nn.LayerNorm(D, bias=bias).to(dtype), nn.RMSNorm(D, eps=1e-6).to(dtype)
    for parameter in (*layer.parameters(), *rms.parameters()):
        nn.init.normal_(parameter)
    for found, norm in (
        (add_layer_norm(x, delta, layer.weight, layer.bias), layer),
        (add_rms_norm(x, delta, rms.weight), rms),
    ):
        assert torch.equal(found[1], x + delta) and torch.equal(found[0], norm(x + delta))
    normed, total = add_layer_norm(x, None, layer.weight, layer.bias)
    assert torch.equal(normed, layer(x)) and total is x


@pytest.mark.parametrize(
    "change, named",
    [
        ({"delta": torch.zeros(4, D)}, r"delta is \[4, 6\]; it must be \[3, 6\]"),
        ({"delta": torch.zeros(3, D).double()}, "torch.float32, torch.float64"),
        ({"weight": torch.ones(D + 1)}, r"weight is \[7\], not \[6\]"),
        ({"bias": torch.ones(1)}, r"bias is \[1\], not \[6\]"),
        ({"x": torch.zeros(())}, r"x is \[\]; \[..., D\] needs D ≥ 1"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"backend": "reference"}, "backend 'reference' is none of auto, torch, triton"),
        ({"backend": "triton"}, "backend triton: tensors are on cpu"),
    ],
)
def test_errors_name_what_does_not_fit(change, named):
    given = {"x": torch.zeros(3, D), "delta": torch.zeros(3, D), "weight": torch.ones(D)} | change
    with pytest.raises(ValueError, match=named):
        add_layer_norm(**given)
    if "bias" not in change:
        with pytest.raises(ValueError, match=named):
            add_rms_norm(**given)


def test_what_a_block_moves_around_its_products():
    """At the size of GPT-2 small with 8,192 tokens: both additions, both norms, the gated activation."""
    pytest.importorskip("triton")
    moved = {backend: bytes_around_products(backend) for backend in ("torch", "triton")}
    stream, packed = 2 * 8192 * 768, 2 * 8192 * 2 * 2048
    assert moved["triton"] <= 0.54 * moved["torch"]
    assert moved["triton"] == pytest.approx(2 * 8 * stream + 4 * packed, rel=2e-3)  # each tensor once a pass


def bytes_around_products(backend):
    with torch.device("meta"):
        x, delta, attended, fed = torch.empty(4, 1, 8192, 768, dtype=torch.bfloat16).requires_grad_()
        packed = torch.empty(1, 8192, 2 * 2048, dtype=torch.bfloat16, requires_grad=True)
        weights = torch.empty(2, 768, dtype=torch.bfloat16, requires_grad=True)
    with Traffic() as moved:
        first, x = add_layer_norm(x, delta, weights[0], backend=backend)
        second, x = add_layer_norm(x, attended, weights[1], backend=backend)
        gated = gated_activation(packed, backend=backend)
        torch.autograd.grad([first, second, x, gated], [delta, attended, packed, weights], [first, second, x, gated])
    return moved.bytes
