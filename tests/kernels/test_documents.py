"""Packed documents that do not end where a piece or a rank's slice does."""

import re
from bisect import bisect_right
from itertools import pairwise

import pytest
import torch
from lcpt_kernels import flurka_attention, squared_attention

from tests.kernels.conftest import relative_error
from tests.kernels.test_exchange import Ranks
from tests.kernels.test_streaming import FAMILIES, OFFSET, SUMMARIES, C, R, flurka, squared, with_gradients

TOKENS = 11 * C + 1
DOCUMENTS = [  # where they end; with cuts at 25, 38, 53 and others below
    [TOKENS],  # no border at all
    [25, TOKENS],  # at a cut
    [5, 18, 19, 24, 39, 41, 60, TOKENS],  # several in a slice, one token alone, just before and after cuts
    [26, 37, 53, TOKENS],
    [2 * C, 4 * C, 11 * C, TOKENS],  # whole blocks only
    [7, 46, TOKENS],  # one over several slices
]
CUTS = [[38], [25, 53], [13, 25, 38], [12, 24, 53]]


def lengths(ends):
    return [stop - start for start, stop in pairwise([0, *ends])]


def cut(arguments, ends, start, stop):
    """Tokens start … stop, the summaries of the blocks that they complete and their documents' borders."""
    starts = [0, *ends]
    blocks = [n for i, j in pairwise(starts) for n in range(i + C, j + 1, C)]
    rows = slice(R * bisect_right(blocks, start), R * bisect_right(blocks, stop))
    part = {name: x[:, rows] if name in SUMMARIES else x[:, start:stop] for name, x in arguments.items()}
    inside = [end - start for end in starts if start <= end < stop and end > 0]
    borders = [0, *inside, stop - start, stop - start]  # the last one is repeated, as data pads it
    return part | {"cu_seqlens": torch.tensor(borders)}


def tokens_before(ends, start):
    """Return how many tokens before `start` are of the document that token `start` is of."""
    starts = [0, *ends]
    return start - starts[bisect_right(starts, start) - 1]


class RanksOfDocuments(Ranks):
    def __init__(self, starts, ends):
        super().__init__(starts)
        self.ends = ends

    @property
    def start(self):
        return tokens_before(self.ends, self.starts[self.rank])


def in_pieces(function, leaves, ends, borders, options):
    outputs, state = [], None
    for start, stop in pairwise(borders):
        o, state = function(**cut(leaves, ends, start, stop), initial_state=state, output_final_state=True, **options)
        outputs.append(o)
    return torch.cat(outputs, dim=1)


def on_ranks(function, leaves, ends, borders, options):
    """Ranks share the tokens up to the last border but one; a call goes on from the last rank's state."""
    *slices, rest = pairwise(borders)
    ranks, outputs, state = RanksOfDocuments([start for start, _ in slices], ends), [], None
    for ranks.rank, (start, stop) in enumerate(slices):
        o, state = function(**cut(leaves, ends, start, stop), exchange=ranks, output_final_state=True, **options)
        outputs.append(o)
    outputs.append(function(**cut(leaves, ends, *rest), initial_state=state, **options)[0])
    return torch.cat(outputs, dim=1)


def given(inputs, ends, shape, **sizes):
    return inputs(TOKENS, b=1, **shape, **sizes, **({"lengths": lengths(ends)} if inputs is flurka else {}))


def check(run, function, arguments, ends, borders, options, tolerance=1e-12):
    options = {"block_size": C, **OFFSET, **options} | ({"summaries": R} if "phi_summary" in arguments else {})
    whole = {"cu_seqlens": torch.tensor([0, *ends]), **options, "backend": "reference"}
    expected = with_gradients(arguments, lambda leaves: function(**leaves, **whole)[0])
    found = with_gradients(arguments, lambda leaves: run(function, leaves, ends, borders, options))
    errors = {name: relative_error(found[name], x) for name, x in expected.items()}
    assert all(error <= tolerance for error in errors.values()), errors


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
@pytest.mark.parametrize("local_blocks, gated", [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("ends", DOCUMENTS, ids=str)
def test_ranks_make_the_whole(function, inputs, shape, local_blocks, gated, cuts, ends):
    """Output and every gradient equal the definition of one rank, also behind the last rank."""
    arguments = given(inputs, ends, shape, gated=gated)
    check(on_ranks, function, arguments, ends, [0, *cuts, TOKENS - 2, TOKENS], {"local_blocks": local_blocks})


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
@pytest.mark.parametrize("local_blocks, gated", [(1, False), (2, True)])
@pytest.mark.parametrize("cuts", [[1], [25], [24, 26, 27], [5, 19, 41, 60]], ids=str)
@pytest.mark.parametrize("ends", DOCUMENTS, ids=str)
def test_pieces_make_the_whole(function, inputs, shape, local_blocks, gated, cuts, ends):
    """Pieces may be shorter than a block."""
    arguments = given(inputs, ends, shape, gated=gated)
    check(in_pieces, function, arguments, ends, [0, *cuts, TOKENS], {"local_blocks": local_blocks})


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
def test_nothing_crosses_a_border(function, inputs, shape):
    """A rank whose slice begins with a document drops what the rank before passes on, NaN too."""
    ends, borders = [25, 41, TOKENS], [0, 25, 53, TOKENS - 2, TOKENS]
    arguments = given(inputs, ends, shape)
    options = {"block_size": C, **OFFSET} | ({"summaries": R} if inputs is flurka else {})
    expected = on_ranks(function, arguments, ends, borders, options)
    poisoned = {name: x.clone() for name, x in arguments.items()}
    for name, x in poisoned.items():
        x[:, : 25 // C * R if name in SUMMARIES else 25] = torch.nan
    found = on_ranks(function, poisoned, ends, borders, options)
    assert found[:, :25].isnan().any() and torch.equal(found[:, 25:53], expected[:, 25:53])


def test_a_rank_passes_on_only_its_last_documents_state():
    ends, starts = [25, 41, TOKENS], [0, 13, 25, 53]
    ranks, leaves = RanksOfDocuments(starts, ends), given(squared, ends, {})
    for ranks.rank, (start, stop) in enumerate(pairwise([*starts, TOKENS])):
        squared_attention(**cut(leaves, ends, start, stop), exchange=ranks, block_size=C)
    kept = [log_decay.isfinite().all().item() for _, log_decay in ranks.states]
    assert kept == [False, True, False, True]  # the first and the third document begin with a slice, the second in one


def test_summaries_are_given_where_ranks_may_complete_no_block():
    arguments = cut(flurka(2 * C, b=1), [2 * C], 0, 2 * C)
    with pytest.raises(ValueError, match=re.escape("packed documents on several ranks need summaries")):
        flurka_attention(**arguments, exchange=Ranks([0]), block_size=C)
