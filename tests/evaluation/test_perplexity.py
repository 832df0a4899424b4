"""The figures of documents' records: by hand, and of a model that knows nothing."""

import math

import numpy as np
import pytest
import torch

from lcpt.evaluation.perplexity import DocumentRecords, bits_per_byte, report
from lcpt.evaluation.scoring import score
from lcpt.evaluation.windows import TextBytes, Window, windows
from lcpt.model import GPT, ModelConfig

CPU, V = torch.device("cpu"), 40
BYTE_A_TOKEN = TextBytes(np.ones(V, dtype=np.int64), 1.0)


def documents(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(V, size=n + 1) for n in lengths]


def cut(texts, context, stride):
    return [w for number, text in enumerate(texts) for w in windows(number, text, context, stride, BYTE_A_TOKEN)]


def rows_of(scored, documents):
    records = DocumentRecords(V)
    for window, losses in scored:
        records.add(window, losses)
    return records.rows([f"document {n}" for n in range(documents)])


def test_a_model_that_knows_nothing_scores_ln_v():
    model = GPT(ModelConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=V))
    torch.nn.init.zeros_(model.embedding.weight)
    found = report(rows_of(score(model, cut(documents(30, 7), 10, 10), 4, CPU), 2))
    assert found["loss"] == pytest.approx(math.log(V), rel=1e-6)
    assert found["perplexity"] == pytest.approx(V, rel=1e-5)
    assert found["tokens_scored"] == found["bytes_scored"] == 37
    assert found["bits_per_byte"] == pytest.approx(math.log2(V), rel=1e-6)
    assert found["bits_per_byte_interval"] == pytest.approx([math.log2(V)] * 2, rel=1e-6)


def test_the_figures_are_those_by_hand():
    """Two documents of a window each: labels 2, 3 and then one of context and a 2, whose texts have 5 bytes and 1."""
    rows = rows_of(
        [
            (Window(0, np.array([1, 2]), np.array([2, 3]), bytes=5), np.array([0.5, 2.0], dtype=np.float32)),
            (Window(1, np.array([3, 3]), np.array([-1, 2]), bytes=1), np.array([0.0, 1.5], dtype=np.float32)),
        ],
        2,
    )
    position = [{"reached": 2, "windows": 1, "nats": [0.5, 2.0]}]
    assert rows == [
        {"id": "document 0", "tokens": 2, "bytes": 5, "nats": 2.5, "by_position": position},
        {"id": "document 1", "tokens": 1, "bytes": 1, "nats": 1.5, "by_position": []},
    ]
    found = report(rows)
    assert (found["tokens_scored"], found["bytes_scored"]) == (3, 6)
    assert found["loss"] == pytest.approx(4 / 3)
    assert found["perplexity"] == pytest.approx(math.exp(4 / 3))
    assert found["bits_per_byte"] == pytest.approx(4 / 6 / math.log(2)) == bits_per_byte(4, 6)
    assert [(part["start"], part["loss"]) for part in found["loss_by_position"]] == [(0, 0.5), (1, 2.0)]


def test_the_interval_is_of_documents_not_of_windows():
    """200 documents of one byte, losses N(2, 0.5²) in nats: ± 1.96 · 0.5/√200, in one window each or in five alike."""
    rng = np.random.default_rng(1)
    scored = [
        (Window(number, np.zeros(1, dtype=int), np.zeros(1, dtype=int), bytes=1), np.array([loss]))
        for number, loss in enumerate(rng.normal(2, 0.5, size=200))
    ]
    found = report(rows_of(scored, 200))
    in_five = report(rows_of([each for each in scored for _ in range(5)], 200))
    assert in_five["bits_per_byte_interval"] == pytest.approx(found["bits_per_byte_interval"])
    assert found["documents_scored"] == 200
    low, high = found["bits_per_byte_interval"]
    assert low < found["bits_per_byte"] < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 200**0.5 / math.log(2), rel=0.2)
