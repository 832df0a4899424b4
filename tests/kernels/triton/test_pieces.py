"""Sequences in pieces: one after the other, with another backend in between, and on several ranks."""

import itertools

import pytest
import torch
from lcpt_kernels import feature_attention, flurka_attention, squared_attention
from lcpt_kernels.triton.block_causal import state

from tests.kernels import test_documents as documents
from tests.kernels import test_streaming as small
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


@pytest.mark.parametrize(
    "local_blocks, cuts, shape, backends",
    [
        (1, [0, C - 1, 3 * C, 3 * C + 5], {"gated": True}, "triton triton triton"),
        (2, [0, 2 * C + 1, 2 * C + 2, 4 * C], {"gated": True}, "triton triton triton"),
        (2, [0, 2 * C + 1, 2 * C + 2, 4 * C], {"with_qk": False, "gated": True}, "triton triton triton"),
        (2, [0, 2 * C + 1, 4 * C], {"r": 20, "h": 2, "hkv": 1}, "torch triton"),
        (1, [0, C + 1, 3 * C], {"r": 20}, "triton torch"),
    ],
    ids=str,
)
def test_pieces_make_the_whole(local_blocks, cuts, shape, backends):
    """Output and every gradient, which flows back through the states; they are the same for both backends."""
    options = {"block_size": C, "local_blocks": local_blocks, "scale": 1 / 16, **OFFSET}
    if not shape.get("with_qk", True):
        options["coefficients"] = (1, 1, 0.5)
    given = arguments(cuts[-1], **shape)

    def in_pieces(leaves):
        outputs, state = [], None
        for backend, (start, stop) in zip(backends.split(), itertools.pairwise(cuts), strict=True):
            o, state = squared_attention(
                **cut(leaves, start, stop), initial_state=state, output_final_state=True, backend=backend, **options
            )
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


def test_a_state_need_not_be_symmetric():
    """x_p x_q and x_q x_p of one group are two features, which a state that a user made may hold different sums of."""
    options = {"block_size": C, "scale": 1 / 16, **OFFSET}
    given = arguments(2 * C + 5, gated=True, r=20)
    _, state = squared_attention(**given, **options, output_final_state=True, backend="torch")
    width = state.S.shape[3]
    numerators = torch.arange(width, device=DEVICE) < width - 1  # noise in a denominator may make it 0
    leaves = given | {"S": state.S + numerators * torch.randn_like(state.S)}

    def after(backend):
        return lambda leaves: squared_attention(
            **{name: x for name, x in leaves.items() if name != "S"},
            **options,
            initial_state=state._replace(S=leaves["S"]),
            backend=backend,
        )[0]

    compare(with_gradients(leaves, after("triton")), with_gradients(leaves, after("torch")))


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


@pytest.mark.parametrize(
    "attention, made, local_blocks, cuts, backends",
    [
        (feature_attention, small.features, 1, [0, 5, 18, 23], "triton triton triton"),
        (feature_attention, small.features, 2, [0, 13, 23], "torch triton"),
        (flurka_attention, small.flurka, 2, [0, 13, 14, 29], "triton triton triton"),
        (flurka_attention, small.flurka, 1, [0, 12, 20], "triton torch"),
    ],
)
def test_pieces_of_features_and_summaries(attention, made, local_blocks, cuts, backends):
    """Blocks of 6; states are PyTorch's, and so are the gradients that flow back through them."""
    options = {"block_size": small.C, "local_blocks": local_blocks, **small.OFFSET}
    given = {name: x.float().to(DEVICE) for name, x in made(cuts[-1], b=1, h=2, hkv=1).items()}
    states = {}

    def in_pieces(leaves, backends):
        outputs, state = [], None
        for backend, (start, stop) in zip(backends, itertools.pairwise(cuts), strict=True):
            o, state = attention(
                **cut(leaves, start, stop), initial_state=state, output_final_state=True, backend=backend, **options
            )
            outputs.append(o)
        states[tuple(backends)] = state
        return torch.cat(outputs, dim=1)

    in_torch = ["torch"] * (len(cuts) - 1)
    compare(
        with_gradients(given, lambda leaves: in_pieces(leaves, backends.split())),
        with_gradients(given, lambda leaves: in_pieces(leaves, in_torch)),
    )
    found, expected = states[tuple(backends.split())], states[tuple(in_torch)]
    torch.testing.assert_close(found.S, expected.S, rtol=1e-5, atol=1e-6)
    assert found.tail.keys() == expected.tail.keys()


