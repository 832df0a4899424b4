import pytest
import torch
from torch.nn.functional import cross_entropy

from lcpt.attention import ATTENTION, AttentionConfig
from lcpt.attention.polysketch import PolysketchConfig
from lcpt.model import GPT, ModelConfig

V = 50


def config(kind="polysketch", **changes):
    attention = AttentionConfig(kind=kind, block_size=4, polysketch=PolysketchConfig(size=8))
    shape = {"n_layers": 2, "d_model": 16, "n_heads": 2, "vocab_size": V, "attention": attention}
    return ModelConfig(**shape | changes)


def build(kind="polysketch", seed=0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(config(kind, **changes))


def tokens(*shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=ATTENTION)
def kind(request):
    return request.param


@pytest.mark.parametrize("length", [1, 2, 4, 5, 19])
def test_logits_and_loss_agree(kind, length):
    model, x, labels = build(kind), tokens(3, length), tokens(3, length + 1)[:, 1:]
    labels = labels.masked_fill(torch.rand(labels.shape) < 0.2, -1)
    labels[0, 0] = 3
    logits = model(x)
    loss, count = model(x, labels=labels)
    assert logits.shape == (3, length, V) and count == (labels >= 0).sum()
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.token_losses(x, labels).sum(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 4, 10])
def test_later_tokens_do_not_change_earlier_logits(kind, n):
    model, x = build(kind), tokens(2, 19)
    changed = torch.cat((x[:, :n], (x[:, n:] + 1) % V), dim=1)
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :n], after[:, :n], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, n:], after[:, n:], atol=1e-4)


def test_the_past_matters(kind):
    """The last logits change with the first token: across blocks, and order counts."""
    model, x = build(kind), tokens(1, 19)
    swapped = x[:, [1, 0, *range(2, 19)]]
    assert x[0, 0] != x[0, 1]
    assert not torch.allclose(model(x)[:, -1], model(swapped)[:, -1], atol=1e-6)


def test_batch_rows_do_not_meet(kind):
    model, x = build(kind), tokens(3, 9)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-5, atol=1e-6)


def test_gradients_reach_every_parameter(kind):
    model, x = build(kind, n_kv_heads=1), tokens(2, 20)
    model(x[:, :-1], labels=x[:, 1:])[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name


def test_activation_checkpointing_changes_nothing(kind):
    results = []
    for checkpointing in (False, "selective", True, "offload"):
        model, x = build(kind, activation_checkpointing=checkpointing), tokens(2, 20)
        loss, _ = model(x[:, :-1], labels=x[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_activation_checkpointing_keeps_less():
    kept = []
    for checkpointing in (False, "selective", True):
        model, x, n_bytes = build(activation_checkpointing=checkpointing), tokens(2, 20), 0

        def count(x):
            nonlocal n_bytes
            n_bytes += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            model(x[:, :-1], labels=x[:, 1:])
        kept.append(n_bytes)
    assert kept[2] < kept[0] / 3 and kept[2] < kept[1] < 0.75 * kept[0]


def test_pattern_builds_its_layers():
    attention = AttentionConfig(pattern=["polysketch", "softmax"])
    model = build(n_layers=5, attention=attention)
    kinds = [type(block.attention) for block in model.blocks]
    assert kinds == [ATTENTION[k] for k in ("polysketch", "softmax", "polysketch", "softmax", "polysketch")]


def test_one_matrix_for_embedding_and_head():
    """Its gradient is the sum of both uses: a token that is neither input nor label gets the head's alone."""
    model, x = build(), torch.zeros(1, 5, dtype=torch.long)
    model(x, labels=x)[0].backward()
    assert sum(p.shape == (V, 16) for p in model.parameters()) == 1
    assert (model.embedding.weight.grad.norm(dim=1) > 0).all()
    with torch.no_grad():
        before = model(x)
        model.embedding.weight[7] *= 2
        torch.testing.assert_close(model(x)[..., 7], 2 * before[..., 7])


def test_a_seed_makes_the_weights():
    first, same, other = (build(seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_initial_weights_have_the_stated_deviation_and_loss_ln_v():
    """0.55/√d, a quarter of it at 8 layers where a block adds; and an untrained model knows nothing: loss ln V."""
    std, model = 0.55 / 128**0.5, build(n_layers=8, d_model=128, n_heads=4, vocab_size=500)
    weights = dict(model.named_parameters())
    for name, share in {
        "embedding.weight": 1,
        "blocks.3.attention.qkv.weight": 1,
        "blocks.3.feed_forward.up.weight": 1,
        "blocks.3.attention.out.weight": 0.25,
        "blocks.3.feed_forward.down.weight": 0.25,
    }.items():
        assert weights[name].std().item() == pytest.approx(share * std, rel=0.05), name
    x = torch.randint(500, (2, 100))
    assert model(x, labels=x.roll(1, 0))[0].item() / 200 == pytest.approx(6.21, abs=0.3)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"n_layers": 0}, "n_layers is 0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"n_heads": 3}, "d_model 16 is no multiple"),
        ({"n_heads": 16}, "d_model 16 is no multiple"),
        ({"n_kv_heads": 3}, "n_kv_heads 3"),
        ({"d_ff": 0}, "d_ff is 0"),
        ({"n_layers": "2"}, "n_layers is '2'; it must be a whole number"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5"),
        ({"attention": {"kind": "softmax"}}, "model.attention is a dict; give an AttentionConfig"),
    ],
    ids=str,
)
def test_impossible_shapes_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        config(**changes)


@pytest.mark.parametrize(
    "tokens",
    [
        torch.zeros(5, dtype=torch.long),
        torch.zeros(1, 0, dtype=torch.long),
        torch.zeros(1, 5),
        torch.zeros(1, 5, 16).int(),
    ],
    ids=lambda x: str(list(x.shape)),
)
def test_what_are_no_tokens_is_named(tokens):
    model = GPT(config())
    for read in (model, model.prefill, lambda x: model.token_losses(x, x)):
        with pytest.raises(ValueError, match="whole numbers .B, T., T ≥ 1"):
            read(tokens)
