"""Sequences in pieces: one after the other, with another backend in between, and on several ranks."""

import itertools

import pytest
import torch
from lcpt_kernels import squared_attention

from tests.kernels.test_exchange import Ranks
from tests.kernels.test_streaming import cut, with_gradients
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.test_squared import OFFSET, inputs

C = 16


def arguments(t, **shape):
    return {name: x.float().to(DEVICE) for name, x in inputs(t, **shape).items()}


def exact(leaves, **options):
    return squared_attention(**leaves, **options, backend="torch")[0]


def compare(found, expected):
    for name, x in expected.items():
        assert (found[name] - x).norm() <= 2e-5 * x.norm(), name


@pytest.mark.parametrize("local_blocks, cuts, shape, backends", [
    (1, [0, C - 1, 3 * C, 3 * C + 5], {"gated": True}, "triton triton triton"),
    (2, [0, 2 * C + 1, 2 * C + 2, 4 * C], {"gated": True}, "triton triton triton"),
    (2, [0, 2 * C + 1, 2 * C + 2, 4 * C], {"near": False, "gated": True}, "triton triton triton"),
    (2, [0, 2 * C + 1, 4 * C], {"r": 20, "h": 2, "hkv": 1}, "torch triton"),
    (1, [0, C + 1, 3 * C], {"r": 20}, "triton torch"),
], ids=str)
def test_pieces_make_the_whole(local_blocks, cuts, shape, backends):
    """Output and every gradient, which flows back through the states; they are the same for both backends."""
    options = {"block_size": C, "local_blocks": local_blocks, "scale": 1 / 16, **OFFSET}
    if not shape.get("near", True):
        options["coefficients"] = (1, 1, 0.5)
    given = arguments(cuts[-1], **shape)

    def in_pieces(leaves):
        outputs, state = [], None
        for backend, (start, stop) in zip(backends.split(), itertools.pairwise(cuts), strict=True):
            o, state = squared_attention(**cut(leaves, start, stop), initial_state=state, output_final_state=True,
                                         backend=backend, **options)
            outputs.append(o)
        return torch.cat(outputs, dim=1)

    compare(with_gradients(given, in_pieces), with_gradients(given, lambda leaves: exact(leaves, **options)))


@pytest.mark.parametrize("local_blocks", [1, 2])
@pytest.mark.parametrize("t", [1, 3 * C, 3 * C + 5])
def test_the_state_is_that_of_pytorch(local_blocks, t):
    options = {"block_size": C, "local_blocks": local_blocks, "coefficients": (1, 1, 0.5), "output_final_state": True}
    given = arguments(t, gated=True, r=20)
    (_, found), (_, expected) = (squared_attention(**given, **options, backend=name) for name in ("triton", "torch"))
    torch.testing.assert_close(found.S, expected.S, rtol=1e-5, atol=1e-6)
    assert found.S.dtype == torch.float32 and found.tail.keys() == expected.tail.keys()
    assert all(torch.equal(found.tail[name], x) for name, x in expected.tail.items())


def test_ranks_make_the_whole():
    starts, tokens = [0, 2 * C + 1], 5 * C - 1
    options = {"block_size": C, "local_blocks": 2, "scale": 1 / 16, **OFFSET}
    given = arguments(tokens, gated=True)

    def shared(leaves):
        ranks, outputs = Ranks(starts), []
        for ranks.rank, (start, stop) in enumerate(itertools.pairwise([*starts, tokens])):
            part = cut(leaves, start, stop)
            outputs.append(squared_attention(**part, exchange=ranks, backend="triton", **options)[0])
        return torch.cat(outputs, dim=1)

    compare(with_gradients(given, shared), with_gradients(given, lambda leaves: exact(leaves, **options)))
