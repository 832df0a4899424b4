"""Paired differences of losses, by hand and in simulation."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from lcpt.data import DataError
from lcpt.evaluation.paired import DRAWS, by_sign_flips, mean_of_runs, paired_difference


def scored(*losses, tokens=100, n_bytes=400):
    return [{"id": f"d{n}", "tokens": tokens, "bytes": n_bytes, "nats": tokens * x} for n, x in enumerate(losses)]


def test_by_hand():
    """What is hard for both, 1, 5 and 9, cancels: -0.1 of every document for one seed, -0.3 for the other."""
    first = {0: scored(0.9, 4.9, 8.9), 1: scored(0.7, 4.7, 8.7)}
    second = dict.fromkeys((0, 1), scored(1.0, 5.0, 9.0))
    found = paired_difference(first, second, per="tokens")
    assert found.mean == pytest.approx(-0.2) and found.interval == pytest.approx((-0.2, -0.2))
    assert found.documents == 3 and found.p == 2 / 2**3
    assert found.of_seeds == pytest.approx((-0.1, -0.3)) and found.over_seeds == pytest.approx((-0.2, 0.02**0.5))
    in_bits = paired_difference(first, second)
    assert in_bits.mean == pytest.approx(-0.2 * 100 / 400 / math.log(2)) and in_bits.p == found.p


def test_seeds_are_averaged_and_those_in_common_pair():
    first, second = {5: scored(2.0), 7: scored(4.0)}, {7: scored(1.0), 6: scored(3.0), 5: scored(8.0)}
    found = paired_difference(first, second, per="tokens")
    assert found.mean == pytest.approx(3 - 4) and found.of_seeds == pytest.approx((2 - 8, 4 - 1))
    alone = paired_difference({0: scored(2.0)}, {1: scored(1.0)}, per="tokens")
    assert alone.mean == pytest.approx(1.0) and alone.of_seeds == () and alone.over_seeds is None


def test_documents_count_by_their_tokens():
    first = scored(1.0, tokens=300) + [{**scored(2.0)[0], "id": "x"}]
    second = [{**scored(1.0)[0], "id": "x"}, *scored(1.0, tokens=300)]  # in another order
    assert paired_difference({0: first}, {0: second}, per="tokens").mean == pytest.approx(0.25)
    empty = {"id": "empty", "tokens": 0, "bytes": 0, "nats": 0.0}
    assert paired_difference({0: [*first, empty]}, {0: [*second, empty]}, per="tokens").documents == 2


def test_p_counts_the_flips_that_differ_as_much():
    """Against every choice of signs, one by one."""
    amounts, sizes = np.array([3.0, -1.0, 4.0, 1.5, 5.0, -0.5, 2.0]), np.array([1.0, 2.0, 1.0, 4.0, 1.0, 1.0, 3.0])
    flipped = [np.dot(signs, amounts) for signs in itertools.product((1, -1), repeat=7)]
    expected = np.mean(np.abs(flipped) >= amounts.sum())
    interval, p = by_sign_flips(amounts, sizes)
    assert p == expected == by_sign_flips(-amounts, sizes)[1]
    for end, inside in zip(interval, (1e-6, -1e-6), strict=True):  # just inside is not rejected, just outside is
        assert by_sign_flips(amounts - (end + inside) * sizes, sizes)[1] > 0.05
        assert by_sign_flips(amounts - (end - inside) * sizes, sizes)[1] <= 0.05


def test_no_difference_is_no_evidence():
    found = paired_difference({0: scored(*range(20))}, {0: scored(*range(20))})
    assert (found.mean, found.interval, found.p) == (0.0, (0.0, 0.0), 1.0)
    assert by_sign_flips(np.ones(20), np.ones(20))[1] == 2 / (DRAWS + 1)


def test_few_documents_have_students_interval_and_no_small_p():
    found = paired_difference({0: scored(2.0, 3.0)}, {0: scored(0.0, 0.0)}, per="tokens")
    assert found.interval == pytest.approx((2.5 - 12.706 * 0.5, 2.5 + 12.706 * 0.5)) and found.p == 0.5
    found = paired_difference({0: scored(2.0)}, {0: scored(0.0)}, per="tokens")
    assert (found.mean, found.interval, found.p) == (2.0, None, 1.0)


@pytest.mark.parametrize("unlike", [0.4, 1.2], ids=["books", "very unlike lengths"])
@pytest.mark.parametrize("count", [10, 40])
def test_p_and_interval_are_as_sure_as_they_say(count, unlike):
    """Of settings that are equally good, p is below 0.05 in 3 to 7 % of trials, and else the interval holds 0."""
    rng, trials, small, covered = np.random.default_rng(0), 600, 0, 0
    for _ in range(trials):
        sizes = np.exp(rng.normal(0, unlike, count))
        interval, p = by_sign_flips(sizes * rng.normal(size=count), sizes)
        small += p < 0.05
        covered += interval[0] <= 0 <= interval[1]
    assert 0.03 <= small / trials <= 0.07
    assert 0.93 <= covered / trials <= 0.97


def test_a_difference_is_found():
    rng = np.random.default_rng(0)
    hard = 5 + rng.normal(size=12)
    first, second = (
        {seed: scored(*(hard + more + 0.02 * rng.normal(size=12))) for seed in range(3)} for more in (0.0, 0.05)
    )
    found = paired_difference(first, second, per="tokens")
    assert found.interval[0] < -0.05 < found.interval[1] < 0 and found.p < 0.001
    assert found.over_seeds[0] == pytest.approx(found.mean)


@pytest.mark.parametrize(
    "other, message",
    [
        (scored(1.0, n_bytes=99), "'d0' has 400 bytes in one, 99 in another"),
        (scored(1.0, 1.0), "1 of 2 in one alone, such as 'd1'"),
        ([*scored(1.0), *scored(1.0)], "an id stands for several"),
        ([], "scored no document"),
    ],
)
def test_different_documents_are_refused(other, message):
    with pytest.raises(DataError, match=message):
        paired_difference({0: scored(1.0)}, {0: other})
    with pytest.raises(DataError, match=message):
        mean_of_runs([scored(1.0), other])


def test_runs_of_a_seed_are_averaged():
    first, second = scored(1.0, 3.0), scored(2.0, 5.0)[::-1]
    assert [row["nats"] for row in mean_of_runs([first, second])] == [150, 400]


def test_memory_does_not_grow_with_the_draws():
    """Twenty thousand documents, 9,999 times: at once they would be 1.6 GB."""
    rng = np.random.default_rng(0)
    tracemalloc.start()
    interval, _ = by_sign_flips(rng.normal(size=20_000), np.ones(20_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert interval[0] < interval[1] and peak < 60e6
