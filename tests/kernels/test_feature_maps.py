"""Feature maps in PyTorch: every map of the registry, formulas by hand, and errors."""

import math

import pytest
import torch
from lcpt_kernels.feature_maps import (
    FEATURE_MAPS,
    affine,
    aoglu,
    elu1,
    favor,
    feature_map,
    hedgehog,
    matrix_shapes,
    oglu,
    relu,
    softplus,
)

from tests.kernels.conftest import relative_error

B, T, H, HW, D, M = 2, 5, 6, 2, 4, 3
VARIANTS = [(name, ()) for name in FEATURE_MAPS]
VARIANTS += [(name, (option,)) for name, entry in FEATURE_MAPS.items() for option in entry.options]


def arguments_of(name, dtype=torch.float64):
    """x and the matrices of a map, by their letters."""
    torch.manual_seed(0)
    shapes = {"x": (B, T, H, D)} | matrix_shapes(FEATURE_MAPS[name].matrices, HW, D, M, r=2)
    return {letter: torch.randn(shape, dtype=dtype) for letter, shape in shapes.items()}


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join((variant[0], *variant[1])))
def variant(request):
    """The name of a map, and the map as a function of x and its matrices."""
    name, options = request.param
    return name, lambda *tensors, **others: feature_map(name, *tensors, **dict.fromkeys(options, True), **others)


def test_entries_are_consistent():
    for name, entry in FEATURE_MAPS.items():
        letters = set(entry.matrices)
        assert letters <= set("WGbAB") and len(letters) == len(entry.matrices), name
        assert not letters or "W" in letters, f"{name}: without W there is nothing for b, G, A and B to join"
        assert ("A" in letters) == ("B" in letters) and not {"A", "G"} <= letters, f"{name}: the gate is G, or A B"
        assert not entry.fixed or letters == {"W"}, f"{name}: only a W alone can be fixed"
        assert set(entry.options) <= {"subtract_peak"}, f"{name}: the kernels know subtract_peak alone"
        assert entry.halves in (1, 2), name


