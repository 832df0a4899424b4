"""Pieces of documents go into bins whole where they can; none is lost, and none comes twice."""

import numpy as np
import pytest

from lcpt.data.best_fit import cut_documents
from lcpt.data.packing import Parts, best_fit_decreasing

SIZE = 64


def pieces_of(lengths):
    lengths = np.asarray(lengths, dtype=np.int64)
    return Parts(np.cumsum(lengths) - lengths, lengths, np.zeros(len(lengths), dtype=bool))


def best_fit_one_by_one(lengths, bins, size):
    """The definition: each piece in turn into the bin with the least room that takes it; -1 where there is none."""
    room, found = [size] * bins, np.empty(len(lengths), dtype=int)
    for n in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        fitting = [(left, i) for i, left in enumerate(room) if left >= lengths[n]]
        found[n] = min(fitting)[1] if fitting else -1
        if fitting:
            room[found[n]] -= lengths[n]
    return found, room


@pytest.mark.parametrize("seed", range(40))
def test_packing_is_best_fit_decreasing(seed):
    """The rooms left are those of the definition, and as many pieces of each length find no room."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, draw.choice([4, 20, SIZE + 1]), size=draw.integers(1, 300))
    bins = -(-lengths.sum() // SIZE) + seed % 2
    packing = best_fit_decreasing(pieces_of(lengths), bins, SIZE)
    where, room = best_fit_one_by_one(lengths, bins, SIZE)
    assert packing.cut == (where < 0).sum()
    assert len(packing.borders) == bins + 1
    filled = [packing.bin(n).lengths.sum() for n in range(bins)]
    assert max(filled) <= SIZE and sum(filled) == lengths.sum()
    if not packing.cut:
        assert sorted(SIZE - np.array(filled)) == sorted(room)


@pytest.mark.parametrize("lengths", [[40] * 30, [33] * 5, [64] * 4, [1] * 130, [63, 63, 2], [50, 30, 30, 30, 20, 16]])
def test_every_token_lies_in_one_place(lengths):
    pieces = pieces_of(lengths)
    packing = best_fit_decreasing(pieces, -(-sum(lengths) // SIZE), SIZE)
    tokens = np.concatenate([np.arange(s, s + n) for s, n, _ in zip(*packing.parts, strict=True)])
    np.testing.assert_array_equal(np.sort(tokens), np.arange(sum(lengths)))
    ends = np.cumsum(lengths)
    for start, length, continues in zip(*packing.parts, strict=True):
        assert continues == (start + length not in ends)  # no piece here was one of a longer document
    found = set(zip(packing.parts.starts, packing.parts.lengths, strict=True))
    assert len(set(zip(*pieces[:2], strict=True)) - found) == packing.cut


def test_only_what_finds_no_room_is_cut():
    """Forty of 0.6 bins in 25 bins: a bin takes one whole, and the others are cut to fill what is left."""
    packing = best_fit_decreasing(pieces_of([60] * 40), 25, 100)
    assert packing.cut == 15 and len(packing.parts.starts) <= 25 + 15 + 23
    assert [packing.bin(n).lengths.sum() for n in range(25)].count(100) == 22


def test_more_tokens_than_room_are_refused():
    with pytest.raises(ValueError, match="65 tokens do not go into 1 bins of 64"):
        best_fit_decreasing(pieces_of([60, 5]), 1, SIZE)


@pytest.mark.parametrize("short_first", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_pieces_of_all_regions_are_the_stream(seed, short_first):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, draw.choice([10, 200, 2000]), size=50)
    context, ends = 64, np.cumsum(lengths)
    borders = np.unique([0, *draw.integers(0, ends[-1], size=9), ends[-1]])
    found = []
    for begin, end in zip(borders[:-1], borders[1:], strict=True):
        seen = (ends > begin) & (ends - lengths < end)
        pieces = cut_documents((ends - lengths)[seen], ends[seen], begin, end, context, short_first)
        assert ((pieces.starts >= begin) & (pieces.starts < end)).all()
        found += zip(*(each.tolist() for each in pieces), strict=True)
    expected = []
    for start, length in zip(ends - lengths, lengths, strict=True):
        counts = [context] * (length // context) + ([length % context] if length % context else [])
        for n in counts[::-1] if short_first else counts:
            expected.append((start, n, start + n not in ends))
            start += n
    assert found == expected
