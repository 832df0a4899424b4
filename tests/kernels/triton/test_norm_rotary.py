"""norm_rotary, backend="triton", against the float64 definition: both outputs and every gradient."""

import numpy as np
import pytest
import torch
from lcpt_kernels.norm_rotary import norm_rotary
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.conftest import relative_error
from tests.kernels.triton.conftest import DEVICE, INTERPRETED

LEARNED, BOTH = ("x", "weight", "bias", "key_shift", "before"), ("rotated", "plain")
SHIFTED = {"shifted": True, "before": True, "starts": (3,)}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several programs for a few tokens."""
    from lcpt_kernels.triton.common import launch_configs

    for kernel in ("norm_rotary_forward", "norm_rotary_backward"):
        monkeypatch.setitem(launch_configs.TABLE, kernel, {128: (16, 4, 1)})
    monkeypatch.setitem(
        launch_configs.TABLE, "shifted_norm_rotary_backward", {128: (2, 1000, 1, 1)}
    )  # runs of 8 tokens


def inputs(t, *, b=1, h=2, d=16, others=3, level=5.0, shifted=False, before=False, starts=None):
    """x as a model has it: heads in the midst of a wider tensor, whose other elements are NaN. With `shifted`, a key
    shift; with `before`, the row before the first; `starts`: where documents start."""
    torch.manual_seed(0)
    wide = torch.full((b, 1 + t, h + others, d), torch.nan, dtype=torch.float64)
    heads = slice(1, 1 + h) if others else slice(None)
    wide[:, :, heads] = 3 * torch.randn(b, 1 + t, h, d) + level * torch.randn(b, 1 + t, h, 1)
    first, x = wide[:, :1, heads].clone(), wide[:, 1:, heads]
    wide[:, 0] = torch.nan
    angles = 3 * torch.randn(t, 1, d // 2)
    weight, bias = torch.randn(2, d, dtype=torch.float64)
    given = {"x": x, "weight": weight, "bias": bias, "cos": angles.cos(), "sin": angles.sin()}
    if shifted:
        given["key_shift"] = torch.randn(h, d, dtype=torch.float64)
    if before:
        given["before"] = first
    if starts is not None:
        given["starts"] = torch.isin(torch.arange(t), torch.tensor(starts))
    return given


def on_device(given, dtype=torch.float32, **dtypes):
    """The tables are fp32 in any case."""
    dtypes = {"cos": torch.float32, "sin": torch.float32, "starts": torch.bool} | dtypes
    return {name: x.to(DEVICE).to(dtypes.get(name, dtype)) for name, x in given.items()}


def in_float64(tensors):
    return {name: x if x.dtype == torch.bool else x.double() for name, x in tensors.items()}


def results(given, gradients, function=norm_rotary, **options):
    """The outputs; and, for `gradients` of those that are named in it, those of what is learned."""
    leaves = {name: x.detach().requires_grad_(name in LEARNED) for name, x in given.items()}
    outputs = dict(zip(BOTH, function(**leaves, **options), strict=True))
    learned = {name: leaf for name, leaf in leaves.items() if name in LEARNED}
    found = torch.autograd.grad([outputs[name] for name in gradients], list(learned.values()), list(gradients.values()))
    outputs = {name: None if y is None else y.detach() for name, y in outputs.items()}
    return outputs | dict(zip(learned, found, strict=True))


def random_gradients(x, used):
    return {name: torch.randn_like(x) for name in used}


@pytest.fixture
def agree(started):
    def check(given, tolerance=1e-5, used=BOTH, keep_plain=True, gradients=None):
        gradients = gradients or random_gradients(given["x"], used)
        found = results(given, gradients, keep_plain=keep_plain, backend="triton")
        exact, of_exact = map(in_float64, (given, gradients))
        expected = results(exact, of_exact, keep_plain=keep_plain, backend="torch")
        shifted = "shifted_" if "key_shift" in given else ""
        assert started == ["norm_rotary_forward_kernel", f"{shifted}norm_rotary_backward_kernel"]
        assert (found["plain"] is None) == (not keep_plain)
        for name, y in found.items():
            if y is not None:
                assert y.dtype == given.get(name, given["x"]).dtype and y.shape == expected[name].shape, name
                assert y.is_contiguous()
                assert relative_error(y, expected[name]) < tolerance, name  # also false for NaN

    return check


@pytest.mark.parametrize("t", [1, 15, 16, 17, 43])
def test_every_length(agree, t):
    agree(on_device(inputs(t)))


@pytest.mark.parametrize("before", [False, True], ids=["", "before"])
@pytest.mark.parametrize(
    "t, starts",
    [
        (1, None),
        (1, (0,)),
        (8, None),
        (9, (0,)),
        (16, (15,)),
        (17, (16,)),
        (17, None),
        (43, (7, 8, 9, 16, 31, 40)),
        (43, (0, 1, 15, 24, 25, 42)),
        (10, range(10)),
    ],
    ids=str,
)
def test_key_shift(agree, t, starts, before):
    """Documents start at both ends of a program's tokens, at both ends of a sequence, and one after the other."""
    agree(on_device(inputs(t, b=2, shifted=True, before=before, starts=starts)))


