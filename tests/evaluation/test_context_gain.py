"""Context gain: the same targets at every context, and a model that uses just so much of it."""

import numpy as np
import pytest

from lcpt.evaluation.context_gain import STRETCHES, ContextGain, default_contexts, report, stretch_width, target_windows


def test_contexts_are_doublings_up_to_the_longest():
    assert default_contexts(32768) == [512, 1024, 2048, 4096, 8192, 16384, 32768]
    assert default_contexts(8192) == [512, 1024, 2048, 4096, 8192]
    assert default_contexts(1000) == [125, 250, 500, 1000]
    assert default_contexts(5) == [1, 2, 5] and default_contexts(1) == [1]


@pytest.mark.parametrize("length", [64, 65, 70, 100, 1000, 5000])
def test_targets_are_the_same_at_every_context(length):
    """Tokens are their own positions, so that labels tell which tokens are scored."""
    contexts, tokens = [16, 32, 64], np.arange(length + 1)
    width = stretch_width(contexts)
    scored = {context: [] for context in contexts}
    for window in target_windows(7, tokens, contexts):
        assert window.document == 7 and len(window.inputs) == len(window.labels)
        assert np.array_equal(window.inputs[-width:] + 1, window.labels[-width:])
        assert (window.labels[:-width] == -1).all()
        scored[len(window.inputs)] += window.labels[-width:].tolist()
    assert scored[16] == scored[32] == scored[64]
    assert len(set(scored[16])) == len(scored[16]) == width * min(STRETCHES, (length - 64) // width + 1)
    assert min(scored[16]) > 64 - width and max(scored[16]) == length or length < 70


def test_a_short_document_has_no_targets():
    assert list(target_windows(0, np.arange(64), [16, 64])) == []


def records(documents, contexts, loss_of):
    gain = ContextGain(contexts)
    for number, tokens in enumerate(documents):
        for window in target_windows(number, tokens, contexts):
            gain.add(window, loss_of(number, len(window.inputs)) * (window.labels >= 0))
    rows = [{"id": str(n), "context_gain": gain.row(n)} for n in range(len(documents))]
    return [row if row["context_gain"] else {"id": row["id"]} for row in rows]


def test_the_gain_is_what_the_context_takes_off():
    """A model that uses 64 tokens and no more, on documents of unlike difficulty: their differences cancel."""
    rng, contexts = np.random.default_rng(0), [16, 64, 256]
    hard = rng.normal(5, 1, size=12)
    documents = [np.arange(n) for n in rng.integers(500, 900, size=12)] + [np.arange(100)]
    rows = records(documents, contexts, lambda number, context: hard[number] - np.log(min(context, 64)))
    found = report(rows)
    assert found["documents"] == 12 and [part["context"] for part in found["contexts"]] == contexts
    smallest, used, unused = found["contexts"]
    assert (smallest["gain"], smallest["gain_interval"]) == (0, None)
    for part in (used, unused):
        assert part["gain"] == pytest.approx(np.log(4)) and part["gain_interval"] == pytest.approx([np.log(4)] * 2)
        assert part["interval"][1] - part["interval"][0] > 0.5
    assert found["targets"] == sum(row["context_gain"]["tokens"] for row in rows[:12])


def test_a_model_without_use_for_context_gains_nothing():
    found = report(records([np.arange(400)] * 12, [16, 64], lambda number, context: 3.0))
    assert found["contexts"][1]["gain"] == 0 and list(found["contexts"][1]["gain_interval"]) == [0, 0]
