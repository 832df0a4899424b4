"""norm_rotary in PyTorch: its definition, what it is in a model, and what it refuses."""

import pytest
import torch
from lcpt_kernels.norm_rotary import norm_rotary
from torch import nn

D = 6


def inputs(t=5, d=D, dtype=torch.float64):
    torch.manual_seed(0)
    angles = torch.randn(t, 1, d // 2)
    x, weight, bias = torch.randn(2, t, 3, d), torch.randn(d), torch.randn(d)
    return {name: y.to(dtype) for name, y in {"x": x, "weight": weight, "bias": bias}.items()} | {
        "cos": angles.cos(),
        "sin": angles.sin(),
    }


def test_by_hand():
    """The pair (1, 4) of one head of one token as a complex number."""
    given = inputs()
    rotated, plain = norm_rotary(**given, eps=0.1, keep_plain=True)
    x, angle = given["x"][1, 3, 2], torch.complex(given["cos"], given["sin"])[3, 0, 1]
    y = (x - x.mean()) / (x.square().mean() - x.mean() ** 2 + 0.1).sqrt() * given["weight"] + given["bias"]
    torch.testing.assert_close(plain[1, 3, 2], y)
    torch.testing.assert_close(torch.complex(*rotated[1, 3, 2, [1, 4]]), torch.complex(*y[[1, 4]]) * angle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_the_module_of_pytorch_and_then_the_rotation(dtype):
    given = inputs(dtype=dtype)
    norm = nn.LayerNorm(D).to(dtype)
    norm.load_state_dict({name: given[name] for name in ("weight", "bias")})
    rotated, plain = norm_rotary(**given, keep_plain=True)
    first, second = norm(given["x"]).chunk(2, dim=-1)
    cos, sin = given["cos"], given["sin"]
    expected = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    assert torch.equal(plain, norm(given["x"])) and torch.equal(rotated, expected.to(dtype))
    assert norm_rotary(**given)[1] is None


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"x": torch.randn(2, 5, D)}, "3 dimensions"),
        ({"weight": torch.randn(4)}, r"weight is \[4\].*\[6\]"),
        ({"bias": torch.randn(1, D)}, r"bias is \[1, 6\]"),
        ({"x": torch.randn(2, 5, 3, 7)}, "7 wide"),
        ({"cos": torch.randn(4, 1, 3)}, r"cos is \[4, 1, 3\].*\[5, 1, 3\]"),
        ({"sin": torch.randn(5, 3)}, r"sin is \[5, 3\]"),
        ({"backend": "reference"}, "'reference'"),
    ],
)
def test_wrong_arguments_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        norm_rotary(**inputs() | wrong)