@pytest.mark.parametrize("programs", [1, 3, 4])
def test_longer_runs(agree, monkeypatch, programs):
    """Fewer programs: runs of 86, 29 and 22 tokens, in sequences of 43."""
    from lcpt_kernels.triton.common import launch_configs

    monkeypatch.setitem(launch_configs.TABLE, "shifted_norm_rotary_backward", {128: (2, programs, 1, 1)})
    agree(on_device(inputs(43, b=2, shifted=True, before=True, starts=(29,))))


@pytest.mark.parametrize("shifted", [{}, SHIFTED], ids=["", "shifted"])
@pytest.mark.parametrize(
    "shape",
    [
        {"d": 6},
        {"d": 34},
        {"d": 40},
        {"d": 64},
        {"d": 128},
        {"b": 3, "h": 5},
        {"h": 1, "others": 0},
    ],
    ids=str,
)
def test_shapes(agree, shape, shifted):
    agree(on_device(inputs(9, **shape, **shifted)))


@pytest.mark.parametrize(
    "used, keep_plain",
    [
        (BOTH, True),
        (["rotated"], False),
        (["rotated"], True),
        (["plain"], True),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shifted", [{}, SHIFTED], ids=["", "shifted"])
def test_16_bits(agree, dtype, used, keep_plain, shifted):
    agree(on_device(inputs(21, d=64, **shifted), dtype), 5e-3, used, keep_plain)


def test_weights_in_fp32(agree):
    in_fp32 = dict.fromkeys(("weight", "bias", "key_shift", "before"), torch.float32)
    agree(on_device(inputs(21, d=64, **SHIFTED), torch.bfloat16, **in_fp32), 5e-3)


@pytest.mark.parametrize("shifted", [{}, SHIFTED], ids=["", "shifted"])
def test_rows_far_from_zero(agree, shifted):
    """A variance as a difference of squares would be off by 1e-3."""
    agree(on_device(inputs(21, d=64, level=300.0, **shifted)), 3e-5)


def test_equal_elements():
    """Nothing is divided by zero."""
    given = on_device(inputs(4)) | {"x": torch.full((1, 4, 2, 16), 3.0, device=DEVICE)}
    found = results(given, random_gradients(given["x"], BOTH), keep_plain=True, backend="triton")
    assert torch.equal(found["plain"], given["bias"].expand(1, 4, 2, 16)) and found["x"].isfinite().all()


def test_epsilon():
    given = on_device(inputs(4))
    gradients = random_gradients(given["x"], BOTH)
    found, expected = (
        results(given, gradients, keep_plain=True, backend=backend, eps=4.0) for backend in ("triton", "torch")
    )
    assert all(relative_error(found[name], expected[name]) < 1e-5 for name in expected)


STRIDED = {
    "heads first": lambda: torch.randn(2, 3, 9, 16).transpose(1, 2),
    "columns first": lambda: torch.randn(2, 16, 3, 9).transpose(1, 3),
    "expanded": lambda: torch.randn(16).expand(2, 9, 3, 16),
    "of a sum": lambda: torch.ones(()).expand(2, 9, 3, 16),
}


@pytest.mark.parametrize(
    "of_x, of_rotated, of_plain",
    [
        ("heads first", "of a sum", "columns first"),
        ("columns first", "expanded", "heads first"),
        ("expanded", "heads first", "expanded"),
    ],
)
def test_strides(agree, of_x, of_rotated, of_plain):
    x, d_rotated, d_plain = (STRIDED[name]().to(DEVICE) for name in (of_x, of_rotated, of_plain))
    gradients = {"rotated": d_rotated, "plain": d_plain}
    agree(on_device(inputs(9)) | {"x": x}, gradients=gradients)


@pytest.mark.parametrize("of_x, of_rotated", [("heads first", "of a sum"), ("columns first", "expanded")])
@pytest.mark.parametrize("of_before", STRIDED)
def test_strides_with_a_key_shift(agree, of_x, of_rotated, of_before):
    """Of key_shift and starts too."""
    given = on_device(inputs(9, b=2, h=3, **SHIFTED))
    given |= {"x": STRIDED[of_x]().to(DEVICE), "before": STRIDED[of_before]().to(DEVICE)[:, 4:5]}
    given |= {"key_shift": torch.randn(16, 3).to(DEVICE).T, "starts": torch.arange(18).to(DEVICE)[::2] == 4}
    d_rotated = STRIDED[of_rotated]().to(DEVICE)
    agree(given, used=["rotated"], keep_plain=False, gradients={"rotated": d_rotated})


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_dtype_is_that_of_x_under_autocast(backend):
    """PyTorch's own LayerNorm would make it fp32 on a GPU."""
    given = on_device(inputs(9, d=64), x=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = norm_rotary(**given, keep_plain=True, backend=backend)
    exact = norm_rotary(**{name: x.double() for name, x in given.items()}, keep_plain=True, backend="torch")
    for y, z in zip(found, exact, strict=True):
        assert y.dtype == torch.bfloat16 and relative_error(y, z) < 5e-3


def test_no_tokens():
    given = on_device(inputs(0))
    found = results(given, random_gradients(given["x"], BOTH), keep_plain=True, backend="triton")
    assert found["rotated"].shape == found["x"].shape == (1, 0, 2, 16)
    assert not found["weight"].any() and not found["bias"].any()


def test_no_tokens_with_a_key_shift():
    given = on_device(inputs(0, b=3, h=3, shifted=True, before=True))
    found = results(given, random_gradients(given["x"], BOTH), keep_plain=True, backend="triton")
    for name in ("weight", "bias", "key_shift", "before"):
        assert found[name].shape == given[name].shape and not found[name].any()


def test_wide_heads_run_in_pytorch(started):
    given = on_device(inputs(3, d=130))
    assert torch.equal(norm_rotary(**given)[0], norm_rotary(**given, backend="torch")[0])
    assert not started
    with pytest.raises(ValueError, match="130 wide"):
        norm_rotary(**given, backend="triton")


@pytest.mark.parametrize("shifted", [{}, SHIFTED], ids=["", "shifted"])
def test_the_same_bits_twice(shifted):
    given = on_device(inputs(43, **shifted))
    gradients = random_gradients(given["x"], BOTH)
    first, again = (results(given, gradients, keep_plain=True, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_no_zeros_are_made_for_what_nobody_used(monkeypatch):
    import lcpt_kernels.triton.fused.norm_rotary  # noqa: F401, which defines the operator

    given, seen, operator = on_device(inputs(4)), [], torch.ops.lcpt_kernels.norm_rotary_backward
    monkeypatch.setattr(torch.ops.lcpt_kernels, "norm_rotary_backward", lambda *x: seen.append(x[:2]) or operator(*x))
    for name in BOTH:
        results(given, random_gradients(given["x"], [name]), keep_plain=True, backend="triton")
    (_, no_plain), (no_rotated, _) = seen
    assert no_plain is None and no_rotated is None


@pytest.mark.parametrize("shifted", [{}, SHIFTED], ids=["", "shifted"])
@pytest.mark.parametrize("used, keep_plain", [(["rotated"], False), (["plain"], True)], ids=str)
def test_lengths_share_one_graph(used, keep_plain, shifted):
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(norm_rotary, fullgraph=True, backend=count)
    for t in (9, 10, 17):
        given = on_device(inputs(t, h=1, **shifted))
        gradients = random_gradients(given["x"], used)
        found, expected = (
            results(given, gradients, function, keep_plain=keep_plain, backend="triton")
            for function in (compiled, norm_rotary)
        )
        assert all(torch.equal(found[name], y) for name, y in expected.items() if y is not None)
    assert count.frame_count == 2  # for the first length, and for any


@pytest.mark.parametrize("shifted", [{}, {"shifted": True}, SHIFTED], ids=["", "shifted", "streamed"])
@pytest.mark.parametrize("used, keep_plain", [(BOTH, True), (["rotated"], False)], ids=str)
def test_what_the_operators_say_of_themselves(used, keep_plain, shifted):
    """Shapes, strides and dtypes without computing, derivatives, no change of what is given: PyTorch's own checks."""
    import lcpt_kernels.triton.fused.norm_rotary  # noqa: F401, which defines them

    given = on_device(inputs(9, h=1, **shifted), torch.bfloat16, key_shift=torch.float32, before=torch.float32)
    leaves = {name: y.detach().requires_grad_(name in LEARNED) for name, y in given.items()}
    operators, eps = torch.ops.lcpt_kernels, 1e-5
    shift = ("key_shift", "before", "starts")
    forward = [*map(leaves.get, ("x", "weight", "bias", "cos", "sin", *shift)), eps, keep_plain]
    torch.library.opcheck(operators.norm_rotary.default, forward)
    gradients = random_gradients(given["x"], used)
    backward = [*map(gradients.get, BOTH), *map(given.get, ("x", "weight", "cos", "sin", *shift)), eps]
    torch.library.opcheck(operators.norm_rotary_backward.default, backward)


@pytest.mark.parametrize("shifted", [{}, SHIFTED], ids=["", "shifted"])
@pytest.mark.parametrize("shape", [(17, 1, 1), (1, 17, 1), (1, 1, 17)], ids=["batch", "tokens", "heads"])
def test_offsets_of_64_bits(shape, shifted, monkeypatch):
    """A tensor of more than 2³¹ elements, of which few are touched."""
    rows, d, stride = 17, 16, 2**27  # the last row stands at 2³¹
    if INTERPRETED:  # it would copy all of the memory onto itself
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
        memory = torch.from_numpy(np.empty((rows, stride), dtype=np.float16))
    else:
        memory = torch.cuda.HalfTensor(rows, stride)
    given = on_device(inputs(shape[1], b=shape[0], h=shape[2], **shifted), torch.float16)
    memory[:, : 2 * d] = torch.randn(rows, 2 * d, dtype=torch.float16, device=DEVICE)

    def run(memory):
        x, gradient = (y.unflatten(0, shape) for y in memory.split(d, dim=1))
        return results(given | {"x": x}, dict.fromkeys(BOTH, gradient), keep_plain=True, backend="triton")

    far, near = run(memory[:, : 2 * d]), run(memory[:, : 2 * d].clone())
    assert all(torch.equal(far[name], near[name]) for name in near)
