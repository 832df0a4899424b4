"""Feature maps, backend="triton", against their definitions in float64: φ and every gradient."""

import pytest
import torch
from lcpt_kernels import feature_maps
from lcpt_kernels.feature_maps import FEATURE_MAPS, matrix_shapes
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.conftest import relative_error, results
from tests.kernels.triton.conftest import DEVICE

KERNELS = ["feature_map_forward_kernel", "feature_map_backward_kernel"]
VARIANTS = {name: (name, {}) for name in FEATURE_MAPS}
VARIANTS |= {
    f"{name}-{option}": (name, {option: True}) for name, entry in FEATURE_MAPS.items() for option in entry.options
}
PEAK = "favor-subtract_peak"
MAPS = list(VARIANTS)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs for the rows of a head and for the columns of x, and several steps each."""
    from lcpt_kernels.triton.common import launch_configs

    for others in ("DIFFERENT", "FP32"):
        monkeypatch.setattr(launch_configs, others, {})
    monkeypatch.setitem(launch_configs.TABLE, "feature_map_forward", {64: (16, 2, 4, 1)})
    for kernel in ("feature_map_backward", "feature_map_backward_linear"):
        monkeypatch.setitem(launch_configs.TABLE, kernel, {64: (16, 2, 16, 4, 1)})


def map_of(variant, **others):
    """The function of x and, by their letters, matrices."""
    name, options = VARIANTS[variant]
    return lambda x, backend, **given: feature_maps.feature_map(
        name, x, *(given[letter] for letter in FEATURE_MAPS[name].matrices), backend=backend, **options, **others
    )


def inputs(variant, t=17, *, b=2, h=4, hw=2, d=24, m=20, dtype=torch.float32, scale=1.0):
    """x lies between NaN, as q and k lie beside each other in memory; W has the strides of a transpose, b has gaps."""
    entry = FEATURE_MAPS[VARIANTS[variant][0]]
    torch.manual_seed(0)
    x = torch.full((b, t, h + 3, d), torch.nan, dtype=torch.float64)
    x[:, :, 2 : h + 2] = scale * torch.randn(b, t, h, d, dtype=torch.float64)
    shapes = matrix_shapes(entry.matrices, hw, d, m, r=3)
    matrices = {letter: torch.randn(shape, dtype=torch.float64) * d**-0.5 for letter, shape in shapes.items()}
    given = {letter: w.to(DEVICE).to(dtype) for letter, w in ({"x": x} | matrices).items()}
    if entry.fixed:
        given["W"] = (d**0.5 * matrices["W"]).to(DEVICE).float()
    if "W" in given:
        given["W"] = given["W"].mT.contiguous().mT
    if "b" in given:
        given["b"] = given["b"].repeat_interleave(2, dim=1)[:, ::2]
    return given


def agree(name, tolerance=1e-5, backend="triton", **shape):
    given, phi = inputs(name, **shape), map_of(name)
    whole, constant = given.pop("x"), {}
    given["x"] = whole[:, :, 2:-1]
    if FEATURE_MAPS[VARIANTS[name][0]].fixed:
        constant = {"W": given.pop("W")}
    size = phi(**given, **constant, backend="torch").shape[3]
    b, t, h, _ = given["x"].shape
    dphi = torch.randn(b, h, t, size, dtype=torch.float64).transpose(1, 2).to(DEVICE).to(whole.dtype)
    found = results(phi, given, dphi, constant | {"backend": backend})
    exact = {one: x.double() for one, x in given.items()}
    constant = {one: w.double() for one, w in constant.items()}
    expected = results(phi, exact, dphi.double(), constant | {"backend": "torch"})
    for one, x in given.items():
        assert found[one].dtype == x.dtype and found[one].shape == x.shape, one
    assert found["o"].dtype == whole.dtype and found["o"].is_contiguous()
    errors = {one: relative_error(found[one], expected[one]) for one in expected}
    assert all(error < tolerance for error in errors.values()), errors  # also false for NaN


@pytest.mark.parametrize("name", MAPS)
def test_every_map(name, small_tiles, started):
    """Forward and backward in the kernels, and every gradient."""
    agree(name)
    assert started == KERNELS


@pytest.mark.parametrize(
    "name, shape",
    [
        ("elu1", {"d": 5}),
        ("affine", {"d": 80, "m": 7, "h": 6, "hw": 2}),
        ("affine", {"d": 64, "m": 32, "h": 3, "hw": 3}),
        ("relu", {"d": 80, "m": 7, "h": 6, "hw": 2}),
        ("favor", {"d": 7, "m": 33}),
        (PEAK, {"m": 16}),
        ("hedgehog", {"d": 64, "m": 64, "t": 3}),
        ("softplus", {"d": 128, "m": 5}),
        ("oglu", {"d": 33, "m": 128, "t": 2}),
    ],
    ids=str,
)
def test_widths_and_groups(name, shape):
    agree(name, **{"h": 2, "hw": 1} | shape)


@pytest.mark.parametrize(
    "name, dtype",
    [*((name, torch.bfloat16) for name in MAPS), *((name, torch.float16) for name in ("favor", "hedgehog", "oglu"))],
    ids=str,
)
def test_16_bits(name, dtype, small_tiles):
    agree(name, 5e-3, dtype=dtype, b=1, t=35, h=2, hw=1)


@pytest.mark.parametrize("t", [1, 16, 32, 33])
def test_every_length(t, small_tiles):
    agree("oglu", t=t, b=1, h=1, hw=1)


def test_no_rows():
    """As a sequence shorter than a block has no summaries."""
    given = {one: x.requires_grad_() for one, x in inputs("relu", t=0).items()}
    phi = feature_maps.relu(given["x"][:, :, 2:-1], given["W"], given["b"], backend="triton")
    assert phi.shape == (2, 0, 4, 20)
    phi.sum().backward()
    assert torch.equal(given["W"].grad, torch.zeros_like(given["W"]))


@pytest.mark.parametrize(
    "name, z",
    [
        ("softplus", -30.0),
        ("softplus", -5.0),
        ("softplus", 90.0),
        ("oglu", 95.0),
        ("oglu", -95.0),
        ("elu1", -20.0),
        ("elu1", 100.0),
    ],
)
def test_far_from_zero(name, z):
    """What is small is not 0, what is large no infinity: each element within rounding."""
    x = torch.tensor([z, z / 2], dtype=torch.float64, device=DEVICE).expand(1, 1, 1, 2)
    eye = torch.eye(2, dtype=torch.float64, device=DEVICE)[None]
    given = {"x": x} | dict.fromkeys({"softplus": "W", "oglu": "WG", "elu1": ""}[name], eye)
    function, do = map_of(name), torch.ones(1, 1, 1, 2, device=DEVICE)
    found = results(function, {one: x.float() for one, x in given.items()}, do, {"backend": "triton"})
    expected = results(function, given, do.double(), {"backend": "torch"})
    for one in ("o", "x"):
        torch.testing.assert_close(found[one].double(), expected[one], rtol=3e-5, atol=1e-37)


def test_favor_of_queries_with_large_exponents():
    """Unless the largest is subtracted, all of a row become 0 or infinite."""
    agree(PEAK, 1e-4, scale=12.0)


def test_the_peak_is_one_of_the_features():
    x, W = torch.full((1, 1, 1, 4), -9.0, device=DEVICE), torch.ones(1, 4, 3, device=DEVICE)
    phi = feature_maps.favor(x, W, subtract_peak=True, backend="triton")
    torch.testing.assert_close(phi, torch.full_like(phi, 3**-0.5))


@pytest.mark.parametrize("name", ["favor", PEAK])
def test_favors_exponents_are_fp32(name):
    agree(name, 5e-3, dtype=torch.bfloat16, scale=3.0, h=2, hw=1)


@pytest.mark.parametrize("name", MAPS)
def test_what_is_no_number_stays_none(name):
    """As it does in PyTorch: a loss must show it."""
    given = inputs(name, t=2, b=1, h=1, hw=1)
    given["x"] = torch.stack((torch.full((24,), torch.nan), torch.ones(24)))[None, :, None].to(DEVICE)
    phi = map_of(name)(**given, backend="triton")
    assert phi[:, 0].isnan().all() and phi[:, 1].isfinite().all()


def test_relu_is_never_zero():
    x, W, b = torch.zeros(1, 1, 1, 3), torch.zeros(1, 3, 2), torch.tensor([[-1.0, 0.0]])
    phi = feature_maps.relu(x.to(DEVICE), W.to(DEVICE), b.to(DEVICE), backend="triton")
    assert torch.equal(phi, torch.full_like(phi, feature_maps.TINY))


def test_favors_matrix_is_a_constant():
    given = {one: x.requires_grad_() for one, x in inputs("favor").items()}
    feature_maps.favor(given["x"][:, :, 2:-1], given["W"], backend="triton").sum().backward()
    assert given["W"].grad is None and given["x"].grad is not None


def test_the_same_bits_twice(small_tiles):
    given, once = inputs("oglu"), []
    given["x"] = given["x"][:, :, 2:-1].contiguous()
    for _ in range(2):
        once.append(results(feature_maps.oglu, given, torch.ones(2, 17, 4, 20, device=DEVICE), {"backend": "triton"}))
    assert all(torch.equal(x, once[1][one]) for one, x in once[0].items())


def test_lengths_share_one_graph():
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(feature_maps.hedgehog, fullgraph=True, backend=count)
    for t in (4, 5, 9, 20):
        given = inputs("hedgehog", t)
        given["x"] = given["x"][:, :, 2:-1].contiguous()
        found, expected = (
            results(f, given, torch.ones(2, t, 4, 40, device=DEVICE), {"backend": "triton"})
            for f in (compiled, feature_maps.hedgehog)
        )
        assert all(torch.equal(x, expected[one]) for one, x in found.items())
    assert count.frame_count == 2  # for the first length, and for any


@pytest.mark.parametrize("name", ["relu", "favor"])
def test_what_the_operators_say_of_themselves(name):
    from lcpt_kernels.triton.fused import feature_maps as operators

    given = inputs(name, t=3)
    x = given["x"][:, :, 2:-1].detach().requires_grad_()
    W, G, b = (None if name not in given else given[name].requires_grad_(name != "favor") for name in "WGb")
    torch.library.opcheck(operators.forward._opoverload, (x, W, G, b, name, False))
    tensors = [None if x is None else x.detach() for x in (x, W, G, b)]
    dphi = torch.randn_like(operators.feature_map(name, *tensors))
    torch.library.opcheck(operators.backward._opoverload, (dphi, *tensors, name, False))


def test_under_autocast():
    """fp32 arguments are cast to bf16, favor's W too; gradients are fp32."""
    given = inputs("relu")
    given["x"] = given["x"][:, :, 2:-1].contiguous()
    do = torch.ones(2, 17, 4, 20, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = results(feature_maps.relu, given, do, {"backend": "triton"})
    lower = {one: x.bfloat16() for one, x in given.items()}
    expected = results(feature_maps.relu, lower, do, {"backend": "triton"})
    assert found["o"].dtype == torch.bfloat16 and found["W"].dtype == torch.float32
    assert all(torch.equal(x, expected[one].to(x.dtype)) for one, x in found.items())


@pytest.mark.parametrize(
    "name, shape, part",
    [
        ("relu", {"m": 130}, "130 wide, 128"),
        ("elu1", {"d": 129}, "129 wide, 128"),
        ("hedgehog", {"d": 64, "m": 65}, "130 wide, 128"),
        ("aoglu", {"m": 130}, "130 wide"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(name, shape, part):
    given = inputs(name, t=2, **shape)
    with pytest.raises(ValueError, match=part):
        map_of(name)(**given | {"x": given["x"][:, :, 2:-1]}, backend="triton")
