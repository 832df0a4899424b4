"""backend="triton" against the definition: output and every gradient."""

import pytest
import torch
from lcpt_kernels import squared_attention
from torch.nn.functional import normalize

from tests.kernels.triton.conftest import DEVICE

C = 40  # block size: no multiple of the small tiles, of which it takes two
OFFSET = {"offset": 0.01}  # without one, the gradient of the first token's only weight is a rounding error


def inputs(t, *, b=1, h=1, hkv=None, r=16, d=16, dv=16, with_qk=True, gated=False, seed=0):
    """float64; a and b are unit vectors, so that 1 + s stays positive."""
    torch.manual_seed(seed)
    hkv = hkv or h
    made = {
        "a": normalize(torch.randn(b, t, h, r, dtype=torch.float64), dim=-1),
        "b": normalize(torch.randn(b, t, hkv, r, dtype=torch.float64), dim=-1),
        "v": torch.randn(b, t, hkv, dv, dtype=torch.float64),
    }
    if with_qk:
        made |= {"q": torch.randn(b, t, h, d, dtype=torch.float64), "k": torch.randn(b, t, hkv, d, dtype=torch.float64)}
    if gated:
        made["log_gate"] = -0.1 * torch.rand(b, t, hkv, dtype=torch.float64)
    return made


@pytest.mark.parametrize("local_blocks", [1, 2])
@pytest.mark.parametrize("t", [1, C + 1, 3 * C + 7])
def test_every_length(agree, small_tiles, t, local_blocks):
    agree(inputs(t), block_size=C, local_blocks=local_blocks, scale=1 / 16, **OFFSET)


@pytest.mark.parametrize("local_blocks", [1, 2])
@pytest.mark.parametrize(
    "with_qk, coefficients",
    [
        (True, (0, 0, 1)),
        (True, (1, 1, 0.5)),
        (False, (1, 1, 0.5)),
        (False, (1, 1, 0)),
    ],
    ids=str,
)
def test_coefficients_and_gates(agree, with_qk, local_blocks, coefficients):
    arguments = inputs(2 * C + 7, with_qk=with_qk, gated=True)
    agree(arguments, block_size=C, local_blocks=local_blocks, scale=1 / 16, coefficients=coefficients, **OFFSET)


@pytest.mark.parametrize(
    "shape",
    [
        {"h": 4, "hkv": 2, "gated": True},
        {"h": 3, "hkv": 1},
        {"d": 32, "dv": 48},
        {"r": 24, "dv": 72, "gated": True},  # wider than what `symmetric_gradient` is for
        {"b": 2},
        {"r": 32},
        {"r": 20},
        {"r": 5, "d": 7, "dv": 9},
        {"r": 24, "with_qk": False},
    ],
    ids=str,
)
def test_shapes(agree, shape):
    agree(inputs(C + 9, **shape), block_size=C, scale=1 / 16, **OFFSET)


def test_a_wide_sketch(agree):
    agree(inputs(19, r=64), block_size=16, scale=1 / 16, **OFFSET)


@pytest.mark.parametrize("degree, scale", [(2, 1.0), (8, 0.4), (6, 0.4)])
def test_degree_and_scale(agree, degree, scale):
    agree(inputs(C + 9), block_size=C, degree=degree, scale=scale, **OFFSET)


@pytest.mark.parametrize(
    "degree, shift, gated, local_blocks", [(4, 1.0, False, 1), (4, 1.0, True, 2), (2, 0.3, False, 2)]
)
def test_shift(agree, degree, shift, gated, local_blocks):
    arguments = inputs(2 * C + 9, gated=gated)
    agree(arguments, block_size=C, local_blocks=local_blocks, degree=degree, scale=1 / 16, shift=shift, **OFFSET)


@pytest.mark.parametrize("block_size", [1, 3, 1000])
def test_block_sizes(agree, block_size):
    agree(inputs(9, gated=True), block_size=block_size, local_blocks=2, scale=1 / 16, **OFFSET)


@pytest.mark.parametrize(
    "dtype, shape",
    [
        (torch.bfloat16, {"r": 32, "d": 32, "dv": 32}),
        (torch.bfloat16, {"gated": True}),
        (torch.bfloat16, {"with_qk": False, "gated": True}),
        (torch.float16, {"gated": True, "h": 4, "hkv": 2}),
        (torch.float16, {"with_qk": False}),
    ],
    ids=str,
)
def test_16_bits(agree, dtype, shape):
    agree(inputs(2 * C + 7, **shape), 5e-3, dtype=dtype, block_size=C, scale=1 / 16, **OFFSET)


@pytest.mark.parametrize(
    "factor, dtype, tolerance",
    [
        (30.0, torch.float32, 1e-5),
        (1 / 30, torch.float32, 1e-5),
        (30.0, torch.float16, 2e-2),
    ],
)
def test_norms(agree, factor, dtype, tolerance):
    """×30: local weights of 30⁸ beside those of the state, numbers that fp16 does not hold. ÷30: everything small
    beside the default offset."""
    arguments = {name: factor * x for name, x in inputs(2 * C + 9).items()}
    agree(arguments, tolerance, dtype=dtype, block_size=C, scale=1 / 16)


