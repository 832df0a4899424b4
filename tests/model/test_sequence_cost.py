"""What ranks that share a sequence send each other: counted on gloo ranks, and predicted."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from lcpt.attention.base import rotary_table
from lcpt.attention.polysketch import PolysketchConfig
from lcpt.attention.softmax import SoftmaxConfig
from lcpt.attention.sparse import SparseHashConfig, SparseQKConfig
from lcpt.attention.summaries import SummariesConfig
from lcpt.model import GPT
from lcpt.model.gpt import Block
from lcpt.model.sequence_cost import ExchangedBytes, Slices, exchange, layers_by_kind, sent_by_rank
from lcpt.parallel import groups
from lcpt.parallel.sequence import SequenceGroup, SequenceSlice, join_sequence_group
from tests.model.test_sequence_parallel import config_of

C, ROWS = 16, 3


def model_of(pattern, checkpointing=False, **options):
    config = config_of(pattern, C, checkpointing, **options)
    config.attention.flurka.summaries = config.attention.lowrank.summaries = SummariesConfig(number=3)
    return config


class Wire:
    """Sums up the bytes that this rank hands to collectives for others."""

    def __init__(self, monkeypatch):
        self.n_bytes, rank = 0, dist.get_rank()
        gather, exchange_rows = dist.all_gather_into_tensor, dist.all_to_all_single

        def counted_gather(gathered, x, group):
            self.n_bytes += gathered.nbytes - x.nbytes
            return gather(gathered, x, group=group)

        def counted_exchange(rows, x, received, sent, group):
            self.n_bytes += sum(n for to, n in enumerate(sent) if to != rank) * x[:1].nbytes
            return exchange_rows(rows, x, received, sent, group=group)

        monkeypatch.setattr(dist, "all_gather_into_tensor", counted_gather)
        monkeypatch.setattr(dist, "all_to_all_single", counted_exchange)

    def read(self):
        n_bytes, self.n_bytes = self.n_bytes, 0
        return n_bytes


def sent_on_rank(config, tokens, dtype, borders=None):
    """Return the bytes (forward, backward) that this rank sends, in slices of so many tokens."""
    groups.join("cpu")
    with pytest.MonkeyPatch.context() as monkeypatch:
        wire = Wire(monkeypatch)
        group = join_sequence_group(groups.world_size())
        model = GPT(config).to(dtype)
        part = group.slice(tokens * group.size, borders)
        rows = ROWS if borders is None else 1
        cu_seqlens = None if borders is None else torch.tensor(part.local_borders)
        x = torch.randint(61, (rows, tokens))
        wire.read()
        loss, _ = model(x, x, cu_seqlens, part)
        forward = wire.read()
        loss.backward()
        backward = wire.read()
    groups.leave()
    return forward, backward


FORMS = {
    "polysketch": ("polysketch", {}),
    "two local blocks": ("polysketch", {"polysketch": PolysketchConfig(size=8, local_blocks=2)}),
    "a gate, no key shift": ("polysketch", {"gate": "data", "key_shift": False}),
    "flurka": ("flurka", {}),
    "flurka with a gate": ("flurka+fastmax", {"gate": "scalar"}),
}
GATHERED = {
    "softmax": ("softmax", {}),
    "window": ("softmax", {"softmax": SoftmaxConfig(window=7)}),
    "window of two slices": ("softmax", {"softmax": SoftmaxConfig(window=60)}),
    "polynomial": ("polynomial", {}),
    "random": ("sparse_qk", {}),
    "learned": ("sparse_qk", {"sparse_qk": SparseQKConfig("learned", window=3)}),
    "lsh": ("sparse_hash", {"sparse_hash": SparseHashConfig("lsh", 4)}),
    "learned hash": ("sparse_hash", {"sparse_hash": SparseHashConfig("learned", 4)}),
    "lowrank": ("lowrank", {}),
    "hybrid": ("polysketch+softmax", {}),
}
ALL = [pytest.param(*form, id=name) for name, form in (FORMS | GATHERED).items()]


def check(found, layers, slices):
    for rank, counted in enumerate(found):
        each = [(sent_by_rank(kind.layer, slices, rank), kind.times) for kind in layers]
        assert counted == tuple(sum(sent[way] * times for sent, times in each) for way in (0, 1)), rank
    busiest = exchange(layers, slices)
    assert (busiest.forward, busiest.backward) == max(found, key=lambda sent: (sum(sent), sent))


@pytest.mark.parametrize("ranks, tokens, dtype", [(4, 48, torch.float32), (2, 41, torch.bfloat16)])
@pytest.mark.parametrize("pattern, options", ALL)
def test_bytes_are_those_that_ranks_send(run_ranks, pattern, options, ranks, tokens, dtype):
    """Slices of 41 tokens cut blocks of 16: the tokens of a block that is not whole go to the next rank too."""
    config = model_of(pattern, **options)
    found = run_ranks(lambda: sent_on_rank(config, tokens, dtype), ranks)
    check(found, layers_by_kind(config), Slices(ranks=ranks, tokens=tokens, rows=ROWS, width=dtype.itemsize))


@pytest.mark.parametrize("pattern", ["polysketch", "flurka", "lowrank+softmax"])
def test_documents_add_decays_and_blocks_that_are_not_whole(run_ranks, pattern):
    """The second document leaves a block of which one token is missing on every rank: the most there can be."""
    config = model_of(pattern)
    found = run_ranks(lambda: sent_on_rank(config, 48, torch.float32, (0, 1, 144)), 3)
    check(found, layers_by_kind(config), Slices(ranks=3, tokens=48, packed=True, width=4))


def test_blocks_that_are_made_again_exchange_again(run_ranks):
    slices = Slices(ranks=2, tokens=48, rows=ROWS, width=4)
    layers = layers_by_kind(model_of("flurka"))
    found = run_ranks(lambda: sent_on_rank(model_of("flurka", True), 48, torch.float32), 2)
    once = exchange(layers, slices)
    assert max(map(sum, found)) == once.per_step(1, recomputed=True) == once.per_step(1, False) + once.forward
    assert once.per_step(3, False) == 3 * (once.forward + once.backward)


def test_a_rank_alone_exchanges_nothing():
    assert exchange(layers_by_kind(model_of("polysketch")), Slices(ranks=1, tokens=64)) == ExchangedBytes()


def saved_bytes(config, tokens, part):
    """The bytes that autograd saves for a block, on tensors without memory."""
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # which so stays alive: no address is used twice
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        block = Block(config, 0)
        x, delta = (torch.randn(1, tokens, config.d_model, requires_grad=True) for _ in range(2))
        output, _ = block(x, delta, rotary_table(torch.arange(tokens), config.head_dim, config.rope_base), None, part)
        own = {p.untyped_storage()._cdata for p in block.parameters()}
        return sum(storage.nbytes() for address, storage in saved.items() if address not in own)


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize(
    "pattern, options",
    [
        ("polysketch", {}),
        ("polysketch", {"gate": "data"}),
        ("flurka", {"gate": "scalar"}),
        ("softmax", {}),
        ("softmax", {"softmax": SoftmaxConfig(window=100)}),
        ("lowrank", {}),
    ],
)
def test_what_is_kept_for_backward_is_what_autograd_saves(pattern, options, ranks):
    config, tokens = model_of(pattern, **options), 512
    config = replace(config, d_model=128, n_layers=1, attention=replace(config.attention, block_size=64))
    group = SequenceGroup(size=ranks, rank=ranks - 1, name="a group", data_rank=0, data_ranks=1)
    alone = saved_bytes(config, tokens, None)
    shared = saved_bytes(config, tokens, SequenceSlice(group=group, tokens=tokens))
    kept = exchange(layers_by_kind(config), Slices(ranks=ranks, tokens=tokens, width=4)).kept
    assert alone + kept == pytest.approx(shared, rel=0.07)