def test_rows_are_mapped_alone(variant):
    """Each token and head has the features that it has alone, with the matrices of its key-value head: a sequence in
    pieces has the features of the whole."""
    name, phi = variant
    x, *matrices = arguments_of(name).values()
    found = phi(x, *matrices)
    assert found.shape == (B, T, H, FEATURE_MAPS[name].width(D, M))
    assert (found > 0).all() == FEATURE_MAPS[name].positive
    for t in range(T):
        for h in range(H):
            alone = phi(x[:, t : t + 1, h : h + 1], *(w[h // (H // HW)][None] for w in matrices))
            torch.testing.assert_close(found[:, t : t + 1, h : h + 1], alone)


def test_fp32_is_near_float64(variant):
    name, phi = variant
    given = arguments_of(name)
    found, exact = phi(*(x.float() for x in given.values())), phi(*given.values())
    assert found.dtype == torch.float32 and relative_error(found, exact) < 1e-5


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_gradients_are_those_of_differences(name):
    given = [x.requires_grad_() for x in arguments_of(name).values()]
    if FEATURE_MAPS[name].fixed:
        given[1].requires_grad_(False)
    assert torch.autograd.gradcheck(lambda *tensors: feature_map(name, *tensors), given)


def test_result_and_gradients_have_the_dtype_of_their_input(variant):
    name, phi = variant
    for dtype in (torch.float32, torch.bfloat16):
        given = {letter: x.requires_grad_() for letter, x in arguments_of(name, torch.float32).items()}
        given["x"] = given["x"].detach().to(dtype).requires_grad_()
        found = phi(*given.values())
        assert found.dtype == dtype and (found > 0).all() == FEATURE_MAPS[name].positive
        found.sum().backward()
        for letter, x in given.items():
            fixed = letter == "W" and FEATURE_MAPS[name].fixed
            assert x.grad is None if fixed else x.grad.dtype == x.dtype


def test_under_autocast(variant):
    name, phi = variant
    given = arguments_of(name, torch.float32).values()
    with torch.autocast("cpu", torch.bfloat16):
        found = phi(*given)
    expected = phi(*(x.bfloat16() for x in given))
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def exponents(x, W):
    x = x / D**0.25
    return [sum(x[i] * W[i, j] for i in range(D)) - sum(x[i] ** 2 for i in range(D)) / 2 for j in range(M)]


def sigmoid(z):
    return 1 / (1 + (-z).exp())


BY_HAND = {  # one row, with the matrices of its head
    elu1: lambda x: torch.where(x > 0, x + 1, x.exp()),
    affine: lambda x, W, b: x @ W + b,
    relu: lambda x, W, b: (x @ W + b).clamp(min=0) + 1e-6,
    favor: lambda x, W: torch.stack([(e.exp() + 1e-6) / math.sqrt(M) for e in exponents(x, W)]),
    hedgehog: lambda x, W: torch.cat([(s * x @ W).exp() / (s * x @ W).exp().sum() for s in (1, -1)]),
    softplus: lambda x, W: (1 + (x @ W).exp()).log(),
    oglu: lambda x, W, G: (1 + (x @ W).exp()).log() * sigmoid(x @ G),
    aoglu: lambda x, W, A, B: (1 + (x @ W).exp()).log() * sigmoid(x @ A @ B),
}


@pytest.mark.parametrize("function", BY_HAND, ids=lambda f: f.__name__)
def test_by_hand(function):
    x, *matrices = arguments_of(function.__name__).values()
    found = function(x, *matrices, backend="torch")
    assert torch.equal(found, feature_map(function.__name__, x, *matrices))
    for b, t, h in ((0, 0, 0), (1, 4, 2), (0, 3, 3), (1, 2, 5)):
        own = [w[h // (H // HW)] for w in matrices]
        torch.testing.assert_close(found[b, t, h], BY_HAND[function](x[b, t, h], *own))


def test_favors_peak_is_subtracted_and_constant():
    x, W = (1.0 * one for one in arguments_of("favor").values())
    x.requires_grad_()
    found = favor(x, W, subtract_peak=True)
    peak = torch.stack(exponents(x[0, 0, 0], W[0])).max()
    expected = torch.stack([((e - peak.detach()).exp() + 1e-6) / math.sqrt(M) for e in exponents(x[0, 0, 0], W[0])])
    torch.testing.assert_close(found[0, 0, 0], expected)
    (dx,) = torch.autograd.grad(found[0, 0, 0].sum(), x)
    (expected,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(dx, expected)


def test_favors_exponents_are_fp32():
    x, W = arguments_of("favor", torch.bfloat16)["x"], arguments_of("favor", torch.float32)["W"]
    assert torch.equal(favor(x, W), favor(x.float(), W).bfloat16())


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
        (oglu, {"G": torch.randn(HW, D, M + 1)}, r"G is \[2, 4, 4\]; it must be \[2, 4, 3\]"),
        (aoglu, {"B": torch.randn(HW, 2, M + 1)}, r"B is \[2, 2, 4\]; it must be \[2, 2, 3\]"),
        (aoglu, {"A": torch.randn(3, D, 2)}, r"A is \[3, 4, 2\]"),
    ],
)
def test_errors_name_what_does_not_fit(function, changes, part):
    with pytest.raises(ValueError, match=part):
        function(**arguments_of(function.__name__) | changes)


def test_errors_of_calls_by_name():
    x, W = arguments_of("softplus").values()
    with pytest.raises(ValueError, match="'cosine' is none of elu1, "):
        feature_map("cosine", x)
    with pytest.raises(ValueError, match=r"relu takes 2 matrices \(W, b\), not 1"):
        feature_map("relu", x, W)
    with pytest.raises(ValueError, match="softplus has no option subtract_peak"):
        feature_map("softplus", x, W, subtract_peak=True)
