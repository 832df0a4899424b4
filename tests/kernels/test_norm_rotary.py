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


def test_key_shift_by_hand():
    """Each token has a share of the one before it, a first token one of what is given, and a document's start none."""
    given, before = inputs() | {"key_shift": torch.randn(3, D).double()}, torch.randn(2, 1, 3, D).double()
    x, m = given["x"], given["key_shift"]

    def plain_of(shifted):
        return norm_rotary(**given | {"x": shifted, "key_shift": None}, keep_plain=True)[1]

    def plain(**options):
        return norm_rotary(**given, keep_plain=True, **options)[1]

    starts = torch.tensor([False, False, True, False, False])
    expected = plain_of(torch.stack([x[:, 0] + m * before[:, 0], *(x[:, t] + m * x[:, t - 1] for t in range(1, 5))], 1))
    torch.testing.assert_close(plain(before=before), expected)
    torch.testing.assert_close(plain()[:, 1:], expected[:, 1:])
    torch.testing.assert_close(plain()[:, 0], plain_of(x)[:, 0])
    packed = plain(before=before, starts=starts)
    torch.testing.assert_close(packed[:, 2], plain_of(x)[:, 2])
    torch.testing.assert_close(packed[:, [0, 1, 3, 4]], expected[:, [0, 1, 3, 4]])
    torch.testing.assert_close(plain(before=before, starts=torch.ones(5, dtype=torch.bool)), plain_of(x))


@pytest.mark.parametrize("n", [1, 3, 4])
def test_what_comes_next_goes_on_from_the_last_row(n):
    """f(x[:n]), then f(x[n:]) with the row before it: outputs and gradients are those of f(x)."""
    given = inputs() | {"key_shift": torch.randn(3, D).double()}
    given |= {name: given[name].requires_grad_() for name in ("x", "weight", "bias", "key_shift")}
    learned = [y for y in given.values() if y.requires_grad]

    def part(tokens, before=None):
        own = {"x": given["x"][:, tokens], "cos": given["cos"][tokens], "sin": given["sin"][tokens]}
        return norm_rotary(**given | own, before=before, keep_plain=True)

    whole = part(slice(None))
    first, rest = part(slice(n)), part(slice(n, None), before=given["x"][:, n - 1 : n])
    pieces = [torch.cat(both, dim=1) for both in zip(first, rest, strict=True)]
    do = [torch.randn_like(y) for y in whole]
    for found, expected in (
        (pieces, whole),
        (torch.autograd.grad(pieces, learned, do), torch.autograd.grad(whole, learned, do)),
    ):
        torch.testing.assert_close(list(found), list(expected))


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"x": torch.randn(2, 5, D)}, "3 dimensions"),
        ({"weight": torch.randn(4)}, r"weight is \[4\].*\[6\]"),
        ({"bias": torch.randn(1, D)}, r"bias is \[1, 6\]"),
        ({"x": torch.randn(2, 5, 3, 7)}, "7 wide"),
        ({"cos": torch.randn(4, 1, 3)}, r"cos is \[4, 1, 3\].*\[5, 1, 3\]"),
        ({"sin": torch.randn(5, 3)}, r"sin is \[5, 3\]"),
        ({"key_shift": torch.randn(D)}, r"key_shift is \[6\].*\[3, 6\]"),
        ({"key_shift": torch.randn(1, D)}, r"key_shift is \[1, 6\].*\[3, 6\]"),
        ({"key_shift": torch.randn(3, D), "before": torch.randn(2, 3, D)}, r"before is \[2, 3, 6\].*\[2, 1, 3, 6\]"),
        ({"before": torch.randn(2, 1, 3, D)}, "before is given without key_shift"),
        ({"starts": torch.zeros(4, dtype=torch.bool)}, r"starts is \[4\].*\[5\]"),
        ({"backend": "reference"}, "'reference'"),
    ],
)
def test_wrong_arguments_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        norm_rotary(**inputs() | wrong)
