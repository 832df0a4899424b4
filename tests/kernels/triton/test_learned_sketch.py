"""learned_sketch, backend="triton", against its definition in float64: output and every gradient."""

import math

import pytest
import torch
import triton
import triton.language as tl
from lcpt_kernels.learned_sketch import learned_sketch
from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.fused.gelu import gelu, gelu_and_slope
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.conftest import relative_error, results
from tests.kernels.triton.conftest import DEVICE

OUTPUT, BACKWARD = "learned_sketch_forward", "learned_sketch_backward"


def sketch(x, up, down, backend="triton"):
    return learned_sketch(x, [up], [down], backend=backend)


def inputs(t, *, b=1, h=2, d=16, e=16, r=16, norm=1.0):
    torch.manual_seed(0)
    made = {
        "x": norm * torch.randn(b, t, h, d),
        "up": torch.randn(2, d, e) / d**0.5,
        "down": torch.randn(2, e, r) / e**0.5,
    }
    return {name: x.double() for name, x in made.items()}


@pytest.fixture(params=[1, 2], ids="{} at a time".format)
def small_tiles(monkeypatch, request):
    """Three programs of several steps; the gradients of one network or of both in a program."""
    for others in ("DIFFERENT", "FP32"):
        monkeypatch.setattr(launch_configs, others, {})
    monkeypatch.setitem(launch_configs.TABLE, OUTPUT, {2**62: (16, 3, 4, 1)})
    monkeypatch.setitem(launch_configs.TABLE, BACKWARD, {2**62: (16, request.param, 3, 4, 1)})


@pytest.fixture
def agree(started):
    def check(given, tolerance=1e-5, dtype=torch.float32, do=None, change=lambda x: x):
        given = {name: x.to(DEVICE, dtype) for name, x in given.items()}
        given["x"] = change(given["x"])
        if do is None:
            do = torch.randn(*given["x"].shape[:3], given["down"].shape[2], device=DEVICE, dtype=torch.float64)
        do = do.to(dtype)  # whose strides stay what they are only where it is of this dtype
        found = results(sketch, given, do, {})
        assert started == [f"{OUTPUT}_kernel", f"{BACKWARD}_kernel"]
        expected = results(sketch, {name: x.double() for name, x in given.items()}, do.double(), {"backend": "torch"})
        for name, x in found.items():
            assert x.dtype == dtype and x.shape == expected[name].shape, name
        errors = {name: relative_error(found[name], expected[name]) for name in expected}
        assert all(error < tolerance for error in errors.values()), errors  # also false for NaN

    return check


@pytest.mark.parametrize("t", [1, 8, 9, 24, 61])
def test_every_length(small_tiles, agree, t):
    agree(inputs(t))


@pytest.mark.parametrize(
    "shape",
    [
        {"b": 2, "h": 1},
        {"b": 2, "h": 3, "d": 20, "e": 24, "r": 10},
        {"d": 40, "e": 16, "r": 8},
        {"d": 7, "e": 3, "r": 1},
        {"d": 64, "e": 64, "r": 64},
    ],
    ids=str,
)
def test_shapes(small_tiles, agree, shape):
    agree(inputs(21, **shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 32), (64, 16, 8), (128, 128, 64), (32, 32, 16)], ids=str)
def test_16_bits_with_the_tiles_of_models(agree, dtype, shape):
    d, e, r = shape
    agree(inputs(75, d=d, e=e, r=r), 5e-3, dtype=dtype)


def test_fp32_with_the_tiles_of_models(agree):
    agree(inputs(20, d=64, e=64, r=32))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.repeat(1, 1, 3, 1)[:, :, 2:4],
        lambda x: x.repeat(1, 2, 1, 1)[:, ::2],
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.repeat(1, 1, 1, 2)[..., ::2],
        lambda x: x.unflatten(1, (2, -1)).flatten(0, 1).repeat(1, 2, 1, 1)[:, 3:14],
    ],
    ids=["heads", "tokens", "heads first", "numbers", "batch"],
)
@pytest.mark.parametrize(
    "gradient",
    [
        lambda y: y,
        lambda y: y.repeat(1, 1, 2, 1)[:, :, ::2],
        lambda y: y[:1, :1, :1, :1].expand(y.shape),
    ],
    ids=["as they are", "heads", "one for all"],
)
def test_any_strides(agree, monkeypatch, change, gradient):
    monkeypatch.setitem(launch_configs.FP32, OUTPUT, {2**62: (16, 2, 4, 1)})
    monkeypatch.setitem(launch_configs.FP32, BACKWARD, {2**62: (16, 2, 2, 4, 1)})
    given = inputs(22)
    y = torch.randn(*change(given["x"]).shape[:3], 16, device=DEVICE)
    agree(given, do=gradient(y), change=change)


def test_matrices_of_any_strides(agree):
    given = inputs(9)
    agree({name: x.mT.contiguous().mT if name != "x" else x for name, x in given.items()})


