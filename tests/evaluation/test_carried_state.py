"""Carried state is one window over the whole document, however it is cut."""

import numpy as np
import pytest
import torch

from lcpt.attention import ATTENTION, AttentionConfig
from lcpt.evaluation.carried_state import score_with_carried_state
from lcpt.evaluation.perplexity import Tally, score
from lcpt.evaluation.windows import TextBytes, windows
from lcpt.model import GPT, ModelConfig

CPU, V = torch.device("cpu"), 40
LENGTHS = (37, 5, 1, 16)  # one document is shorter than any piece, one is one token


@pytest.fixture(params=[[kind] for kind in ATTENTION] + [["polysketch", "softmax"]], ids="-".join)
def model(request):
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


def cut(context):
    rng = np.random.default_rng(0)
    texts, a_byte = [rng.integers(V, size=length + 1) for length in LENGTHS], TextBytes(np.ones(V), 1.0)
    return [w for n, tokens in enumerate(texts) for w in windows(n, tokens, context, context, a_byte)]


def test_every_cut_is_one_window(model):
    whole = np.concatenate([losses for _, losses in score(model, cut(max(LENGTHS)), 1, CPU)])
    assert whole.std() > 0.1
    for context in (1, 7, 8, 16, 100):
        scored = list(score_with_carried_state(model, cut(context), CPU))
        assert [len(losses) for _, losses in scored] == [len(window.inputs) for window, _ in scored]
        np.testing.assert_allclose(np.concatenate([losses for _, losses in scored]), whole, rtol=2e-4, atol=2e-4)
    disjoint = np.concatenate([losses for _, losses in score(model, cut(7), 1, CPU)])
    assert np.abs(disjoint - whole).max() > 0.01  # which is what cutting costs without the state


def test_positions_are_those_in_the_document(model):
    tally = Tally(7)
    for window, losses in score_with_carried_state(model, cut(7), CPU):
        tally.add(window, losses)
    report, expected = tally.report(), Tally(37)
    for window, losses in score(model, cut(37), 1, CPU):
        expected.add(window, losses)
    for found, wanted in zip(report["loss_by_position"], expected.report()["loss_by_position"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    assert report["loss_by_position"][-1]["end"] == 37


def test_no_logits_of_a_whole_piece(largest_tensor):
    model = GPT(ModelConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=30_000))
    tokens = np.arange(601) % 30_000
    with largest_tensor() as largest:
        list(score_with_carried_state(model, windows(0, tokens, 300, 300), CPU))
    assert largest.n_bytes < 300 * 30_000 * 4 / 4
