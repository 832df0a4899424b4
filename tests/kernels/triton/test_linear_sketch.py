"""The linear sketch of polysketch in the kernels of feature maps, against its definition in float64."""

import pytest
import torch

from lcpt.attention.sketch import LinearProductsSketch, LinearSketch
from tests.kernels.conftest import relative_error, results
from tests.kernels.triton.conftest import DEVICE

KERNELS = ["feature_map_forward_kernel", "feature_map_backward_kernel"]


def definition(x, P, shift, factor=None):
    """[shift, P x] of each head, times its factor."""
    P = P.repeat_interleave(x.shape[2] // len(P), dim=0)
    y = torch.einsum("bthd,hdr->bthr", x, P)
    y = torch.cat((torch.full_like(y[..., :1], shift), y), dim=-1)
    return y if factor is None else factor[:, None] * y


def agree(sketch, tolerance, dtype=torch.float32, t=37, h=4, hkv=2, d=16, factor=True):
    """Output and gradients of x, of P and of the factor. P and the factor are in x's dtype."""
    torch.manual_seed(0)
    given = {"x": torch.randn(2, t, h, d), "P": sketch.P.detach() + 0.1 * torch.randn(sketch.P.shape)}
    if factor:
        given["factor"] = (torch.randn(h) / 2).exp()
    given = {name: x.to(DEVICE, dtype) for name, x in given.items()}
    do = torch.randn(2, t, h, sketch.P.shape[2] + 1).to(DEVICE, dtype)
    sketch = sketch.to(DEVICE)

    def found(x, P, **others):
        return torch.func.functional_call(sketch, {"P": P}, (x,), others)

    found = results(found, given, do, {})
    exact = {name: x.double() for name, x in given.items()}
    expected = results(definition, exact, do.double(), {"shift": sketch.constant[0, 0].item()})
    assert found["o"].dtype == dtype
    errors = {name: relative_error(found[name], x) for name, x in expected.items()}
    assert all(error < tolerance for error in errors.values()), errors  # also false for NaN


@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("shape", [{}, {"h": 6, "hkv": 3, "d": 24, "t": 1}, {"h": 2, "hkv": 2, "t": 70}], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=str)
def test_output_and_gradients(dtype, tolerance, shape, factor, started):
    shape = {"hkv": 2, "d": 16} | shape
    agree(LinearSketch(shape["hkv"], shape["d"], 7, 0.1, 1.0), tolerance, dtype, factor=factor, **shape)
    assert started == KERNELS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_constant_is_rounded_once(dtype):
    """At any norm of x; without a factor it is the shift itself."""
    sketch = LinearSketch(1, 16, 8, 0.1, 0.7).to(DEVICE)
    x = (100 * torch.randn(1, 21, 2, 16)).to(DEVICE, dtype)
    factor = torch.tensor([0.3, 1.7], device=DEVICE)
    assert (sketch(x)[..., 0] == torch.tensor(0.7).to(DEVICE, dtype)).all()
    assert (sketch(x, factor)[..., 0] == (0.7 * factor).to(dtype)).all()


def test_products_are_added(started):
    torch.manual_seed(0)
    sketch, x = LinearProductsSketch(2, 16, 8, 2, 1, 0.1, 1.0).to(DEVICE), torch.randn(1, 21, 4, 16).to(DEVICE)
    with torch.no_grad():
        sketch.gain.fill_(0.5)
    linear, products = definition(x, sketch.linear.P, 1.0), sketch.products(x)
    started.clear()
    found = sketch(x)
    assert started == ["feature_map_forward_kernel", "learned_sketch_forward_kernel"]
    torch.testing.assert_close(found, linear + torch.nn.functional.pad(0.5 * products, (1, 0)))
