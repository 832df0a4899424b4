"""pool_blocks, backend="triton", against the float64 definition: what is pooled, and every gradient."""

import pytest
import torch
from lcpt_kernels.pooling import pool_blocks
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.conftest import relative_error
from tests.kernels.triton.conftest import DEVICE

KERNELS = ["pooling_forward_kernel", "pooling_backward_kernel"]
NAMES = ("k_pooled", "v_pooled", "mass")


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of tokens and of summaries a block."""
    from lcpt_kernels.triton.common import launch_configs

    monkeypatch.setattr(launch_configs, "FP32", {})
    for kernel in ("pooling_forward", "pooling_backward"):
        monkeypatch.setitem(launch_configs.TABLE, kernel, {128: (16, 16, 4, 1)})


def inputs(c, r, *, b=1, n=1, h=1, d=16, dv=16, gated=False, table=False, mean=0.0):
    """float64. A `mean` that all keys have, and all values, is nothing to the gradient of the logits."""
    torch.manual_seed(0)
    made = {
        "k": torch.randn(b, n, c, h, d) + mean,
        "v": torch.randn(b, n, c, h, dv) + mean,
        "logits": 2 * torch.randn(*(() if table else (b, n)), c, h, r),
    }
    if gated:
        made["gamma"] = torch.rand(b, n, c, h)
    return {name: x.double() for name, x in made.items()}


def segments(given, dtype):
    c, _, r = given["logits"].shape[-3:]
    return torch.linspace(0, 3, c * r, device=DEVICE).view(c, 1, r).to(dtype)


def of_type(given, dtype):
    """gamma, of which there are sums, in fp32."""
    return {name: x.to(DEVICE).to(torch.float32 if name == "gamma" else dtype) for name, x in given.items()}


def outcome(given, wanted, backend):
    """What is pooled, and the gradients of its products with `wanted`, of those that are wanted."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    of_segments = torch.float64 if given["k"].dtype == torch.float64 else torch.float32
    pooled = pool_blocks(**leaves, segments=segments(given, of_segments), backend=backend)
    found = {name: x for name, x in zip(NAMES, pooled, strict=True) if x is not None}
    asked = [name for name in found if name in wanted]
    gradients = torch.autograd.grad(
        [found[name] for name in asked],
        list(leaves.values()),
        [wanted[name].to(found[name].dtype) for name in asked],
        materialize_grads=True,
    )
    return {name: x.detach() for name, x in found.items()} | dict(zip(leaves, gradients, strict=True))


@pytest.fixture
def agree(started):
    """agree(inputs, tolerance): float64 inputs, rounded to `dtype`, in the kernels and by the definition; of the
    gradients of what is pooled, those of `asked` are there, as `change` leaves them."""

    def check(given, tolerance=1e-5, dtype=torch.float32, asked=NAMES, change=lambda x: x):
        given = of_type(given, dtype)
        exact = {name: x.double() for name, x in given.items()}
        pooled = pool_blocks(**exact, segments=segments(given, torch.float64), backend="torch")
        wanted = {
            name: change(torch.randn(x.shape, dtype=torch.float64, device=DEVICE).to(dtype))
            for name, x in zip(NAMES, pooled, strict=True)
            if x is not None and name in asked
        }
        found = outcome(given, wanted, "triton")
        assert started == KERNELS
        expected = outcome(exact, {name: x.double() for name, x in wanted.items()}, "torch")
        assert found.keys() == expected.keys()
        for name, x in found.items():
            of = given.get(name, given["gamma"] if name == "mass" else given["k"])
            assert x.dtype == of.dtype and x.shape == expected[name].shape, name
        errors = {name: relative_error(found[name], expected[name]) for name in expected}
        assert all(error < tolerance for error in errors.values()), errors  # also false for NaN

    return check


@pytest.mark.parametrize("c, r", [(5, 5), (16, 2), (17, 16), (33, 17), (40, 40)])
@pytest.mark.parametrize("gated", [True, False])
def test_every_size_of_block(agree, small_tiles, c, r, gated):
    agree(inputs(c, r, gated=gated))


