"""How a row is cut into queries of equal work, what is exchanged for it, and in which order its backward pass runs."""

import itertools
from bisect import bisect_right

import pytest
import torch
import torch._dynamo  # before ranks are forked: each would import it at its first collective
from torch.utils._python_dispatch import TorchDispatchMode

from lcpt.attention import AttentionConfig
from lcpt.attention.base import Projected
from lcpt.attention.resplit import Resplit
from lcpt.attention.softmax import SoftmaxConfig
from lcpt.attention.sparse import SparseHashConfig, SparseQKConfig
from lcpt.model import GPT, ModelConfig
from lcpt.parallel import groups
from lcpt.parallel.sequence import SequenceGroup, join_sequence_group

H, HKV, D = 4, 2, 6
BORDERS = {8: (0, 3, 8), 40: (0, 1, 2, 11, 12, 31, 40), 42: (0, 21, 42)}


def pieces_of_ranks(ranks, tokens, borders=None):
    parts = (SequenceGroup(size=ranks, rank=rank).slice(tokens * ranks, borders) for rank in range(ranks))
    return [Resplit(part, torch.zeros(1)).pieces for part in parts]


def pairs(piece):
    """Queries with the keys that they see, of one document."""
    return sum(t + 1 - piece.document for t in range(piece.start, piece.stop))


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
@pytest.mark.parametrize("tokens", [1, 2, 9, 16])
def test_ranks_have_equal_work(ranks, tokens):
    """The same pairs on all ranks; where slices are odd, apart by less than the keys of one query."""
    work = [sum(map(pairs, pieces)) for pieces in pieces_of_ranks(ranks, tokens)]
    assert sum(work) == tokens * ranks * (tokens * ranks + 1) / 2
    assert max(work) - min(work) < (tokens * ranks if tokens % 2 else 1)


@pytest.mark.parametrize("ranks, row", [(2, 8), (4, 40), (2, 40), (3, 42), (2, 42)])
def test_every_query_sees_its_document_up_to_itself(ranks, row):
    borders, seen = BORDERS[row], {}
    for piece in itertools.chain(*pieces_of_ranks(ranks, row // ranks, borders)):
        assert piece.keys == slice(piece.document, piece.stop)
        if piece.borders is not None:  # attended to as documents alone
            assert piece.document == piece.start
            assert piece.cu_seqlens(torch.device("cpu")).tolist() == [x - piece.start for x in piece.borders]
        for t in range(piece.start, piece.stop):
            assert t not in seen
            starts = piece.borders or (piece.document,)
            seen[t] = starts[bisect_right(starts, t) - 1]
    assert seen == {t: borders[bisect_right(borders, t) - 1] for t in range(row)}


class Collectives(TorchDispatchMode):
    """Notes the elements that each collective is given."""

    def __init__(self):
        super().__init__()
        self.given = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "lcpt":
            self.given.append((function._schema.name.split("::")[1], args[0].numel()))
        return function(*args, **(kwargs or {}))


def exchanged(window, tokens):
    groups.join("cpu")
    config = AttentionConfig("softmax", softmax=SoftmaxConfig(window))
    module = config.attention_of_layer(0)(H * D, H, HKV, config)
    part = join_sequence_group(groups.world_size()).slice(tokens * groups.world_size())
    q, k, v = (torch.randn(2, tokens, heads, D, requires_grad=True) for heads in (H, HKV, HKV))
    with Collectives() as forwards:
        o = module.attend_between_ranks(Projected(q, k, v), part)
    with Collectives() as backwards:
        o.sum().backward()
    groups.leave()
    return forwards.given, backwards.given


@pytest.mark.parametrize("tokens", [10, 11])
def test_what_is_exchanged(run_ranks, tokens):
    """Queries and outputs once, keys and values to all."""
    queries, keys = 2 * tokens * H * D, 2 * 2 * tokens * HKV * D
    for forwards, backwards in run_ranks(lambda: exchanged(None, tokens), 2):
        assert forwards == [("all_to_all", queries), ("all_gather", keys), ("all_to_all", queries)]
        assert backwards == [("all_to_all", queries), ("all_to_all", 2 * keys), ("all_to_all", queries)]


@pytest.mark.parametrize("window", [1, 6, 11])
def test_a_window_within_a_slice_exchanges_itself_alone(run_ranks, window):
    last = 2 * 2 * (window - 1) * HKV * D
    for rank, (forwards, _) in enumerate(run_ranks(lambda: exchanged(window, 10), 2)):
        assert forwards == ([("all_to_all", 1 + (0 if rank else last))] if window > 1 else [])


def largest_on_ranks(attention, largest_tensor):
    """At two lengths of a slice, in bytes."""
    groups.join("cpu")
    module, sizes = attention.attention_of_layer(0)(H * D, H, HKV, attention), []
    group = join_sequence_group(groups.world_size())
    for tokens in (1024, 2048):
        x = torch.randn(1, tokens, H * D, requires_grad=True)
        with largest_tensor() as largest:
            module(x, None, part=group.slice(tokens * group.size)).sum().backward()
        sizes.append(largest.n_bytes)
    groups.leave()
    return sizes


@pytest.mark.parametrize("kind", ["softmax", "polynomial", "sparse_qk", "lowrank"])
def test_memory_is_linear_in_the_row(run_ranks, largest_tensor, kind):
    attention = AttentionConfig(kind, block_size=64)
    for short, long in run_ranks(lambda: largest_on_ranks(attention, largest_tensor), 2):
        assert long < 2.2 * short


ORDERED = {
    "softmax": AttentionConfig("softmax"),
    "lowrank": AttentionConfig("lowrank", block_size=4),
    "lowrank, no block is whole": AttentionConfig("lowrank", block_size=20),
    "learned": AttentionConfig("sparse_qk", sparse_qk=SparseQKConfig("learned")),
    "learned hash": AttentionConfig("sparse_hash", sparse_hash=SparseHashConfig("learned", 4)),
}


def depths(loss):
    """For each node of the graph that has a collective in backward: how many others come after it in backward."""
    nodes, order = {}, []

    def inputs(node):
        return [x for x, _ in node.next_functions if x is not None]

    waiting = [(loss.grad_fn, iter(inputs(loss.grad_fn)))]
    nodes[loss.grad_fn] = None
    while waiting:
        node, rest = waiting[-1]
        following = next((x for x in rest if x not in nodes), None)
        if following is None:
            order.append(waiting.pop()[0])
        else:
            nodes[following] = None
            waiting.append((following, iter(inputs(following))))
    below = {}
    for node in order:
        below[node] = set().union(*(below[x] | ({x} if is_collective(x) else set()) for x in inputs(node)))
    return sorted(len(below[node]) for node in order if is_collective(node))


def is_collective(node):
    return any(name in node.name() for name in ("all_gather", "all_to_all", "AuxLossGradient"))


def order_of(attention):
    groups.join("cpu")
    config = ModelConfig(n_layers=2, d_model=32, n_heads=H, n_kv_heads=HKV, vocab_size=61, attention=attention)
    part = join_sequence_group(groups.world_size()).slice(24, (0, 5, 24))
    tokens = torch.randint(61, (1, 12))
    loss, _ = GPT(config)(tokens, tokens, torch.tensor(part.local_borders), part)
    groups.leave()
    return depths(loss)


@pytest.mark.parametrize("form", ORDERED)
def test_backward_has_one_order(run_ranks, form):
    """Every collective waits for all that come before it, whatever documents a rank has."""
    found = run_ranks(lambda: order_of(ORDERED[form]), 2)
    assert found[0] == found[1] == list(range(len(found[0]))) and len(found[0]) >= 8
