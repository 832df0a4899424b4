"""add_layer_norm and add_rms_norm, backend="triton", against the float64 definition: outputs and every gradient."""

import pytest
import torch
from lcpt_kernels import add_layer_norm, add_rms_norm
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.conftest import relative_error
from tests.kernels.triton.conftest import DEVICE

OUTPUTS = ("normed", "total")
KINDS = pytest.mark.parametrize("kind", ["layer", "layer, bias", "rms"])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several programs, and steps of each, for a few rows."""
    from lcpt_kernels.triton.common import launch_configs

    monkeypatch.setitem(launch_configs.TABLE, "add_norm_forward", {8192: (4, 4, 1)})
    monkeypatch.setitem(launch_configs.TABLE, "add_norm_backward", {8192: (2, 3, 4, 1)})


def inputs(shape, kind, *, added=True, dtype=torch.float32, level=2.0, of_weight=None):
    stream = {"x": 3 * torch.randn(shape) + level, "delta": torch.randn(shape) if added else None}
    vectors = {"weight": torch.randn(shape[-1]), "bias": torch.randn(shape[-1]) if "bias" in kind else None}
    given = {name: x if x is None else x.to(DEVICE, dtype) for name, x in stream.items()}
    return given | {name: x if x is None else x.to(DEVICE, of_weight or dtype) for name, x in vectors.items()}


def function_of(kind):
    return add_rms_norm if kind == "rms" else add_layer_norm


def results(given, gradients, kind, backend="triton", function=None, **options):
    """The outputs; and, for `gradients` of those that are named in it, those of the inputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items() if x is not None}
    tensors = {"delta": None} | leaves
    outputs = dict(zip(OUTPUTS, (function or function_of(kind))(**tensors, backend=backend, **options), strict=True))
    used = [outputs[name] for name in gradients]
    found = torch.autograd.grad(used, list(leaves.values()), list(gradients.values()), allow_unused=True)
    return {name: y.detach() for name, y in outputs.items()} | dict(zip(leaves, found, strict=True))


def in_float64(tensors):
    return {name: x if x is None else x.double() for name, x in tensors.items()}


@pytest.fixture
def agree(started):
    def check(given, kind, tolerance=1e-5, used=OUTPUTS, gradients=None, **options):
        gradients = gradients or {name: torch.randn_like(given["x"]) for name in used}
        found = results(given, gradients, kind, **options)
        assert started == ["add_norm_forward_kernel", "add_norm_backward_kernel"]
        exact = in_float64(given)
        if given["delta"] is not None:  # of the rounded sum, as in the kernel and in PyTorch
            exact |= {"x": (given["x"] + given["delta"]).double(), "delta": 0 * exact["delta"]}
        expected = results(exact, in_float64(gradients), kind, "torch", **options)
        for name, y in found.items():
            assert y.dtype == given.get(name, given["x"]).dtype and y.shape == expected[name].shape, name
            assert relative_error(y, expected[name]) < tolerance, name  # also false for NaN

    return check


@KINDS
@pytest.mark.parametrize("added", [True, False], ids=["added", "norm alone"])
@pytest.mark.parametrize("shape", [(1, 16), (5, 17), (2, 7, 24), (3, 11, 40)], ids=str)
def test_every_shape(agree, kind, added, shape):
    """One to several rows a program and a step, the last of which is not whole."""
    agree(inputs(shape, kind, added=added), kind)


