import itertools
import math

import numpy as np
import pytest
import torch

from lcpt.evaluation.perplexity import Tally, bits_per_byte, position_edges, score
from lcpt.evaluation.windows import TextBytes, Window, windows
from lcpt.model import GPT, ModelConfig

CPU, V = torch.device("cpu"), 40
BYTE_A_TOKEN = TextBytes(np.ones(V, dtype=np.int64), 1.0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layers=2, d_model=16, n_heads=2, vocab_size=V))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 10  # losses that differ from token to token
    return model


def documents(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(V, size=n + 1) for n in lengths]


def cut(texts, context, stride):
    return [w for number, text in enumerate(texts) for w in windows(number, text, context, stride, BYTE_A_TOKEN)]


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


def test_a_model_that_knows_nothing_scores_ln_v():
    model = GPT(ModelConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=V))
    torch.nn.init.zeros_(model.embedding.weight)
    tally = Tally(10)
    for window, losses in score(model, cut(documents(30, 7), 10, 10), 4, CPU):
        tally.add(window, losses)
    report = tally.report()
    assert report["loss"] == pytest.approx(math.log(V), rel=1e-6)
    assert report["perplexity"] == pytest.approx(V, rel=1e-5)
    assert report["tokens_scored"] == report["bytes_scored"] == 37
    assert report["bits_per_byte"] == pytest.approx(math.log2(V), rel=1e-6)
    assert report["bits_per_byte_interval"] == pytest.approx([math.log2(V)] * 2, rel=1e-6)


def by_hand():
    """Two windows: labels 2, 3 and then one of context and a 2, whose texts have 5 bytes and 1."""
    tally = Tally(context=4)
    tally.add(Window(0, np.array([1, 2]), np.array([2, 3]), bytes=5), np.array([0.5, 2.0], dtype=np.float32))
    tally.add(Window(1, np.array([3, 3]), np.array([-1, 2]), bytes=1), np.array([0.0, 1.5], dtype=np.float32))
    return tally.report()


def test_the_report_equals_figures_by_hand():
    report = by_hand()
    assert (report["tokens_scored"], report["bytes_scored"]) == (3, 6)
    assert report["loss"] == pytest.approx(4 / 3)
    assert report["perplexity"] == pytest.approx(math.exp(4 / 3))
    assert report["bits_per_byte"] == pytest.approx(4 / 6 / math.log(2)) == bits_per_byte(4, 6)
    assert report["loss_by_position"] == [
        {"start": 0, "end": 1, "tokens": 1, "loss": 0.5},
        {"start": 1, "end": 2, "tokens": 2, "loss": 1.75},
    ]


def test_the_interval_is_of_documents_not_of_windows():
    """200 documents of one byte, losses N(2, 0.5²) in nats: ± 1.96 · 0.5/√200, in one window each or in five alike."""
    rng = np.random.default_rng(1)
    tally, in_five = Tally(8), Tally(8)
    for number, loss in enumerate(rng.normal(2, 0.5, size=200)):
        window = Window(number, np.zeros(1, dtype=int), np.zeros(1, dtype=int), bytes=1)
        tally.add(window, np.array([loss]))
        for _ in range(5):
            in_five.add(window, np.array([loss]))
    report = tally.report()
    assert in_five.report()["bits_per_byte_interval"] == pytest.approx(report["bits_per_byte_interval"])
    assert report["documents_scored"] == 200
    low, high = report["bits_per_byte_interval"]
    assert low < report["bits_per_byte"] < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 200**0.5 / math.log(2), rel=0.2)
    assert tally.report() == report  # the same at every call


@pytest.mark.parametrize("context, lengths", [(5, (3, 4, 11)), (100, (300, 20)), (100, (7,))])
def test_loss_by_position_covers_every_token(context, lengths):
    tally = Tally(context)
    for window in cut(documents(*lengths), context, context):
        tally.add(window, np.arange(len(window.labels), dtype=np.float32))  # the loss is the position
    report = tally.report()
    bins = report["loss_by_position"]
    assert sum(entry["tokens"] for entry in bins) == report["tokens_scored"] == sum(lengths)
    assert sum(e["tokens"] * e["loss"] for e in bins) / sum(lengths) == pytest.approx(report["loss"])
    assert bins[0]["start"] == 0 and bins[-1]["end"] <= context
    assert all(first["end"] == second["start"] for first, second in itertools.pairwise(bins))
    assert all(entry["start"] <= entry["loss"] <= entry["end"] - 1 for entry in bins)


@pytest.mark.parametrize("context", [1, 5, 64, 100, 8192, 32768])
def test_position_edges_cover_the_context(context):
    edges = position_edges(context)
    assert edges[0] == 0 and edges[-1] == context and edges == sorted(set(edges)) and len(edges) < 20