def test_nothing_around_is_read(agree):
    """NaN behind every row, token and matrix."""
    given = inputs(11, d=20, e=24, r=10)

    def within(x, *more):
        around = torch.full([n + m for n, m in zip(x.shape, more, strict=True)], torch.nan, device=DEVICE)
        return around[tuple(slice(n) for n in x.shape)].copy_(x)

    do = within(torch.randn(1, 11, 2, 10), 0, 1, 1, 6)
    agree(
        {
            "x": within(given["x"], 0, 1, 1, 12),
            "up": within(given["up"], 1, 0, 0),
            "down": within(given["down"], 1, 0, 0),
        },
        do=do,
    )


@pytest.mark.parametrize("rows", [0, 1, 16, 47, 48, 49, 1000])
def test_programs_share_all_rows(rows):
    from lcpt_kernels.triton.fused.learned_sketch_forward import program_grid

    programs, steps = program_grid(rows, {"BT": 16, "PROGRAMS": 3})
    assert programs <= 3 and programs * steps * 16 >= rows and (programs == 0 or (programs - 1) * steps * 16 < rows)


@pytest.mark.parametrize("norm", [30.0, 1e-3])
def test_any_norm(agree, norm):
    """Saturated, and where S is tiny: gradients are those of the definition, though small. Of S ≈ u, which tanh by σ
    knows to an ulp of 1."""
    given = inputs(20, norm=norm)
    given["down"] *= 1 if norm > 1 else 1e3
    agree(given)


def test_no_tokens():
    given = {name: x.float().to(DEVICE) for name, x in inputs(0).items()}
    found = results(sketch, given, torch.zeros(1, 0, 2, 16, device=DEVICE), {})
    assert found["o"].shape == (1, 0, 2, 16) and found["x"].shape == (1, 0, 2, 16)
    assert not found["up"].any() and not found["down"].any()


def test_the_same_bits_twice(small_tiles):
    given = {name: x.float().to(DEVICE) for name, x in inputs(61).items()}
    do = torch.randn(1, 61, 2, 16, device=DEVICE)
    first, second = (results(sketch, given, do, {}) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@triton.jit
def gelu_kernel(y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    numbers = tl.load(y + i)
    g, slope = gelu_and_slope(numbers)
    tl.store(out + i, gelu(numbers))
    tl.store(out + SIZE + i, g)
    tl.store(out + 2 * SIZE + i, slope)


def test_gelu():
    y = torch.cat((torch.linspace(-12, 12, 8185), torch.tensor([-1e30, -1e3, -0.0, 0.0, 1e3, 1e30, math.nan])))
    out = torch.empty(3, len(y), device=DEVICE)
    gelu_kernel[(1,)](y.to(DEVICE), out, SIZE=8192)
    exact = y.double().requires_grad_()
    expected = torch.nn.functional.gelu(exact)
    expected.sum().backward()
    for found, x in zip(out.cpu().double(), (expected.detach(), expected.detach(), exact.grad), strict=True):
        torch.testing.assert_close(found, x, rtol=3e-7, atol=1.2e-6, equal_nan=True)


def test_lengths_share_one_graph():
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sketch, fullgraph=True, backend=count)
    for t in (5, 6, 9):
        given = [x.float().to(DEVICE).requires_grad_() for x in inputs(t).values()]
        found, expected = (f(*given) for f in (compiled, sketch))
        assert torch.equal(found, expected)
        for x, y in zip(*(torch.autograd.grad(o.square().sum(), given) for o in (found, expected)), strict=True):
            assert torch.equal(x, y)
    assert count.frame_count == 2  # for the first length, and for any


def test_what_the_operators_say_of_themselves():
    """Shapes, strides and dtypes without computing, derivatives, no change of what is given: PyTorch's own checks."""
    from lcpt_kernels.triton.fused import learned_sketch as _  # noqa: F401, which defines them

    x, up, down = (x.float().to(DEVICE).requires_grad_() for x in inputs(3).values())
    operators = torch.ops.lcpt_kernels
    torch.library.opcheck(operators.learned_sketch.default, (x, up, down))
    detached = [y.detach() for y in (torch.ones(1, 3, 2, 16, device=DEVICE), x, up, down)]
    torch.library.opcheck(operators.learned_sketch_backward.default, detached)


def test_under_autocast():
    given = {name: x.float().to(DEVICE) for name, x in inputs(9).items()}
    do = torch.randn(1, 9, 2, 16, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = results(sketch, given, do, {})
    expected = results(sketch, {name: x.bfloat16() for name, x in given.items()}, do, {})
    assert found["o"].dtype == torch.bfloat16 and found["up"].dtype == torch.float32
    assert all(torch.equal(found[name].float(), expected[name].float()) for name in expected)


def test_what_the_kernels_do_not_take_runs_in_pytorch(started, caplog):
    x, up, down = (x.float().to(DEVICE) for x in inputs(3).values())
    with caplog.at_level("INFO", logger="lcpt_kernels"):
        learned_sketch(x, [up, up], [down, down])
        learned_sketch(x.repeat(1, 1, 1, 5), [up.repeat(1, 5, 1)], [down])
    assert not started and "2 levels, 1 is the most" in caplog.text and "are 80 wide, 64" in caplog.text
    with pytest.raises(ValueError, match="144 wide, 128 are the most"):
        sketch(x.bfloat16().repeat(1, 1, 1, 9), up.bfloat16().repeat(1, 9, 1), down.bfloat16())
