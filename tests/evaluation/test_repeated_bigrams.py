"""Repeated bigrams: by hand, against a search of every pair of places, and under every cut of a document."""

import math
import tracemalloc

import numpy as np
import pytest

from lcpt.evaluation.positions import position_edges
from lcpt.evaluation.repeated_bigrams import RepeatedBigrams
from lcpt.evaluation.windows import Window, windows

LENGTHS = (90, 5, 1, 70)


def texts(alphabet, seed=0):
    """Documents; each has a few tokens of its own, so that some bigrams stand in one document only."""
    rng = np.random.default_rng(seed)
    own = 100 * np.arange(len(LENGTHS))
    return [
        rng.integers(alphabet, size=n + 1) + rng.choice([0, more], p=[0.7, 0.3], size=n + 1)
        for n, more in zip(LENGTHS, own, strict=True)
    ]


def cut(documents, context, stride):
    return [w for number, tokens in enumerate(documents) for w in windows(number, tokens, context, stride)]


def with_losses(chosen):
    """(window, losses): a token's loss depends on its place in the text and in its window, 0 where it is context."""
    rng = np.random.default_rng(1)
    return [(w, (rng.random(len(w.labels)) * (w.labels >= 0)).astype(np.float32)) for w in chosen]


def report(scored):
    bigrams = RepeatedBigrams()
    for window, losses in scored:
        bigrams.add(window, losses)
    return bigrams.report()


def search(scored, context):
    """The report, from every pair of places of every window."""
    pairs_of, rows = {}, []
    for window, losses in scored:
        x, y = window.inputs.tolist(), window.labels.tolist()
        for t, label in enumerate(y):
            if label >= 0:
                pairs_of.setdefault(window.document, set()).add((x[t], label))
                places = [s for s in range(t) if (x[s], x[s + 1]) == (x[t], label)]
                distance = t - (places[-1] + 1) if places else None
                rows.append((window.document, (x[t], label), distance, float(losses[t])))
    again = [row for row in rows if row[2] is not None]
    rare = [row for row in again if sum(row[1] in pairs for pairs in pairs_of.values()) == 1]
    others = [row[3] for row in rows if row[2] is None]
    expected = by_search(again, context) | {"other_tokens": len(others), "other_loss": mean(others)}
    return expected | {"rare": by_search(rare, context) if len(pairs_of) > 1 else None}


def by_search(rows, context):
    bins, edges = [], position_edges(context)
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        inside = [row[3] for row in rows if start <= row[2] < end]
        if inside:
            bins.append({"start": start, "end": end, "tokens": len(inside), "loss": mean(inside)})
    return {"tokens": len(rows), "loss": mean([row[3] for row in rows]), "by_distance": bins}


def mean(values):
    return sum(values) / len(values) if values else None


def flat(part, name=""):
    """A report as {path: number}, which pytest.approx can compare; None is -1."""
    if isinstance(part, dict | list):
        items = part.items() if isinstance(part, dict) else enumerate(part)
        return {path: x for key, value in items for path, x in flat(value, f"{name}/{key}").items()}
    return {name: -1 if part is None else part}


def assert_alike(found, expected):
    assert flat(found) == pytest.approx(flat(expected), rel=1e-6)


def test_by_hand():
    """0 1 2 0 1 1 1: the pair 0 1 comes back after two tokens, 1 1 at once; the last label is 1 again."""
    found = report([(Window(0, np.array([0, 1, 2, 0, 1, 1]), np.array([1, 2, 0, 1, 1, 1])), np.arange(6.0))])
    assert found["by_distance"] == [
        {"start": 0, "end": 1, "tokens": 1, "loss": 5.0},  # the question is the earlier answer
        {"start": 2, "end": 3, "tokens": 1, "loss": 3.0},
    ]
    assert (found["tokens"], found["loss"]) == (2, 4.0)
    assert (found["other_tokens"], found["other_loss"]) == (4, (0 + 1 + 2 + 4) / 4)
    assert found["rare"] is None  # of one document


def test_the_latest_place_counts():
    """5 6 stands at 0, 4 and 7: the distances are 3 and 2, not 6."""
    tokens = np.array([5, 6, 1, 2, 5, 6, 3, 5, 6])
    found = report([(Window(0, tokens[:-1], tokens[1:]), np.ones(8))])
    assert [(part["start"], part["tokens"]) for part in found["by_distance"]] == [(2, 1), (3, 1)]


