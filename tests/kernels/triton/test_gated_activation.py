"""gated_activation, backend="triton", against the float64 definition: output and gradient."""

import pytest
import torch
from lcpt_kernels import gated_activation
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.conftest import relative_error
from tests.kernels.triton.conftest import DEVICE

BOTH = pytest.mark.parametrize("activation", ["gelu", "silu"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles a row."""
    from lcpt_kernels.triton.common import launch_configs

    monkeypatch.setattr(launch_configs, "FP32", {})
    for kernel in ("gated_activation_forward", "gated_activation_backward"):
        monkeypatch.setitem(launch_configs.TABLE, kernel, {2**62: (16, 4, 1)})


def results(packed, d_out, activation, backend, function=gated_activation):
    packed = packed.detach().requires_grad_()
    out = function(packed, activation=activation, backend=backend)
    return out.detach(), *torch.autograd.grad(out, packed, d_out)


@pytest.fixture
def agree(started):
    def check(packed, activation, tolerance=1e-5, d_out=None):
        if d_out is None:
            d_out = torch.randn(*packed.shape[:-1], packed.shape[-1] // 2, device=DEVICE).to(packed.dtype)
        found = results(packed, d_out, activation, "triton")
        assert started == ["gated_activation_forward_kernel", "gated_activation_backward_kernel"]
        for x, y in zip(found, results(packed.double(), d_out.double(), activation, "torch"), strict=True):
            assert x.dtype == packed.dtype and x.shape == y.shape and x.is_contiguous()
            assert relative_error(x, y) < tolerance  # also false for NaN

    return check


@BOTH
@pytest.mark.parametrize("shape", [(1, 2), (3, 30), (2, 3, 32), (5, 34), (2, 2, 1, 80), (14,)], ids=str)
def test_every_shape(agree, activation, shape):
    agree(3 * torch.randn(shape, device=DEVICE), activation)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(agree, activation, dtype):
    agree(torch.randn(7, 70, device=DEVICE).to(dtype), activation, 5e-3)


@BOTH
@pytest.mark.parametrize("size", [0.0, 1e-3, 30.0, 1e4])
def test_small_and_large_numbers(agree, activation, size):
    agree(size * torch.randn(7, 70, device=DEVICE), activation)


@BOTH
def test_strides(agree, activation):
    """A slice of a wider tensor whose other columns are NaN, and the gradient of a sum."""
    wide = torch.full((3, 5, 60), torch.nan, device=DEVICE)
    wide[..., 4:44] = torch.randn(3, 5, 40)
    agree(wide[..., 4:44], activation, d_out=torch.ones((), device=DEVICE).expand(3, 5, 20))


def test_columns_first(agree):
    agree(torch.randn(40, 5, device=DEVICE).T, "gelu", d_out=torch.randn(20, 5, device=DEVICE).T)


def test_no_rows():
    out, d_packed = results(torch.zeros(0, 6, device=DEVICE), torch.zeros(0, 3, device=DEVICE), "gelu", "triton")
    assert out.shape == (0, 3) and d_packed.shape == (0, 6)


@BOTH
def test_lengths_share_one_graph(activation):
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gated_activation, fullgraph=True, backend=count)
    for t in (4, 5, 7):
        packed, d_out = torch.randn(t, 40, device=DEVICE), torch.randn(t, 20, device=DEVICE)
        found, expected = (results(packed, d_out, activation, "triton", f) for f in (compiled, gated_activation))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert count.frame_count == 2  # for the first length, and for any


def test_what_the_operators_say_of_themselves():
    import lcpt_kernels.triton.fused.gated_activation  # noqa: F401, which defines them

    packed, d_out = torch.randn(2, 3, 40, device=DEVICE, requires_grad=True), torch.randn(2, 3, 20, device=DEVICE)
    torch.library.opcheck(torch.ops.lcpt_kernels.gated_activation.default, (packed, "silu"))
    torch.library.opcheck(torch.ops.lcpt_kernels.gated_activation_backward.default, (d_out, packed.detach(), "silu"))
