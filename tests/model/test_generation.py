"""Decoding gives what training sees, in every kind, at every cut."""

import itertools

import pytest
import torch

from lcpt.attention import ATTENTION, AttentionConfig
from lcpt.model import GPT, ModelConfig
from lcpt.model.cost import model_cost

T = 23
PATTERNS = [[kind] for kind in ATTENTION] + [["polysketch", "softmax", "kernel"]]


def build(pattern, gate="none"):
    torch.manual_seed(0)
    attention = AttentionConfig(pattern=pattern, block_size=4, gate=gate)
    attention.polysketch.size = 8
    config = ModelConfig(n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, vocab_size=50, attention=attention)
    return GPT(config).double()


@pytest.mark.parametrize("cuts", [[0, T], [0, 1, T], [0, 4, 8, T], [0, 7, 13, T], list(range(T + 1))], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=",".join)
def test_pieces_give_the_logits_of_the_whole(pattern, cuts):
    model, tokens = build(pattern), torch.randint(50, (2, T))
    expected, found, cache = model(tokens), [], None
    for start, stop in itertools.pairwise(cuts):
        logits, cache = model.prefill(tokens[:, start:stop], cache)
        found.append(logits)
    assert cache.position == T
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
@pytest.mark.parametrize("pattern", PATTERNS, ids=",".join)
def test_decode_is_the_next_position(pattern, shape):
    model, tokens = build(pattern), torch.randint(50, (2, T))
    expected = model(tokens)
    _, cache = model.prefill(tokens[:, :9])
    for position in range(9, T):
        logits, cache = model.decode(tokens[:, position].reshape(shape), cache)
        assert logits.shape == (2, 50)
        torch.testing.assert_close(logits, expected[:, position], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS, ids=",".join)
def test_a_repeated_cache_goes_on_in_every_copy(pattern):
    model, tokens, more = build(pattern), torch.randint(50, (2, 9)), torch.randint(50, (4, 5))
    _, cache = model.prefill(tokens)
    logits, _ = model.prefill(more, cache.repeat(2))
    expected = model(torch.cat((tokens[[0, 0, 1, 1]], more), dim=1))[:, 9:]
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS, ids=",".join)
def test_a_selected_cache_goes_on_in_the_rows_that_were_chosen(pattern):
    model, tokens, more = build(pattern), torch.randint(50, (3, 9)), torch.randint(50, (4, 5))
    rows = torch.tensor([2, 0, 0, 2])
    _, cache = model.prefill(tokens)
    logits, _ = model.prefill(more, cache.select(rows))
    expected = model(torch.cat((tokens[rows], more), dim=1))[:, 9:]
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_prefill_makes_the_last_logits_alone(largest_tensor):
    model, tokens = build(["polysketch"]), torch.randint(50, (2, T))
    (logits, cache), expected = model.prefill(tokens, last_only=True), model(tokens)
    assert logits.shape == (2, 1, 50) and cache.position == T
    torch.testing.assert_close(logits, expected[:, -1:], rtol=1e-9, atol=1e-9)
    wide = GPT(ModelConfig(n_layers=1, d_model=8, n_heads=1, vocab_size=5000))
    with largest_tensor() as largest:
        wide.prefill(torch.zeros(1, 200, dtype=torch.int64), last_only=True)
    assert largest.n_bytes < 4 * 200 * 5000


@pytest.mark.parametrize("gate", ["scalar", "data"])
def test_gates_go_on(gate):
    model, tokens = build(["polysketch", "kernel", "fastmax"], gate), torch.randint(50, (2, T))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate_module" in name:
                parameter.uniform_(-1, 1)  # far from open
    _, cache = model.prefill(tokens[:, :6])
    logits, _ = model.prefill(tokens[:, 6:], cache)
    torch.testing.assert_close(logits, model(tokens)[:, 6:], rtol=1e-9, atol=1e-9)


def bytes_of(state):
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(map(bytes_of, state.values()))
    return sum(map(bytes_of, state)) if isinstance(state, tuple) else 0


GROWING = ("softmax", "polynomial", "lowrank", "sparse_qk", "sparse_hash")


@pytest.mark.parametrize("kind", ATTENTION)
def test_the_cache_grows_only_in_kinds_that_keep_keys(kind):
    """In linear kinds the cache does not grow, and is never more than the cost model states."""
    model = build([kind]).float()
    sizes = {t: bytes_of(model.prefill(torch.randint(50, (1, t)))[1].states) for t in (8, 23, 40, 120)}
    stated = {t: model_cost(model.config, t).state_bytes for t in sizes}
    assert all(sizes[t] <= stated[t] for t in sizes)
    assert (sizes[120] == sizes[40] == sizes[8]) == (kind not in GROWING)