@pytest.mark.parametrize(
    "shape",
    [
        {"b": 2, "n": 3, "h": 2, "gated": True},
        {"n": 2, "d": 5, "dv": 40, "gated": True},
        {"b": 2, "d": 128, "dv": 7},
        {"b": 2, "n": 2, "h": 2, "table": True, "gated": True},
        {"b": 2, "n": 0, "gated": True},
        {"b": 0, "n": 2},
    ],
    ids=str,
)
def test_shapes(agree, shape):
    agree(inputs(20, 3, **shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [{"gated": True}, {"mean": 5.0}], ids=str)
def test_16_bits(agree, dtype, shape):
    agree(inputs(130, 20, d=64, dv=64, **shape), 5e-3, dtype)


def test_large_logits(agree, small_tiles):
    """The largest, of which exp is no number, among the first tokens; in fp32 it is known to 3e-5."""
    given = inputs(40, 3, gated=True)
    given["logits"][:, :, :16] += 300
    agree(given, 1e-4)


def test_one_token_is_its_own_summary():
    given = of_type(inputs(1, 1, n=2, gated=True), torch.float32)
    found = outcome(
        given,
        {name: torch.ones(1, 2, 1, *size, device=DEVICE) for name, size in zip(NAMES, ((16,), (16,), ()), strict=True)},
        "triton",
    )
    assert torch.equal(found["k_pooled"], given["k"].flatten(1, 2)) and not found["logits"].any()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("within", [(1, 2), (0, 3)])
def test_slices_of_larger_tensors(agree, gated, within):
    """Whole blocks of all tokens, heads between others: strides of a layer's projections, and NaN around them."""
    given, c = inputs(20, 3, b=2, n=3, h=2, gated=gated), 20

    def inside(x):
        wide = torch.full((2, 7 + 3 * c, 5, *(n + 4 for n in x.shape[4:])), torch.nan, dtype=x.dtype)
        view = wide[:, 3 : 3 + 3 * c, 1:3].unflatten(1, (3, c))
        view = view[..., 2:-2] if x.ndim == 5 else view
        return view.copy_(x)[:, slice(*within)]

    agree({name: inside(x) for name, x in given.items()})


def transposed(x):
    return x.transpose(1, -1).contiguous().transpose(1, -1)


def test_rows_that_do_not_lie_side_by_side(agree):
    agree({name: transposed(x) for name, x in inputs(20, 3, b=2, n=2, h=3, gated=True).items()})


@pytest.mark.parametrize("change", [transposed, lambda x: x[:, :, :1].expand_as(x), lambda x: x[:1, :1].expand_as(x)])
def test_gradients_of_any_strides(agree, change):
    agree(inputs(20, 3, b=2, n=2, h=3, gated=True), change=change)


@pytest.mark.parametrize("asked", NAMES)
def test_one_gradient_alone(agree, asked):
    agree(inputs(20, 3, gated=True), asked=(asked,))


def test_logits_in_fp32_of_tokens_in_16_bits():
    """A table keeps its own dtype, and so does its gradient."""
    given = inputs(20, 3, n=2, h=2, table=True)
    given |= {name: given[name].bfloat16().double() for name in ("k", "v")}
    types = {"k": torch.bfloat16, "v": torch.bfloat16, "logits": torch.float32}
    wanted = {name: torch.ones(1, 6, 2, 16, dtype=torch.float64, device=DEVICE) for name in NAMES[:2]}
    found = outcome({name: x.to(DEVICE, types[name]) for name, x in given.items()}, wanted, "triton")
    expected = outcome({name: x.to(DEVICE) for name, x in given.items()}, wanted, "torch")
    assert found["logits"].dtype == torch.float32
    assert all(relative_error(found[name], expected[name]) < 5e-3 for name in expected)


def call(pool_blocks, given, **options):
    """What is pooled, and the gradients of the sum of its squares."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    pooled = pool_blocks(**leaves, **options)
    return *pooled, *torch.autograd.grad(sum(x.float().square().sum() for x in pooled), list(leaves.values()))


def test_the_same_bits_each_time_and_compiled():
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pool_blocks, fullgraph=True, backend=count)
    for n in (2, 3, 5):
        given = of_type(inputs(18, 3, n=n, gated=True), torch.bfloat16)
        options = {"segments": segments(given, torch.float32), "backend": "triton"}
        once = call(pool_blocks, given, **options)
        assert all(map(torch.equal, once, call(pool_blocks, given, **options)))
        assert all(map(torch.equal, once, call(compiled, given, **options)))
    assert count.frame_count == 2  # for the first number of blocks, and for any


@pytest.mark.parametrize("gated, table", [(True, False), (False, True)])
def test_what_the_operators_say_of_themselves(gated, table):
    """Shapes, strides and dtypes without computing, derivatives, no change of what is given: PyTorch's own checks."""
    from lcpt_kernels.triton.fused import pooling  # noqa: F401, which defines them

    given = of_type(inputs(6, 2, n=2, table=table, gated=gated), torch.float32)
    given["logits"] = given["logits"].expand(*given["k"].shape[:4], -1)
    leaves = [given[name].requires_grad_() if name in given else None for name in ("k", "v", "logits", "gamma")]
    arguments = (*leaves[:3], segments(given, torch.float32), leaves[3])
    operators = torch.ops.lcpt_kernels
    torch.library.opcheck(operators.pool_blocks.default, arguments)
    with torch.no_grad():
        k, v, mass, lse = operators.pool_blocks(*arguments)
        without_graph = [None if x is None else x.detach() for x in arguments]
    torch.library.opcheck(operators.pool_blocks_backward.default, (k, v, mass if gated else None, lse, *without_graph))
