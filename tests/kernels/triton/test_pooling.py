"""pool_blocks, backend="triton", against the float64 definition: what is pooled, and every gradient."""

import pytest
import torch
from lcpt_kernels.pooling import pool_blocks

from tests.kernels.conftest import relative_error
from tests.kernels.triton.conftest import DEVICE

KERNELS = ["pooling_forward_kernel", "pooling_backward_kernel"]
NAMES = ("k_pooled", "v_pooled", "mass")


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of tokens and of summaries a block."""
    from lcpt_kernels.triton import configurations

    monkeypatch.setattr(configurations, "FP32", {})
    for kernel in ("pooling_forward", "pooling_backward"):
        monkeypatch.setitem(configurations.TABLE, kernel, {128: (16, 16, 4, 1)})


def inputs(c, r, *, b=1, n=1, h=1, d=16, dv=16, gated=False, table=False, mean=0.0):
    """float64; keys and values are `mean` away from 0, of which the gradient of the logits sees nothing."""
    torch.manual_seed(0)
    made = {"k": torch.randn(b, n, c, h, d) + mean, "v": torch.randn(b, n, c, h, dv) + mean,
            "logits": 2 * torch.randn(*(() if table else (b, n)), c, h, r)}
    if gated:
        made["gamma"] = torch.rand(b, n, c, h)
    return {name: x.double() for name, x in made.items()}


def segments(given, dtype):
    c, _, r = given["logits"].shape[-3:]
    return torch.linspace(0, 3, c * r, device=DEVICE).view(c, 1, r).to(dtype)


def of_type(given, dtype):
    """gamma, of which there are sums, in fp32."""
    return {name: x.to(DEVICE).to(torch.float32 if name == "gamma" else dtype) for name, x in given.items()}


def outcome(given, wanted, backend):
    """What is pooled, and the gradients of its products with `wanted`, of those that are wanted."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    of_segments = torch.float64 if given["k"].dtype == torch.float64 else torch.float32
    pooled = pool_blocks(**leaves, segments=segments(given, of_segments), backend=backend)
    found = {name: x for name, x in zip(NAMES, pooled, strict=True) if x is not None}
    asked = [name for name in found if name in wanted]
    gradients = torch.autograd.grad(
        [found[name] for name in asked], list(leaves.values()), [wanted[name].to(found[name].dtype) for name in asked])
    return {name: x.detach() for name, x in found.items()} | dict(zip(leaves, gradients, strict=True))


@pytest.fixture
def agree(started):
    """agree(inputs, tolerance): float64 inputs, rounded to `dtype`, in the kernels and by the definition; of the
    gradients of what is pooled, those of `asked` are there, as `change` leaves them."""

    def check(given, tolerance=1e-5, dtype=torch.float32, asked=NAMES, change=lambda x: x):
        given = of_type(given, dtype)
        exact = {name: x.double() for name, x in given.items()}
        pooled = pool_blocks(**exact, segments=segments(given, torch.float64), backend="torch")
        wanted = {name: change(torch.randn(x.shape, dtype=torch.float64, device=DEVICE).to(dtype))
                  for name, x in zip(NAMES, pooled, strict=True) if x is not None and name in asked}
        found = outcome(given, wanted, "triton")
        assert started == KERNELS
        expected = outcome(exact, {name: x.double() for name, x in wanted.items()}, "torch")
        assert found.keys() == expected.keys()
        for name, x in found.items():
            of = given.get(name, given["gamma"] if name == "mass" else given["k"])
            assert x.dtype == of.dtype and x.shape == expected[name].shape, name
        errors = {name: relative_error(found[name], expected[name]) for name in expected}
        assert all(error < tolerance for error in errors.values()), errors  # also false for NaN

    return check


@pytest.mark.parametrize("c, r", [(1, 1), (5, 5), (16, 2), (17, 16), (33, 17), (40, 40)])
@pytest.mark.parametrize("gated", [True, False])
def test_every_size_of_block(agree, small_tiles, c, r, gated):
    agree(inputs(c, r, gated=gated))


@pytest.mark.parametrize("shape", [
    {"b": 2, "n": 3, "h": 2, "gated": True}, {"n": 2, "d": 5, "dv": 40, "gated": True}, {"b": 2, "d": 128, "dv": 7},
    {"b": 2, "n": 2, "h": 2, "table": True, "gated": True},
], ids=str)
def test_shapes(agree, shape):
    agree(inputs(20, 3, **shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [{"gated": True}, {"mean": 2.0}], ids=str)
def test_16_bits(agree, dtype, shape):
    agree(inputs(130, 20, d=64, dv=64, **shape), 5e-3, dtype)
