import itertools

import numpy as np
import pytest

from lcpt.evaluation.windows import TextBytes, text_bytes, windows

CASES = [
    (n, context, stride)
    for n, context in itertools.product((1, 2, 5, 7, 8, 9, 16, 17, 40), (1, 4, 8, 64))
    for stride in (1, 3, context // 2, context)
    if 1 <= stride <= context
]


@pytest.mark.parametrize("n, context, stride", CASES)
def test_every_token_but_bos_is_scored_once(n, context, stride):
    """n labels; each scored one can look back on context - stride tokens at least, or on all that there are."""
    tokens = np.arange(100, 101 + n)
    scored = []
    for window in windows(7, tokens, context, stride):
        assert window.document == 7
        assert len(window.inputs) == len(window.labels) <= context
        for position, (token, label) in enumerate(zip(window.inputs, window.labels, strict=True)):
            if label >= 0:
                assert label == token + 1  # the token that follows
                behind = token - 100
                assert position >= min(context - stride, behind)
                scored.append(label)
    assert scored == list(range(101, 101 + n))


def test_no_window_without_a_score():
    for n, context, stride in CASES:
        assert all((w.labels >= 0).any() for w in windows(0, np.arange(n + 1), context, stride))


def test_a_document_of_bos_alone_has_no_window():
    assert list(windows(0, np.array([1]), 8, 8)) == []


def test_disjoint_windows_cover_the_document():
    found = [(w.inputs.tolist(), w.labels.tolist()) for w in windows(0, np.arange(8), 3, 3)]
    assert found == [([0, 1, 2], [1, 2, 3]), ([3, 4, 5], [4, 5, 6]), ([6], [7])]


def test_overlapping_windows_score_each_token_once():
    found = [(w.inputs.tolist(), w.labels.tolist()) for w in windows(0, np.arange(8), 4, 2)]
    assert found == [([0, 1, 2, 3], [1, 2, 3, 4]), ([2, 3, 4, 5], [-1, -1, 5, 6]), ([4, 5, 6], [-1, -1, 7])]


@pytest.mark.parametrize("n, context, stride", CASES)
def test_a_full_last_window_scores_the_same_tokens(n, context, stride):
    """Only the last differs: it is as long as the context, or as the document, and what was scored is its context."""
    tokens = np.arange(100, 101 + n)
    short, full = (list(windows(0, tokens, context, stride, full_last=which)) for which in (False, True))
    for one, other in zip(short, full, strict=True):
        assert np.array_equal(one.labels[one.labels >= 0], other.labels[other.labels >= 0])
        assert np.array_equal(other.inputs[other.labels >= 0] + 1, other.labels[other.labels >= 0])
        assert len(other.inputs) == min(n, context)
    assert all(np.array_equal(a.inputs, b.inputs) for a, b in zip(short[:-1], full[:-1], strict=True))


def test_the_document_is_not_changed():
    tokens = np.arange(20)
    list(windows(0, tokens, 4, 2))
    assert np.array_equal(tokens, np.arange(20))


TOKEN_BYTES = np.array([0, 1, 2, 4])


@pytest.mark.parametrize(
    "tokens, n_bytes, shares",
    [
        ([1, 3, 2], 7, [1, 4, 2]),  # exact
        ([1, 3, 2], 70, [10, 40, 20]),
        ([2, 2, 2, 1], 10, [20 / 7, 20 / 7, 20 / 7, 10 / 7]),
        ([0, 1], 3, [0, 3]),
        ([0, 0], 6, [3, 3]),  # pieces that decode to nothing
        ([], 6, []),
    ],
)
def test_bytes_of_a_text_are_shared_among_its_tokens(tokens, n_bytes, shares):
    tokens = np.array(tokens, dtype=np.int64)
    for pieces in ([tokens], np.array_split(tokens, 2)):
        text = text_bytes(pieces, n_bytes, TOKEN_BYTES)
        assert [text.of(tokens[i : i + 1]) for i in range(len(tokens))] == pytest.approx(shares)


@pytest.mark.parametrize("n, context, stride", CASES)
def test_windows_hold_the_bytes_of_their_scored_tokens(n, context, stride):
    text = TextBytes(np.arange(n + 1), 2.0)
    for window in windows(0, np.arange(n + 1), context, stride, text):
        assert window.bytes == 2 * window.labels[window.labels >= 0].sum()  # token t decodes to t bytes
