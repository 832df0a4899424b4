"""Feature maps in PyTorch: their formulas by hand, and what they refuse."""

import math

import pytest
import torch
from lcpt_kernels.feature_maps import aoglu, elu1, favor, hedgehog, oglu, relu, softplus

B, T, H, HW, D, M = 2, 5, 6, 2, 4, 3
SHAPES = {"x": (B, T, H, D), "W": (HW, D, M), "G": (HW, D, M), "b": (HW, M), "A": (HW, D, 2), "B": (HW, 2, M)}
ARGUMENTS = {elu1: "x", relu: "xWb", favor: "xW", hedgehog: "xW", softplus: "xW", oglu: "xWG", aoglu: "xWAB"}


def given(function, dtype=torch.float64):
    torch.manual_seed(0)
    return {name: torch.randn(SHAPES[name], dtype=dtype) for name in ARGUMENTS[function]}


def exponents(x, W):
    x = x / D**0.25
    return [sum(x[i] * W[i, j] for i in range(D)) - sum(x[i] ** 2 for i in range(D)) / 2 for j in range(M)]


def sigmoid(z):
    return 1 / (1 + (-z).exp())


BY_HAND = {  # of one row, with the matrices of its head
    elu1: lambda x: torch.where(x > 0, x + 1, x.exp()),
    relu: lambda x, W, b: (x @ W + b).clamp(min=0) + 1e-6,
    favor: lambda x, W: torch.stack([(e.exp() + 1e-6) / math.sqrt(M) for e in exponents(x, W)]),
    hedgehog: lambda x, W: torch.cat([(s * x @ W).exp() / (s * x @ W).exp().sum() for s in (1, -1)]),
    softplus: lambda x, W: (1 + (x @ W).exp()).log(),
    oglu: lambda x, W, G: (1 + (x @ W).exp()).log() * sigmoid(x @ G),
    aoglu: lambda x, W, A, B: (1 + (x @ W).exp()).log() * sigmoid(x @ A @ B),
}


@pytest.mark.parametrize("function", ARGUMENTS, ids=lambda f: f.__name__)
def test_by_hand(function):
    x, *matrices = given(function).values()
    found = function(x, *matrices, backend="torch")
    for b, t, h in ((0, 0, 0), (1, 4, 2), (0, 3, 3), (1, 2, 5)):
        own = [w[h // (H // HW)] for w in matrices]
        torch.testing.assert_close(found[b, t, h], BY_HAND[function](x[b, t, h], *own))


def test_favors_peak_is_subtracted_and_constant():
    x, W = (1.0 * one for one in given(favor).values())
    x.requires_grad_()
    found = favor(x, W, subtract_peak=True)
    peak = torch.stack(exponents(x[0, 0, 0], W[0])).max()
    expected = torch.stack([((e - peak.detach()).exp() + 1e-6) / math.sqrt(M) for e in exponents(x[0, 0, 0], W[0])])
    torch.testing.assert_close(found[0, 0, 0], expected)
    (dx,) = torch.autograd.grad(found[0, 0, 0].sum(), x)
    (expected,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(dx, expected)


def test_favors_exponents_are_fp32():
    x, W = given(favor, torch.bfloat16)["x"], given(favor, torch.float32)["W"]
    assert torch.equal(favor(x, W), favor(x.float(), W).bfloat16())


@pytest.mark.parametrize("function", ARGUMENTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_and_gradients_have_the_dtype_of_what_they_are_of(function, dtype):
    arguments = {name: x.requires_grad_() for name, x in given(function, torch.float32).items()}
    arguments["x"] = arguments["x"].detach().to(dtype).requires_grad_()
    phi = function(**arguments)
    assert phi.dtype == dtype and (phi > 0).all()
    phi.sum().backward()
    for name, x in arguments.items():
        assert x.grad is None if function is favor and name == "W" else x.grad.dtype == x.dtype


@pytest.mark.parametrize("function", ARGUMENTS, ids=lambda f: f.__name__)
def test_under_autocast(function):
    arguments = given(function, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = function(**arguments)
    expected = function(**{name: x.bfloat16() for name, x in arguments.items()})
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


@pytest.mark.parametrize(
    "function, changes, part",
    [
        (elu1, {"backend": "reference"}, "'reference' is none of auto, torch, triton"),
        (elu1, {"backend": "triton", "x": torch.randn(1, 2, 3, 4, dtype=torch.float64)}, "backend triton: "),
        (elu1, {"x": torch.randn(2, 3, 4)}, "3 dimensions"),
        (relu, {"W": torch.randn(HW, D + 1, M)}, r"W is \[2, 5, 3\]; x is 4 wide"),
        (hedgehog, {"W": torch.randn(D, M)}, r"W is \[4, 3\]"),
        (softplus, {"W": torch.randn(4, D, M)}, "6 heads are no multiple of 4"),
        (relu, {"b": torch.randn(HW, 1, M)}, r"b is \[2, 1, 3\]; it must be \[2, 3\]"),
        (oglu, {"G": torch.randn(HW, D, M + 1)}, r"G is \[2, 4, 4\]"),
        (aoglu, {"B": torch.randn(HW, 2, M + 1)}, r"B must be \[2, 2, 3\]"),
        (aoglu, {"A": torch.randn(3, D, 2)}, r"A is \[3, 4, 2\]"),
    ],
)
def test_what_does_not_fit_is_named(function, changes, part):
    with pytest.raises(ValueError, match=part):
        function(**given(function) | changes)