def test_ranks_make_the_whole_of_summaries():
    starts, tokens = [0, 2 * small.C + 1], 5 * small.C - 1
    options = {"block_size": small.C, "local_blocks": 2, **small.OFFSET}
    given = {name: x.float().to(DEVICE) for name, x in small.flurka(tokens, b=1, h=1, hkv=1).items()}

    def shared(leaves):
        ranks, outputs = Ranks(starts), []
        for ranks.rank, (start, stop) in enumerate(itertools.pairwise([*starts, tokens])):
            outputs.append(flurka_attention(**cut(leaves, start, stop), exchange=ranks, backend="triton", **options)[0])
        return torch.cat(outputs, dim=1)

    compare(
        with_gradients(given, shared),
        with_gradients(given, lambda leaves: flurka_attention(**leaves, **options, backend="torch")[0]),
    )


@pytest.mark.parametrize(
    "attention, made, run, shape, local_blocks",
    [
        (squared_attention, small.squared, documents.on_ranks, {"gated": True}, 2),
        (squared_attention, small.squared, documents.on_ranks, {"gated": False, "with_qk": False}, 1),
        (feature_attention, small.features, documents.on_ranks, {"gated": True}, 1),
        (flurka_attention, small.flurka, documents.on_ranks, {"gated": True}, 2),
        (flurka_attention, small.flurka, documents.in_pieces, {"gated": False}, 1),
    ],
)
def test_documents_go_on_over_pieces_and_ranks(attention, made, run, shape, local_blocks):
    ends, borders = [13, 37, 38, documents.TOKENS], [0, 25, 53, documents.TOKENS - 2, documents.TOKENS]
    options = {"block_size": small.C, "local_blocks": local_blocks, **small.OFFSET}
    if made is small.flurka:
        options["summaries"] = small.R
    given = documents.given(made, ends, shape, h=2, hkv=1)
    given = {name: x.float().to(DEVICE) for name, x in given.items()}
    whole = {"cu_seqlens": torch.tensor([0, *ends], device=DEVICE), "backend": "torch", **options}
    compare(
        with_gradients(given, lambda leaves: run(attention, leaves, ends, borders, options | {"backend": "triton"})),
        with_gradients(given, lambda leaves: attention(**leaves, **whole)[0]),
    )


@pytest.mark.parametrize("gated", [True, False])
def test_an_exchange_walks_once_more(started, gated):
    """For what of the state leaves the rank, since nothing is kept; with a gate its backward pass does too."""
    given = {name: x.requires_grad_() for name, x in arguments(3 * C, gated=gated).items()}
    counts = []
    for exchange in (None, Ranks([0])):
        started.clear()
        squared_attention(**given, exchange=exchange, block_size=C, backend="triton")[0].sum().backward()
        counts.append({name: started.count(name) for name in ("block_state_kernel", "block_forward_kernel")})
    assert counts[1]["block_forward_kernel"] == counts[0]["block_forward_kernel"] == 1
    assert counts[1]["block_state_kernel"] == counts[0]["block_state_kernel"] + 1 + gated


@pytest.mark.parametrize(
    "local_blocks, shape, ends",
    [
        (1, {"gated": True, "h": 2, "hkv": 1}, None),
        (2, {"gated": True}, None),
        (2, {"with_qk": False}, [0, 3, 6 * C + 5, 8 * C + 5]),
    ],
    ids=str,
)
def test_a_walk_in_pieces_is_that_of_the_whole(started, monkeypatch, local_blocks, shape, ends):
    """Output and every gradient after an initial state, and the state in the end; of packed documents without states,
    of which some have fewer blocks than there are pieces."""
    monkeypatch.setattr(state, "BLOCKS", 1)
    options = {"block_size": C, "local_blocks": local_blocks, "scale": 1 / 16, **OFFSET}
    if not shape.get("with_qk", True):
        options["coefficients"] = (1, 1, 0.5)
    given = arguments(8 * C + 5, **shape)
    packed = {} if ends is None else {"cu_seqlens": torch.tensor(ends, device=DEVICE)}

    def after_a_state(backend):
        def run(leaves):
            if packed:
                return squared_attention(**leaves, **packed, **options, backend=backend)[0]
            first, rest = cut(leaves, 0, C + 3), cut(leaves, C + 3, 8 * C + 5)
            carried = dict(output_final_state=True, **options, backend=backend)
            o, between = squared_attention(**first, **carried)
            rest, end = squared_attention(**rest, **carried, initial_state=between)
            return torch.cat((o.flatten(), rest.flatten(), end.S.flatten()))

        return run

    found = with_gradients(given, after_a_state("triton"))
    assert started.count("block_state_kernel") > 3 * (
        1 + (not shape.get("with_qk", True))
    )  # once for parts, once after them
    compare(found, with_gradients(given, after_a_state("torch")))