@KINDS
@pytest.mark.parametrize("used", [OUTPUTS, ["normed"]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(agree, kind, dtype, used):
    agree(inputs((13, 48), kind, dtype=dtype), kind, 5e-3, used)


@KINDS
def test_weights_in_fp32(agree, kind):
    agree(inputs((13, 48), kind, dtype=torch.bfloat16, of_weight=torch.float32), kind, 5e-3)


@KINDS
def test_rows_far_from_zero(agree, kind):
    """A variance as a difference of squares would be off by 1e-3."""
    agree(inputs((13, 48), kind, level=300.0), kind, 1e-4 if "layer" in kind else 1e-5)


@KINDS
def test_epsilon(agree, kind):
    agree(inputs((9, 24), kind), kind, eps=4.0)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_wide_rows(agree, kind):
    agree(inputs((3, 5000), kind), kind)


@KINDS
def test_strides(agree, kind):
    """x is a slice of a wider tensor whose other columns are NaN; one gradient is that of a sum."""
    given = inputs((3, 5, 24), kind)
    wide = torch.full((3, 5, 60), torch.nan, device=DEVICE)
    wide[..., 4:28] = given["x"]
    given |= {"x": wide[..., 4:28], "delta": given["delta"].mT.contiguous().mT}
    ones = torch.ones((), device=DEVICE).expand(3, 5, 24)
    agree(given, kind, gradients={"normed": torch.randn(5, 3, 24, device=DEVICE).transpose(0, 1), "total": ones})


def test_the_total_alone_has_its_own_gradient(started):
    given = inputs((5, 24), "layer")
    d_total = torch.randn_like(given["x"])
    found = results(given, {"total": d_total}, "layer")
    assert torch.equal(found["x"], d_total) and torch.equal(found["delta"], d_total) and found["weight"] is None
    assert started == ["add_norm_forward_kernel"]


def test_equal_elements():
    given = inputs((4, 24), "layer, bias") | {"x": torch.full((4, 24), 3.0, device=DEVICE), "delta": None}
    found = results(given, {"normed": torch.randn_like(given["x"])}, "layer, bias")
    torch.testing.assert_close(found["normed"], given["bias"].expand(4, 24))
    assert found["x"].isfinite().all() and found["total"].data_ptr() == given["x"].data_ptr()


@KINDS
def test_no_rows(kind):
    given = inputs((0, 24), kind)
    found = results(given, {name: torch.zeros_like(given["x"]) for name in OUTPUTS}, kind)
    assert found["x"].shape == found["normed"].shape == (0, 24) and not found["weight"].any()


def test_what_is_too_wide_runs_in_pytorch(started):
    given = inputs((2, 8200), "layer")
    assert torch.equal(add_layer_norm(**given)[0], add_layer_norm(**given, backend="torch")[0]) and not started
    with pytest.raises(ValueError, match="8200 wide"):
        add_layer_norm(**given, backend="triton")


@KINDS
def test_the_same_bits_twice(kind):
    given = inputs((43, 24), kind)
    gradients = {name: torch.randn_like(given["x"]) for name in OUTPUTS}
    first, again = (results(given, gradients, kind) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@KINDS
def test_lengths_share_one_graph(kind):
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function_of(kind), fullgraph=True, backend=count)
    for t in (4, 5, 7):
        given = inputs((t, 24), kind)
        gradients = {name: torch.randn_like(given["x"]) for name in OUTPUTS}
        found, expected = (results(given, gradients, kind, function=function) for function in (compiled, None))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert count.frame_count == 2  # for the first length, and for any


@pytest.mark.parametrize("added", [True, False])
def test_what_the_operators_say_of_themselves(added):
    import lcpt_kernels.triton.fused.add_norm  # noqa: F401, which defines them

    given = inputs((2, 3, 24), "layer, bias", added=added, dtype=torch.bfloat16, of_weight=torch.float32)
    leaves = [x if x is None else x.detach().requires_grad_() for x in given.values()]
    torch.library.opcheck(torch.ops.lcpt_kernels.add_norm.default, (*leaves, False, 1e-5))
    d_normed, d_total = torch.randn_like(given["x"]), torch.randn_like(given["x"]) if added else None
    backward = (d_normed, d_total, given["x"], given["weight"], True, False, 1e-5)
    torch.library.opcheck(torch.ops.lcpt_kernels.add_norm_backward.default, backward)
