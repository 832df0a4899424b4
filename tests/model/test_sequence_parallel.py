"""A model whose sequences lie on several ranks: loss and every gradient are those of one rank."""

import pytest
import torch

from lcpt.attention import AttentionConfig
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


def model_of(pattern, **options):
    torch.manual_seed(1)
    attention = AttentionConfig(pattern=pattern.split("+"), block_size=C, **options)
    config = ModelConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, vocab_size=61, attention=attention)
    return GPT(config).double()


def loss_and_gradients(model, tokens, labels, cu_seqlens=None, part=None):
    loss, count = model(tokens, labels, cu_seqlens, part)
    loss.backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach().double(), "count": count.double(), **gradients}


def errors_on_ranks(pattern, borders, options):
    """Return the error of this rank's sums over all ranks, relative to the norm, by name."""
    groups.join("cpu")
    group = join_sequence_group(groups.world_size())
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(61, (2 if borders is None else 1, TOKENS), generator=generator)
    labels = torch.where(torch.rand(tokens.shape, generator=generator) < 0.2, -1, tokens.roll(-1, 1))
    part = group.slice(TOKENS, borders)
    own = slice(part.first, part.first + part.tokens)
    cu_seqlens = None if borders is None else torch.tensor([*part.local_borders, part.tokens])  # an empty one behind
    found = loss_and_gradients(model_of(pattern, **options), tokens[:, own], labels[:, own], cu_seqlens, part)
    for x in found.values():
        torch.distributed.all_reduce(x)
    cu_seqlens = None if borders is None else torch.tensor(borders)
    whole = loss_and_gradients(model_of(pattern, **options), tokens, labels, cu_seqlens)
    groups.leave()
    return {name: float((found[name] - x).norm() / x.norm().clamp(min=1e-9)) for name, x in whole.items()}


@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize(
    "pattern, options",
    [
        ("polysketch", {}),
        ("polysketch", {"gate": "data"}),
        ("flurka", {"gate": "scalar"}),
        ("flurka+fastmax", {}),
    ],
)
def test_gradients(run_ranks, pattern, options, borders):
    for errors in run_ranks(lambda: errors_on_ranks(pattern, BORDERS[borders], options), 4):
        in_fp32 = {name for name in errors if name == "loss" or "gate_module" in name}
        for name, error in errors.items():
            assert error < (1e-6 if name in in_fp32 else 1e-10), name
