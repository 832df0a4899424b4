"""What ranks that share a sequence send each other: counted on gloo ranks, and predicted."""

import pytest
import torch
import torch.distributed as dist

from lcpt.attention import AttentionConfig
from lcpt.attention.summaries import SummariesConfig
from lcpt.model import GPT, ModelConfig
from lcpt.model.sequence_cost import Slices, exchange, layers_by_kind, sent_by_rank
from lcpt.parallel import groups
from lcpt.parallel.sequence import join_sequence_group

C, ROWS = 16, 3


def model_of(pattern, checkpointing=False, **options):
    attention = AttentionConfig(pattern=pattern.split("+"), block_size=C, **options)
    attention.polysketch.size = 8
    attention.flurka.summaries = SummariesConfig(number=3)
    return ModelConfig(
        n_layers=2,
        d_model=32,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=61,
        activation_checkpointing=checkpointing,
        attention=attention,
    )


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


LINEAR = [
    ("polysketch", {}),
    ("polysketch", {"gate": "data", "key_shift": False}),
    ("flurka", {}),
    ("flurka+fastmax", {"gate": "scalar"}),
]


@pytest.mark.parametrize("ranks, tokens, dtype", [(4, 48, torch.float32), (2, 40, torch.bfloat16)])
@pytest.mark.parametrize("pattern, options", LINEAR)
def test_bytes_are_those_that_ranks_send(run_ranks, pattern, options, ranks, tokens, dtype):
    """Slices of 40 tokens cut blocks of 16: the tokens of a block that is not whole go to the next rank too."""
    config = model_of(pattern, **options)
    slices = Slices(ranks=ranks, tokens=tokens, rows=ROWS, width=dtype.itemsize)
    layers = layers_by_kind(config)
    found = run_ranks(lambda: sent_on_rank(config, tokens, dtype), ranks)
    for rank, counted in enumerate(found):
        each = [(sent_by_rank(layer, slices, rank), count) for _, layer, count in layers]
        assert counted == tuple(sum(sent[way] * count for sent, count in each) for way in (0, 1)), rank
    assert exchange(layers, slices)[:2] == max(found, key=lambda sent: (sum(sent), sent))