def test_rare_ones_stand_in_one_document_by_hand():
    """Both documents hold 1 2; only the first holds 3 4. Documents may come in any order."""
    first, second = np.array([1, 2, 3, 4, 1, 2, 3, 4]), np.array([1, 2, 1, 2])
    for numbers in ((0, 1), (1, 0)):
        scored = [
            (Window(number, tokens[:-1], tokens[1:]), np.arange(len(tokens) - 1.0))
            for number, tokens in zip(numbers, (first, second), strict=True)
        ]
        found = report(scored)
        assert (found["tokens"], found["loss"]) == (4, (4 + 5 + 6 + 2) / 4)
        assert (found["rare"]["tokens"], found["rare"]["loss"]) == (2, (5 + 6) / 2)  # 2 3 and 3 4
        assert found["rare"]["by_distance"] == [{"start": 3, "end": 4, "tokens": 2, "loss": 5.5}]


@pytest.mark.parametrize("alphabet", [2, 6, 30])
@pytest.mark.parametrize("context, stride", [(100, 100), (24, 24), (24, 7), (10, 1), (1, 1)])
def test_equal_to_a_search_of_every_pair(alphabet, context, stride):
    """With stride < context, what is context only counts as seen, and is not scored twice."""
    scored = with_losses(cut(texts(alphabet), context, stride))
    found = report(scored)
    assert_alike(found, search(scored, context))
    assert found["tokens"] + found["other_tokens"] == sum(LENGTHS)
    assert sum(part["tokens"] for part in found["by_distance"]) == found["tokens"]
    if context > 10 and alphabet < 30:
        assert 0 < found["rare"]["tokens"] < found["tokens"]


def test_a_model_that_knows_nothing_scores_ln_v_everywhere():
    chosen = cut(texts(6), 30, 10)
    found = report([(w, np.where(w.labels >= 0, np.float32(math.log(50)), 0)) for w in chosen])
    parts = [found, found["rare"], *found["by_distance"], *found["rare"]["by_distance"]]
    losses = [part["loss"] for part in parts] + [found["other_loss"]]
    assert len(losses) > 10 and losses == pytest.approx([math.log(50)] * len(losses), rel=1e-6)


def test_nothing_repeated_and_nothing_else():
    new = report(with_losses(cut([np.arange(20), np.arange(50, 60)], 8, 8)))
    empty = {"tokens": 0, "loss": None, "by_distance": []}
    assert new == empty | {"rare": empty, "other_tokens": 28, "other_loss": new["other_loss"]}
    inputs, labels = np.zeros(6, dtype=int), np.array([-1, 0, 0, 0, 0, 0])  # the first 0 0 is context
    found = report([(Window(0, inputs, labels), np.ones(6))])
    assert (found["tokens"], found["loss"], found["other_tokens"], found["other_loss"]) == (5, 1.0, 0, None)


def test_tokens_of_any_width_do_not_collide():
    """Bigrams (1, 0) and (0, 2^16 or 2^31 - 1) are unlike, and narrow types do not overflow."""
    tokens = np.array([1, 0, 2**31 - 1, 0, 2**16, 1, 0, 1])
    found = report([(Window(0, tokens[:-1].astype(np.uint32), tokens[1:]), np.ones(7))])
    assert found["tokens"] == 1 and found["by_distance"][0]["start"] == 4
    narrow = np.array([300, 301, 5, 300], dtype=np.uint16)
    assert report([(Window(0, narrow, np.array([301, 5, 300, 301])), np.ones(4))])["tokens"] == 1


def test_a_report_may_be_asked_for_again():
    bigrams = RepeatedBigrams()
    for window, losses in with_losses(cut(texts(6), 10, 10)):
        bigrams.add(window, losses)
    assert bigrams.report() == bigrams.report()


def test_memory_is_linear_in_a_long_window():
    n = 1_000_000
    tokens = np.random.default_rng(0).integers(2000, size=n + 1)
    window, losses = Window(0, tokens[:-1], tokens[1:]), np.ones(n, dtype=np.float32)
    tracemalloc.start()
    found = report([(window, losses), (window._replace(document=1), losses)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["tokens"] > 1000 and peak < 120 * 2 * n
