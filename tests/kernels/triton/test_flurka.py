"""flurka_attention, backend="triton", against the definition: output and every gradient."""

import pytest
import torch
from lcpt_kernels import flurka_attention
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.conftest import relative_error, results
from tests.kernels.test_flurka import inputs as made
from tests.kernels.triton.conftest import DEVICE

C = 16


def inputs(t, *, c=C, r=3, b=1, h=1, hkv=None, d=16, dv=16, m=16, gated=False, massive=False, gain=False, linear=False):
    given = made(t, c=c, r=r, b=b, h=h, hkv=hkv or h, d=d, dv=dv, m=m, gated=gated, massive=massive)
    if gain:
        given["gain"] = torch.rand(h, dtype=torch.float64) + 0.5
    if linear:
        given |= {"q": given["q"].abs(), "k": given["k"].abs()}
    return given


@pytest.mark.parametrize("t, local_blocks", [(1, 2), (C - 1, 1), (2 * C, 1), (3 * C, 2), (5 * C + 7, 2)])
def test_every_length(agree, small_tiles, t, local_blocks):
    agree(inputs(t), attention=flurka_attention, block_size=C, local_blocks=local_blocks, offset=0.1)


@pytest.mark.parametrize("local", ["softmax", "linear"])
@pytest.mark.parametrize("local_blocks", [1, 2])
def test_gates_masses_and_gains(agree, local, local_blocks):
    given = inputs(4 * C + 5, h=2, hkv=1, gated=True, massive=True, gain=True, linear=local == "linear")
    agree(given, attention=flurka_attention, block_size=C, local=local, local_blocks=local_blocks, offset=0.7)


@pytest.mark.parametrize(
    "shape, options",
    [
        ({"b": 2, "h": 4, "hkv": 2, "r": 5, "d": 24, "dv": 40, "m": 72, "massive": True}, {"scale": 0.3}),
        ({"m": 5, "d": 7, "dv": 9, "r": 1, "massive": True}, {}),
        ({"gated": True}, {"scale": -0.3}),
        ({}, {"scale": -0.3}),
    ],
    ids=str,
)
def test_shapes(agree, shape, options):
    agree(inputs(3 * C + 5, **shape), attention=flurka_attention, block_size=C, **options)


@pytest.mark.parametrize(
    "dtype, shape",
    [
        (torch.bfloat16, {"gated": True, "massive": True}),
        (torch.float16, {"m": 72}),
    ],
    ids=str,
)
def test_16_bits(agree, dtype, shape):
    agree(inputs(5 * C + 5, **shape), 5e-3, flurka_attention, dtype=dtype, block_size=C)


def test_packed_documents(agree, small_tiles):
    """Some too short for a summary."""
    lengths = [3 * C + 1, 5, 0, 2 * C, C - 1, 0, 0]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    given, whole = inputs(sum(lengths), gated=True, massive=True), sum(n // C for n in lengths) * 3
    given = {name: x[:, : whole + 3] if "summary" in name else x for name, x in given.items()}
    agree(given, attention=flurka_attention, block_size=C, local_blocks=1, cu_seqlens=ends, summaries=3)
    given = {name: x[:, :whole] if "summary" in name else x for name, x in given.items()}
    agree(given, attention=flurka_attention, block_size=C, local_blocks=1, cu_seqlens=ends)


@pytest.mark.parametrize("sign, kept", [(1, ["o", "q", "k", "v", "log_gate"]), (-1, ["o", "phi_q", "phi_summary"])])
def test_large_scores(sign, kept):
    """Scores up to 400, where e^400 overflows fp32 and the state adds nothing; down to −400, where local keys add
    nothing."""
    given = inputs(3 * C + 5, gated=True)
    given |= {"q": 10 * given["q"].abs(), "k": sign * 10 * given["k"].abs()}
    given = {name: x.float().to(DEVICE) for name, x in given.items()}
    exact = {name: x.double() for name, x in given.items()}
    options, do = {"block_size": C, "offset": 0.1}, torch.randn_like(given["v"])
    found = results(flurka_attention, given, do, options | {"backend": "triton"})
    expected = results(flurka_attention, exact, do.double(), options | {"backend": "reference"})
    assert all(x.isfinite().all() for x in found.values())
    assert all(relative_error(found[name], expected[name]) < 1e-4 for name in kept)


@pytest.mark.parametrize("level, gated, state", [(-95.0, False, 1.0), (-300.0, True, 0.0), (-70.0, False, 1e-30)])
def test_scores_that_exp_does_not_hold(small_tiles, level, gated, state):
    """All local scores around `level`: alone in its row, a token's own value is what it gets, whatever its score."""
    given = inputs(2 * C + 5, gated=gated)
    given["q"][..., 0], given["k"][..., 0] = 1.0, level
    given["phi_q"] *= state
    given = {name: x.float().to(DEVICE) for name, x in given.items()}
    exact = {name: x.double() for name, x in given.items()}
    options, do = {"block_size": C, "local_blocks": 1, "scale": 1.0}, torch.ones_like(given["v"])
    found = results(flurka_attention, given, do, options | {"backend": "triton"})
    expected = results(flurka_attention, exact, do.double(), options | {"backend": "reference"})
    assert all(x.isfinite().all() for x in found.values())
    torch.testing.assert_close(found["o"][:, 0], given["v"][:, 0], rtol=1e-6, atol=0)
    for name in ("o", "q", "k", "v"):  # fp32 rounds a score of 300 by 1.5e-5
        assert relative_error(found[name], expected[name]) < 2e-4, name


def test_gates_that_shut(agree):
    given = inputs(4 * C + 5, gated=True, massive=True)
    given["log_gate"][:, [0, 3, C - 1, C, 2 * C + 7]] = -torch.inf
    agree(given, attention=flurka_attention, block_size=C, offset=0.1)


def test_lengths_share_one_graph():
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flurka_attention, fullgraph=True, backend=count)
    for t in (3 * C + 1, 4 * C + 2, 6 * C + 1):
        given = {name: x.float().to(DEVICE) for name, x in inputs(t).items()}
        options = {"block_size": C, "summaries": 3, "backend": "triton"}
        assert torch.equal(compiled(**given, **options)[0], flurka_attention(**given, **options)[0])
    assert count.frame_count == 2  # for the first length, and for any
