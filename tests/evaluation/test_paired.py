"""Paired differences of losses, by hand and in simulation."""

import numpy as np
import pytest

from lcpt.evaluation.paired import paired_difference


def scored(*losses, tokens=100):
    return [{"id": f"d{n}", "tokens": tokens, "bytes": 1, "nats": tokens * x} for n, x in enumerate(losses)]


def test_by_hand():
    """Documents of hardness 1, 5 and 9: the difference of the means is -0.1 and -0.3, and its interval lies between."""
    first = [scored(0.9, 4.9, 8.9), scored(0.7, 4.7, 8.7)]
    found = paired_difference(first, 2 * [scored(1.0, 5.0, 9.0)])
    assert found.loss == pytest.approx(-0.2)
    assert found.low == pytest.approx(-0.3) and found.high == pytest.approx(-0.1)


def test_documents_count_by_their_tokens():
    first = [scored(1.0, tokens=300) + [{**scored(2.0)[0], "id": "x"}]]
    second = [scored(1.0, tokens=300) + [{**scored(1.0)[0], "id": "x"}]]
    assert paired_difference(first, second).loss == pytest.approx(0.25)


def test_the_interval_covers_the_truth():
    """Documents and seeds move both models together; only what is left decides, in 90 to 99 % of simulations."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        hard = 5 + rng.normal(size=12)
        first, second = (
            [scored(*(hard + gain + 0.02 * rng.normal(size=12))) for _ in range(6)] for gain in (0.0, 0.05)
        )
        found = paired_difference(first, second)
        covered += found.low < -0.05 < found.high
    assert 180 <= covered <= 199


def test_different_documents_are_refused():
    with pytest.raises(ValueError, match="different documents"):
        paired_difference([scored(1.0)], [scored(1.0, tokens=99)])
    with pytest.raises(ValueError, match="not as many"):
        paired_difference([scored(1.0)], [scored(1.0), scored(1.0)])
