"""learned_sketch in PyTorch: the definition, and what it does not take."""

import pytest
import torch
from lcpt_kernels.learned_sketch import learned_sketch

from lcpt.attention.sketch import LearnedSketch


def given(*shape, hidden=6, size=4, levels=1, dtype=torch.float64):
    torch.manual_seed(0)
    widths = [shape[-1]] + [size] * (levels - 1)
    up = [torch.randn(2, width, hidden, dtype=dtype) for width in widths]
    return torch.randn(*shape, dtype=dtype), up, [torch.randn(2, hidden, size, dtype=dtype) for _ in widths]


@pytest.mark.parametrize("levels", [1, 2])
def test_definition(levels):
    x, up, down = given(2, 3, 2, 5, levels=levels)
    z = [x, x]
    for u, d in zip(up, down, strict=True):
        y = [torch.einsum("bthd,de->bthe", z[n], u[n]) for n in (0, 1)]
        z = [torch.einsum("bthe,er->bthr", y[n] * (1 + torch.erf(y[n] / 2**0.5)) / 2, d[n]) for n in (0, 1)]
    torch.testing.assert_close(learned_sketch(x, up, down), torch.tanh(z[0] * z[1] / 2))  # √4


@pytest.mark.parametrize("levels", [1, 2])
def test_the_module_is_the_function_of_its_parameters(levels):
    module, x = LearnedSketch(8, 4, 2, levels), torch.randn(2, 5, 3, 8)
    assert torch.equal(module(x), learned_sketch(x, list(module.up), list(module.down)))
    assert [name for name, _ in module.named_parameters()] == [
        f"{name}.{level}" for name in ("up", "down") for level in range(levels)
    ]


def test_any_dimensions_before_the_last():
    x, up, down = given(1, 6, 1, 5)
    for shape in ((5,), (6, 5), (2, 3, 5)):
        part = x.flatten()[: torch.Size(shape).numel()].view(shape)
        torch.testing.assert_close(
            learned_sketch(part, up, down).flatten(0, -2) if part.ndim > 1 else learned_sketch(part, up, down)[None],
            learned_sketch(x, up, down)[0, : part.numel() // 5, 0],
        )


def test_under_autocast():
    """Matrices too are taken in its dtype; gradients come back in theirs."""
    x, up, down = given(1, 7, 2, 5, dtype=torch.float32)
    leaf = up[0].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = learned_sketch(x, up, down)
    expected = learned_sketch(x.bfloat16(), [up[0].bfloat16()], [down[0].bfloat16()])
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    found.sum().backward()
    assert leaf.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda x, up, down: (x, up, down * 2), "1 levels up and 2 down"),
        (lambda x, up, down: (x, [], []), "0 levels up"),
        (lambda x, up, down: (x[None], up, down), "5 dimensions"),
        (lambda x, up, down: (x[..., :4], up, down), r"up\[0\] is \[2, 5, 6\]; it must be \[2, 4, 6\]"),
        (lambda x, up, down: (x, up, [down[0][:, :5]]), r"down\[0\] is \[2, 5, 4\]; it must be \[2, 6, 4\]"),
        (lambda x, up, down: (x, up * 2, down * 2), r"up\[1\] is \[2, 5, 6\]; it must be \[2, 4, 6\]"),
        (lambda x, up, down: (x.float(), up, down), r"up\[0\] is torch.float64, x is torch.float32"),
    ],
)
def test_what_does_not_fit_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        learned_sketch(*change(*given(2, 3, 2, 5)))


def test_backends():
    arguments = given(1, 3, 2, 5)
    assert torch.equal(learned_sketch(*arguments, backend="torch"), learned_sketch(*arguments))
    with pytest.raises(ValueError, match="'reference' is none of auto, torch, triton"):
        learned_sketch(*arguments, backend="reference")
    with pytest.raises(ValueError, match="2 levels, 1 is the most"):
        learned_sketch(*given(1, 3, 2, 5, levels=2), backend="triton")
    with pytest.raises(ValueError, match="float32 are 65 wide, 64 are the most"):
        learned_sketch(*given(1, 3, 2, 5, hidden=65, dtype=torch.float32), backend="triton")