@pytest.mark.parametrize(
    "lengths, local_blocks, gated",
    [
        ([C, 1, 2 * C + 1, 3, 0, 0, 0], 1, True),
        ([1, 2 * C + 1, C, 0, 0, 0], 2, False),
        ([5, 0, 2 * C, 0, 0], 2, True),
        ([2, 1, 3], 1, True),
    ],
    ids=str,
)
def test_packed_documents(agree, small_tiles, lengths, local_blocks, gated):
    """The definition takes them one at a time."""
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    arguments = inputs(sum(lengths), gated=gated)
    agree(arguments, block_size=C, local_blocks=local_blocks, scale=1 / 16, cu_seqlens=ends, **OFFSET)


def test_any_strides(agree):
    """Heads before tokens, views of one fused projection, a column stride of 2, and a gradient that is transposed."""
    t, h, d = C + 9, 2, 16
    q, k, v = torch.randn(2, t, 3 * h, d, dtype=torch.float64).split(h, dim=2)
    a = torch.randn(2, h, t, d, dtype=torch.float64).transpose(1, 2) / 4
    b = torch.randn(2, t, h, 2 * d, dtype=torch.float64)[..., ::2] / 4
    do = torch.randn(d, h, t, 2, dtype=torch.float64).permute(3, 2, 1, 0)
    agree({"a": a, "b": b, "v": v, "q": q, "k": k}, do=do, block_size=C, scale=1 / 16, **OFFSET)


def test_strides_of_zero(agree):
    t = C + 9
    head = torch.randn(1, t, 1, 16, dtype=torch.float64).expand(1, t, 2, 16) / 4
    do = torch.ones((), dtype=torch.float64).expand(1, t, 2, 16)
    agree({"a": head, "b": head, "v": head}, do=do, block_size=C, **OFFSET)


@pytest.mark.parametrize("with_qk", [True, False])
def test_zero_over_zero_is_zero(with_qk):
    arguments = inputs(C + 3, with_qk=with_qk)
    leaves = {name: (x * (name == "v")).float().to(DEVICE).requires_grad_() for name, x in arguments.items()}
    o, _ = squared_attention(**leaves, block_size=C, offset=0.0, backend="triton")
    o.sum().backward()
    for name, x in {"o": o, **{name: x.grad for name, x in leaves.items()}}.items():
        assert torch.equal(x, torch.zeros_like(x)), name


@pytest.mark.parametrize("log_gate", [-1e4, -torch.inf])
def test_a_gate_that_shuts_leaves_nothing_behind(log_gate):
    arguments, start = inputs(3 * C + 7, gated=True), C
    arguments["log_gate"][:, start] = log_gate
    arguments = {name: x.float().to(DEVICE) for name, x in arguments.items()}
    options = {"block_size": C, "backend": "triton", **OFFSET}
    whole, _ = squared_attention(**arguments, **options)
    alone, _ = squared_attention(**{name: x[:, start:] for name, x in arguments.items()}, **options)
    torch.testing.assert_close(whole[:, start:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "with_qk, local_blocks, ends",
    [
        (True, 1, None),
        (False, 2, None),
        (True, 2, [0, C + 3, 2 * C + 7]),
    ],
)
def test_gates_that_shut(agree, small_tiles, with_qk, local_blocks, ends):
    """In the first and the last token of a block, within it, and one after the other."""
    arguments = inputs(2 * C + 7, with_qk=with_qk, gated=True)
    arguments["log_gate"][:, [0, 5, 17, 18, C - 1, C, C + 3, 2 * C + 2]] = -torch.inf
    ends = None if ends is None else torch.tensor(ends, device=DEVICE)
    agree(arguments, block_size=C, local_blocks=local_blocks, scale=1 / 16, cu_seqlens=ends, **OFFSET)


@pytest.mark.parametrize("local_blocks", [1, 2])
def test_large_sums_of_gates(agree, local_blocks):
    """Down to some −20,000 a block, of which what decides are small differences."""
    arguments = inputs(2 * C + 7, gated=True)
    arguments["log_gate"][:, ::4] -= 2000
    agree(arguments, block_size=C, local_blocks=local_blocks, scale=1 / 16, **OFFSET)


def test_deterministic():
    def run():
        leaves = {n: x.float().to(DEVICE).requires_grad_() for n, x in inputs(C + 9, h=2, hkv=1).items()}
        o, _ = squared_attention(**leaves, block_size=C, backend="triton")
        o.square().sum().backward()
        return [o.detach(), *(x.grad for x in leaves.values())]

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"dtype": torch.float64}, "torch.float64"),
        ({"d": 512}, "512 wide, 256"),
        ({"r": 136}, "136 wide, 128"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(change, named, caplog):
    dtype = change.pop("dtype", torch.float32)
    arguments = {name: x.to(DEVICE).to(dtype) for name, x in inputs(3, **change).items()}
    with pytest.raises(ValueError, match=named):
        squared_attention(**arguments, backend="triton")
    with caplog.at_level("INFO", logger="lcpt_kernels"):
        squared_attention(**arguments)
    assert named in caplog.text
