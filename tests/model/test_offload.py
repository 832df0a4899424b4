"""Activation checkpointing with offload: inputs of blocks on the host, the feed-forward network in pieces."""

import pytest
import torch

from lcpt.model import GPT
from lcpt.model.feed_forward import ACTIVATIONS, FeedForward
from lcpt.parallel import groups
from lcpt.parallel.sequence import join_sequence_group
from lcpt.utils.host_offload import bytes_on_host
from tests.model.conftest import CONFIGS, V, config

PIECE = 7


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr("lcpt.model.feed_forward.PIECE", PIECE)


def build(options):
    torch.manual_seed(0)
    return GPT(options)


@pytest.mark.parametrize("rows", [1, PIECE, PIECE + 1, 3 * PIECE])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_pieces_are_the_whole(kind, rows):
    """In float64, with every gradient, of a batch of two."""
    network, x = FeedForward(kind, 8, 24, bias=True).double(), torch.randn(2, rows, 8, dtype=torch.float64)
    x.requires_grad_()
    inputs, d_out = [x, *network.parameters()], torch.randn_like(x)
    expected, found = network(x), network.in_pieces(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(found, inputs, d_out), torch.autograd.grad(expected, inputs, d_out), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_no_more_than_a_piece_is_ever_wide(largest_tensor):
    network, x = FeedForward("geglu", 8, 32, bias=False), torch.randn(1, 10 * PIECE, 8, requires_grad=True)
    with largest_tensor() as largest:
        network.in_pieces(x).sum().backward()
    assert largest.n_bytes == x.nbytes > 4 * PIECE * 64


def test_pieces_keep_their_input_alone():
    network, x, kept = FeedForward("geglu", 8, 32, bias=False), torch.randn(1, 10 * PIECE, 8, requires_grad=True), {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = network.in_pieces(x)
    assert list(kept.values()) == [x.nbytes] and y.shape == x.shape


def loss_and_gradients(model, tokens, labels, part=None):
    loss, _ = model(tokens, labels, part=part)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_full_checkpointing(name):
    """The loss is equal; weights of the feed-forward network have gradients that are summed in another order."""
    x = torch.randint(V, (2, 20))
    expected, found = (
        loss_and_gradients(build(config_of(name, policy)).double(), x[:, :-1], x[:, 1:]) for policy in (True, "offload")
    )
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        in_fp32 = key == "loss" or "gate_module" in key
        assert (found[key] - value).norm() <= (1e-5 if in_fp32 else 1e-10) * value.norm(), key


def config_of(name, policy):
    return CONFIGS[name].__class__(**vars(CONFIGS[name]) | {"activation_checkpointing": policy})


def test_the_host_has_one_input_a_block():
    """Of packed documents too, whose borders stay where they are."""
    model, x = build(config(n_layers=3, activation_checkpointing="offload")), torch.randint(V, (1, 40))
    loss, _ = model(x, labels=x, cu_seqlens=torch.tensor([0, 15, 40]))
    assert bytes_on_host() == 3 * 40 * 16 * 4
    loss.backward()
    assert bytes_on_host() == 0
    with torch.no_grad():
        hidden = model.hidden(x)
    assert bytes_on_host() == 0
    torch.testing.assert_close(hidden, build(config(n_layers=3)).hidden(x), rtol=1e-6, atol=1e-6)


def on_ranks(policy):
    groups.join("cpu")
    group = join_sequence_group(groups.world_size())
    tokens = torch.randint(V, (1, 40), generator=torch.Generator().manual_seed(0))
    part = group.slice(40)
    own = slice(part.first, part.first + part.tokens)
    found = loss_and_gradients(
        build(config(n_layers=3, activation_checkpointing=policy)), tokens[:, own], tokens.roll(-1, 1)[:, own], part
    )
    groups.leave()
    return found


def test_slices_of_a_sequence_go_with_it(run_ranks):
    for expected, found in zip(*(run_ranks(lambda p=p: on_ranks(p), 2) for p in (True, "offload")), strict=True):
        for key, value in expected.items():
            assert (found[key] - value).norm() <= 1e-5 * value.norm(), key
