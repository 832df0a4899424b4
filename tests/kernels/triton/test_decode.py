"""One token after a sequence that PyTorch read, in the kernels of decoding, against the float64 definition."""

import pytest
import torch
from lcpt_kernels import feature_attention, flurka_attention, squared_attention

from tests.kernels import test_streaming as small
from tests.kernels.conftest import relative_error
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.test_squared import inputs

OFFSET = {"offset": 0.01}


@pytest.fixture
def few_parts(monkeypatch):
    """Of the state and of the local keys, of which each has several tiles."""
    from lcpt_kernels.triton.common import launch_configs

    monkeypatch.setattr(launch_configs, "DIFFERENT", {})
    monkeypatch.setitem(launch_configs.TABLE, "decode_parts", {256: (2, 2, 8, 2, 4, 1)})


@pytest.fixture
def decoded(started):
    """decoded(function, arguments, read, tokens, tolerance, dtype, **options): the tokens after the first `read`, which
    PyTorch reads, one by one; each but those that complete a block is two kernels."""

    def check(function, arguments, read, tokens, tolerance=1e-5, dtype=torch.float32, **options):
        given = {name: x.to(DEVICE).to(dtype) for name, x in arguments.items()}
        outputs, reach = [], options["block_size"] * options.get("local_blocks", 1)
        options |= {"output_final_state": True}
        with torch.no_grad():
            _, state = function(**small.cut(given, 0, read), **options, backend="torch")
            for t in range(read, read + tokens):
                started.clear()
                leaves = state.tail["v"].shape[1] + 1 == reach
                one = small.cut(given, t, t + 1)
                o, state = function(**one, initial_state=state, **options, backend="triton")
                assert leaves or started == ["decode_parts_kernel", "decode_output_kernel"], started
                assert o.dtype == dtype
                outputs.append(o)
        exact = {name: x.double() for name, x in small.cut(given, 0, read + tokens).items()}
        options |= {"output_final_state": False}
        expected = function(**exact, **options, backend="reference")[0][:, read:]
        for t, o in enumerate(outputs):
            assert relative_error(o[:, 0], expected[:, t]) < tolerance, (read + t, o, expected[:, t])

    return check


@pytest.mark.usefixtures("few_parts")
@pytest.mark.parametrize("local_blocks", [1, 2])
@pytest.mark.parametrize("read", [1, 15, 31, 36])
def test_the_product_kind(decoded, read, local_blocks):
    """A power with a shift beside a sketch, inside blocks of 16 and over their borders."""
    options = {"block_size": 16, "local_blocks": local_blocks, "scale": 1 / 16, "shift": 1.0}
    decoded(squared_attention, inputs(read + 3, r=20, gated=True), read, 3, **options, **OFFSET)


@pytest.mark.usefixtures("few_parts")
@pytest.mark.parametrize("shape", [{"b": 2, "h": 4, "hkv": 2}, {"h": 3, "hkv": 1, "gated": True}, {"d": 24, "dv": 40}])
def test_heads_and_sequences(decoded, shape):
    options = {"block_size": 16, "scale": 1 / 16, "shift": 1.0}
    decoded(squared_attention, inputs(41, r=9, **shape), 40, 1, **options, **OFFSET)


@pytest.mark.usefixtures("few_parts")
@pytest.mark.parametrize("with_qk", [True, False])
@pytest.mark.parametrize("coefficients", [(1, 1, 0.5), (0, 1, 1), (1, 1, 0), (2, 0, 0.5)], ids=str)
def test_coefficients(decoded, with_qk, coefficients):
    arguments = inputs(42, r=20, with_qk=with_qk, gated=True)
    decoded(squared_attention, arguments, 41, 1, block_size=16, coefficients=coefficients, scale=1 / 16, **OFFSET)


@pytest.mark.usefixtures("few_parts")
@pytest.mark.parametrize("function, made", [(feature_attention, small.features), (flurka_attention, small.flurka)])
@pytest.mark.parametrize("local_blocks", [1, 2])
@pytest.mark.parametrize("gated", [True, False])
def test_features_and_summaries(decoded, function, made, local_blocks, gated):
    arguments = made(22, b=1, h=2, hkv=1, gated=gated)
    decoded(function, arguments, 19, 3, block_size=small.C, local_blocks=local_blocks, **OFFSET)


@pytest.mark.usefixtures("few_parts")
@pytest.mark.parametrize("factor", [-3000.0, 0.0, 300.0])
@pytest.mark.parametrize("read, offset", [(20, 0.01), (3, 0.0)])
def test_exponents_of_any_size(decoded, factor, read, offset):
    """Local weights of e^±100 and more, beside a state, and where they are all."""
    arguments = small.flurka(read + 1, b=1, h=1, hkv=1)
    arguments["q"] *= factor
    decoded(flurka_attention, arguments, read, 1, block_size=small.C, local_blocks=2, offset=offset)


@pytest.mark.usefixtures("few_parts")
@pytest.mark.parametrize("log_gate", [-50.0, -torch.inf])
@pytest.mark.parametrize("function, made", [(squared_attention, small.squared), (flurka_attention, small.flurka)])
def test_gates_that_shut(decoded, function, made, log_gate):
    arguments = made(22, b=1, h=1, hkv=1)
    arguments["log_gate"][:, [13, 19]] = log_gate
    decoded(function, arguments, 19, 3, block_size=small.C, local_blocks=2, **OFFSET)


@pytest.mark.usefixtures("few_parts")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function, made", [(squared_attention, inputs), (flurka_attention, small.flurka)])
def test_sixteen_bits(decoded, dtype, function, made):
    options = {"block_size": small.C, "scale": 1 / 16, **OFFSET}
    decoded(function, made(34, b=1, h=2, hkv=1), 33, 1, 5e-3, dtype, **options)


def test_the_parts_of_the_table(decoded):
    """r and the keys are no multiples of a part's."""
    options = {"block_size": 100, "scale": 1 / 16, "shift": 1.0}
    decoded(squared_attention, inputs(190, r=44, gated=True), 189, 1, **options, **OFFSET)


@pytest.mark.usefixtures("few_parts")
def test_nothing_over_nothing_is_zero():
    arguments = {name: torch.zeros_like(x).float().to(DEVICE) for name, x in inputs(3).items()}
    options = {"block_size": 16, "output_final_state": True, "offset": 0.0, "backend": "triton"}
    with torch.no_grad():
        _, state = squared_attention(**small.cut(arguments, 0, 2), **options)
        o, _ = squared_attention(**small.cut(arguments, 2, 3), initial_state=state, **options)
    assert torch.equal(o, torch.zeros_like(o))
