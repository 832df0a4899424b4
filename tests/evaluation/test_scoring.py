"""Losses of windows: those of the logits, at any batch, with carried state, on any number of ranks."""

import itertools

import numpy as np
import pytest
import torch

from lcpt.attention import ATTENTION, AttentionConfig
from lcpt.benchmarking.live_bytes import LiveBytes
from lcpt.evaluation.scoring import score, score_with_carried_state
from lcpt.evaluation.windows import TextBytes, windows
from lcpt.model import GPT, ModelConfig

CPU, V = torch.device("cpu"), 40
BYTE_A_TOKEN = TextBytes(np.ones(V, dtype=np.int64), 1.0)
LENGTHS = (37, 5, 1, 16)  # one document is shorter than any piece, one is one token


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layers=2, d_model=16, n_heads=2, vocab_size=V))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 10  # losses that differ from token to token
    return model


@pytest.fixture(params=[[kind] for kind in ATTENTION] + [["polysketch", "softmax"]], ids="-".join)
def any_model(request):
    torch.manual_seed(0)
    attention = AttentionConfig(pattern=request.param, block_size=8)
    tied = len(request.param) == 1
    config = ModelConfig(n_layers=2, d_model=16, n_heads=2, vocab_size=V, tie_embeddings=tied, attention=attention)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 3  # losses that differ from token to token
    return model


def documents(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(V, size=n + 1) for n in lengths]


def cut(texts, context, stride):
    return [w for number, text in enumerate(texts) for w in windows(number, text, context, stride, BYTE_A_TOKEN)]


def whole(texts):
    return [w for number, text in enumerate(texts) for w in windows(number, text, len(text), len(text), BYTE_A_TOKEN)]


def test_any_batch_gives_the_same_numbers(model):
    """Documents of unlike length, so that batches are padded; order is kept."""
    chosen = cut(documents(30, 3, 17, 1, 25), context=10, stride=5)
    alone = list(score(model, chosen, 1, CPU))
    for batch in (3, 8, 100):
        together = list(score(model, chosen, batch, CPU))
        assert [w for w, _ in together] == chosen
        for (window, losses), (_, expected) in zip(together, alone, strict=True):
            assert losses.shape == window.inputs.shape
            # Logits are as large as 25 here, and a matrix product rounds them differently for every batch.
            np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-4)


def test_losses_are_those_of_the_logits(model):
    [window] = cut(documents(12), 20, 20)
    [(_, losses)] = score(model, [window], 4, CPU)
    log_p = model(torch.from_numpy(window.inputs)[None])[0].log_softmax(-1)
    expected = -log_p[torch.arange(12), torch.from_numpy(window.labels)]
    np.testing.assert_allclose(losses, expected.detach().numpy(), rtol=1e-5)
    assert losses.std() > 0.1


def test_masked_labels_cost_nothing(model):
    chosen = cut(documents(30), context=10, stride=5)
    for window, losses in score(model, chosen, 3, CPU):
        assert np.array_equal(losses == 0, window.labels < 0)


def test_scoring_no_windows_gives_nothing(model):
    assert list(score(model, [], 4, CPU)) == []


def test_carried_state_is_one_window(any_model):
    """Any piece, and documents of unlike length in a batch."""
    chosen = whole(documents(*LENGTHS))
    expected = [losses for _, losses in score(any_model, chosen, 1, CPU)]
    assert np.concatenate(expected).std() > 0.1
    for piece, batch in ((1, 1), (7, 1), (8, 3), (16, 4), (100, 2)):
        scored = list(score_with_carried_state(any_model, chosen, batch, piece, CPU))
        assert [w for w, _ in scored] == chosen
        for (_, losses), wanted in zip(scored, expected, strict=True):
            np.testing.assert_allclose(losses, wanted, rtol=2e-4, atol=2e-4)
    disjoint = [losses for _, losses in score(any_model, cut(documents(*LENGTHS), 7, 7), 1, CPU)]
    assert np.abs(np.concatenate(disjoint) - np.concatenate(expected)).max() > 0.01  # what cutting costs without it


def test_no_logits_of_a_whole_piece(largest_tensor):
    model = GPT(ModelConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=30_000))
    with largest_tensor() as largest:
        list(score_with_carried_state(model, windows(0, np.arange(601) % 30_000, 600, 600), 1, 300, CPU))
    assert largest.n_bytes < 300 * 30_000 * 4 / 4


def test_a_long_document_takes_little_more_than_its_keys():
    """A hybrid on 32,768 tokens: no mask, no copy of all keys."""
    attention = AttentionConfig(pattern=["polysketch", "softmax"], block_size=64)
    model = GPT(ModelConfig(n_layers=2, d_model=64, n_heads=1, vocab_size=V, attention=attention))
    with LiveBytes() as live:
        [(_, losses)] = score_with_carried_state(model, whole(documents(2**15)), 1, 1024, CPU)
    keys = 2 * 4 * 64 * 2**15
    assert losses.shape == (2**15,) and keys < live.peak < 1.6 * keys


@pytest.mark.parametrize("world, units", [(3, 7), (3, 2), (2, 0), (1, 4)])
def test_ranks_take_units_in_turn(world, units, monkeypatch):
    """Each unit is done once, by rank number % world, and only the first rank hears of the results."""
    from lcpt.evaluation import scoring

    heard, done = {}, {}
    for rank in reversed(range(world)):  # so that the first one knows what the others sent
        monkeypatch.setattr(scoring.groups, "world_size", lambda: world)
        monkeypatch.setattr(scoring.groups, "rank", lambda rank=rank: rank)
        rounds, sent = itertools.count(), done.setdefault(rank, [])

        def gather(mine, rank=rank, rounds=rounds, sent=sent):
            number = next(rounds)
            sent.append(mine)
            return [done[other][number] for other in range(world)] if rank == 0 else None

        monkeypatch.setattr(scoring.groups, "gather", gather)
        heard[rank] = list(scoring.in_turn(range(units), lambda unit, rank=rank: (unit, rank)))
    assert heard[0] == [(unit, (unit, unit % world)) for unit in range(units)]
    assert all(heard[rank] == [] for rank in range(1, world))
