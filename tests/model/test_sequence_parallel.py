"""A model whose sequences lie on several ranks: loss and every gradient are those of one rank."""

import pytest
import torch
import torch._dynamo  # before ranks are forked: each would import it at its first collective

from lcpt.attention import AttentionConfig
from lcpt.attention.softmax import SoftmaxConfig
from lcpt.attention.sparse import SparseHashConfig, SparseQKConfig
from lcpt.model import GPT, ModelConfig
from lcpt.parallel import groups
from lcpt.parallel.sequence import join_sequence_group

TOKENS, C = 96, 8
BORDERS = {
    "one sequence": None,
    "anywhere": (0, 5, 30, 31, 64, 96),  # within a slice, over two of them, at a slice's start
    "one over all": (0, 3, 90, 96),
    "on the edges": (0, 24, 48, 72, 96),
}


def config_of(pattern, block_size, checkpointing=False, **options):
    return ModelConfig(
        n_layers=2,
        d_model=32,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=61,
        activation_checkpointing=checkpointing,
        attention=AttentionConfig(pattern=pattern.split("+"), block_size=block_size, **options),
    )


def model_of(pattern, checkpointing=False, **options):
    torch.manual_seed(1)
    return GPT(config_of(pattern, C, checkpointing, **options)).double()


def loss_and_gradients(model, tokens, labels, cu_seqlens=None, part=None):
    loss, count = model(tokens, labels, cu_seqlens, part)
    loss.backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach().double(), "count": count.double(), **gradients}


def batch(tokens, borders):
    generator = torch.Generator().manual_seed(3)
    row = torch.randint(61, (2 if borders is None else 1, tokens), generator=generator)
    return row, torch.where(torch.rand(row.shape, generator=generator) < 0.2, -1, row.roll(-1, 1))


def on_one_rank(pattern, tokens, borders, options):
    cu_seqlens = None if borders is None else torch.tensor(borders)
    return loss_and_gradients(model_of(pattern, **options), *batch(tokens, borders), cu_seqlens)


def on_ranks(pattern, tokens, all_borders, options):
    """Return the sums over ranks, for each of the borders."""
    groups.join("cpu")
    group, sums = join_sequence_group(groups.world_size()), []
    for borders in all_borders:
        part = group.slice(tokens, borders)
        own = slice(part.first, part.first + part.tokens)
        # With an empty document at the end.
        cu_seqlens = None if borders is None else torch.tensor([*part.local_borders, part.tokens])
        given = (x[:, own] for x in batch(tokens, borders))
        found = loss_and_gradients(model_of(pattern, **options), *given, cu_seqlens, part)
        for x in found.values():
            torch.distributed.all_reduce(x)
        sums.append({name: x.numpy() for name, x in found.items()})
    groups.leave()
    return sums


def check_gradients(run_ranks, ranks, pattern, tokens, all_borders, options):
    expected = [on_one_rank(pattern, tokens, borders, options) for borders in all_borders.values()]
    for sums in run_ranks(lambda: on_ranks(pattern, tokens, all_borders.values(), options), ranks):
        for case, one, other in zip(all_borders, sums, expected, strict=True):
            for name, x in other.items():
                error = (torch.as_tensor(one[name]) - x).norm() / x.norm().clamp(min=1e-9)
                in_fp32 = name == "loss" or "gate_module" in name
                assert error < (1e-6 if in_fp32 else 1e-10), (case, name)


FORMS = {
    "polysketch": ("polysketch", {}),
    "polysketch, gate": ("polysketch", {"gate": "data"}),
    "flurka": ("flurka", {"gate": "scalar"}),
    "two of linear cost": ("flurka+fastmax", {}),
    "softmax": ("softmax", {}),
    "window": ("softmax", {"softmax": SoftmaxConfig(window=7)}),
    "window of two slices": ("softmax", {"softmax": SoftmaxConfig(window=40)}),
    "polynomial": ("polynomial", {}),
    "random": ("sparse_qk", {}),
    "learned, window": ("sparse_qk", {"sparse_qk": SparseQKConfig("learned", window=3)}),
    "lsh": ("sparse_hash", {"sparse_hash": SparseHashConfig("lsh", 4, window=3)}),
    "learned hash": ("sparse_hash", {"sparse_hash": SparseHashConfig("learned", 4)}),
    "lowrank": ("lowrank", {}),
    "hybrid": ("polysketch+softmax", {}),
    "checkpointing": (
        "sparse_hash+lowrank",
        {"checkpointing": True, "sparse_hash": SparseHashConfig("learned", 4)},
    ),
    "selective checkpointing": ("softmax+lowrank", {"checkpointing": "selective"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_gradients(run_ranks, form):
    check_gradients(run_ranks, 4, FORMS[form][0], TOKENS, BORDERS, FORMS[form][1])


@pytest.mark.parametrize("form", ["softmax", "window of two slices", "learned, window", "lowrank"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_slices_of_odd_length(run_ranks, form, ranks):
    tokens = 19 * ranks
    borders = {"one sequence": None, "documents": (0, 4, 16, 25, tokens)}
    check_gradients(run_ranks, ranks, FORMS[form][0], tokens, borders, FORMS[form][1])


def compiled(pattern):
    """Return the largest error of a gradient, and how many graphs were made."""
    from torch._dynamo.utils import counters

    counters.clear()  # other tests of this process have graphs too
    groups.join("cpu")
    group, found = join_sequence_group(groups.world_size()), []
    part = group.slice(2 * 24)
    given = [x[:, part.first : part.first + part.tokens] for x in batch(2 * 24, None)]
    for backend in (None, "aot_eager"):
        model = model_of(pattern)
        if backend is not None:
            block = model.blocks[1]
            block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)
        found.append(loss_and_gradients(model, *given, part=part))
    groups.leave()
    errors = [float((found[1][name] - x).abs().max()) for name, x in found[0].items()]
    return max(errors), counters["stats"]["unique_graphs"]


def test_a_block_compiles_whole(run_ranks):
    """Also backwards, where a compiler may leave out what it holds for unused on one rank and others wait for."""
    for error, graphs in run_ranks(lambda: compiled("softmax"), 2, timeout=180):
        assert error < 1e-12 and graphs == 1
