"""What sparse kinds drop, keep and hash; that it is the same wherever it is asked; and how it learns."""

import pytest
import torch
from lcpt_kernels.sparse import ROWS

from lcpt.attention import AttentionConfig
from lcpt.attention.base import Projected, rotary_table
from lcpt.attention.sparse import (
    LearnedHash,
    LearnedKeep,
    RandomHash,
    RandomKeep,
    SparseHashConfig,
    SparseQKConfig,
    mixed,
    pulled,
    straight_through,
)
from lcpt.model import GPT, ModelConfig
from lcpt.model.cost import activation_elements

FORMS = {
    "random": AttentionConfig("sparse_qk"),
    "learned": AttentionConfig("sparse_qk", sparse_qk=SparseQKConfig("learned")),
    "lsh": AttentionConfig("sparse_hash", sparse_hash=SparseHashConfig("lsh", 4)),
    "learned hash": AttentionConfig("sparse_hash", sparse_hash=SparseHashConfig("learned", 4)),
    "learned, itself": AttentionConfig("sparse_qk", sparse_qk=SparseQKConfig("learned", window=1)),
    "lsh, window": AttentionConfig("sparse_hash", sparse_hash=SparseHashConfig("lsh", 4, window=5)),
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def projected(tokens, heads=4, kv_heads=2, d=8, batch=2):
    q, k, v = (torch.randn(batch, tokens, n, d) for n in (heads, kv_heads, kv_heads))
    return Projected(q, k, v, x=torch.randn(batch, tokens, heads * d))


def model(form, checkpointing=False, seed=0):
    torch.manual_seed(seed)
    return GPT(
        ModelConfig(
            n_layers=3,
            d_model=32,
            n_heads=4,
            n_kv_heads=2,
            vocab_size=50,
            attention=form,
            activation_checkpointing=checkpointing,
        )
    )


def test_recomputation_decides_alike(form):
    """Bit for bit: loss and gradients with activation checkpointing are those without."""
    tokens, found = torch.randint(50, (2, 40)), []
    for checkpointing in (False, True):
        trained = model(form, checkpointing)
        trained.train()
        loss, _ = trained(tokens, labels=tokens)
        loss.backward()
        found.append([loss, *(p.grad for p in trained.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_evaluation_is_training_and_repeats(form):
    trained, tokens = model(form), torch.randint(50, (2, 40))
    logits = trained.train()(tokens)
    trained.eval()
    assert torch.equal(trained(tokens), logits) and torch.equal(trained(tokens), logits)


def test_decisions_travel_with_the_weights(form):
    """Through fp32, which is what checkpoints hold, into a model that drew others."""
    first, second, tokens = model(form), model(form, seed=1), torch.randint(50, (2, 40))
    expected = first(tokens)
    second.load_state_dict({name: x.float() for name, x in first.state_dict().items()})
    assert torch.equal(second(tokens), expected)


def test_marks_depend_on_earlier_tokens_alone(form):
    """They are a token's own: of its prefix, of another batch, of later pieces."""
    module = form.attention_of_layer(0)(32, 4, 2, form)
    p, positions = projected(40), torch.arange(40)
    whole = module.marks(p, positions)
    for rows, tokens in ((slice(0, 1), slice(0, 7)), (slice(1, 2), slice(7, 40)), (slice(0, 2), slice(39, 40))):
        part = module.marks(Projected(*(x if x is None else x[rows, tokens] for x in p)), positions[tokens])
        assert torch.equal(part.q, whole.q[rows, tokens]) and torch.equal(part.k, whole.k[rows, tokens])


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.75])
def test_random_drops_its_share(drop):
    """In every head, differently, and independently for queries, keys and neighbours."""
    tokens = 20_000
    keep = RandomKeep(32, 4, 2, drop)(projected(tokens, batch=1), torch.arange(tokens))
    dropped = ~torch.cat((keep.q, keep.k), dim=2)[0].T  # [6, T]
    tolerance = 5 * (drop * (1 - drop) / tokens) ** 0.5
    torch.testing.assert_close(dropped.float().mean(1), torch.full((6,), drop), rtol=0, atol=tolerance)
    correlation = torch.corrcoef(torch.cat((dropped, dropped.roll(1, 1))).float())
    assert (correlation - torch.eye(12)).abs().max() < 5 * tokens**-0.5


def test_random_is_of_the_position_in_the_document():
    chooser = RandomKeep(32, 4, 2, 0.5)
    whole = chooser(projected(40), torch.arange(40))
    again = chooser(projected(40), torch.arange(40))
    assert torch.equal(whole.q, again.q) and torch.equal(whole.k, again.k)  # other tokens, the same places
    packed = chooser(projected(20), torch.arange(20).remainder(10))
    assert torch.equal(packed.q[:, :10], packed.q[:, 10:])


def test_mixing_is_one_to_one_and_fair_in_every_bit():
    numbers = mixed(torch.arange(2**16) + 12345)
    assert len(numbers.unique()) == 2**16 and numbers.min() >= 0 and numbers.max() < 2**32
    bits = (numbers[:, None] >> torch.arange(32)) & 1
    torch.testing.assert_close(bits.double().mean(0), torch.full((32,), 0.5).double(), rtol=0, atol=0.01)
    flipped = mixed((torch.arange(2**16) + 12345) ^ 1) ^ numbers  # the last bit reaches all
    moved = ((flipped[:, None] >> torch.arange(32)) & 1).double().mean(0)
    torch.testing.assert_close(moved, torch.full((32,), 0.5).double(), rtol=0, atol=0.1)


@pytest.mark.parametrize("drop", [0.3, 0.5, 0.7])
def test_learned_begins_near_its_share(drop):
    chooser = LearnedKeep(256, 4, 2, drop)
    x = torch.nn.functional.layer_norm(torch.randn(4, 500, 256), (256,))
    keep = chooser(Projected(None, None, None, x=x), None)
    for marks in (keep.q, keep.k):
        assert (marks.float().mean((0, 1)) - (1 - drop)).abs().max() < 0.1


def train(module, step):
    """300 updates on step() -> (loss, measured); returns what was measured, on average over the last 100."""
    optimizer, measured = torch.optim.Adam(module.parameters(), lr=0.01), []
    for _ in range(300):
        loss, value = step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        measured.append(value)
    return torch.stack(measured[-100:]).mean(0)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("wish", [1.0, -1.0])
def test_the_share_stays_near_its_target(wish, scale):
    """A loss that wants every token kept, or none, at whatever scale."""
    chooser = LearnedKeep(32, 4, 2, 0.5)

    def step():
        keep = chooser(Projected(None, None, None, x=torch.randn(2, 200, 32)), None)
        gain = (keep.q_gate * keep.q).sum() + (keep.k_gate * keep.k).sum()
        return -wish * scale * gain, torch.cat((keep.q, keep.k), dim=2).float().mean((0, 1))

    assert (train(chooser, step) - 0.5).abs().max() < 0.09


def test_a_loss_is_heard_within_the_share():
    """Tokens that matter are kept, others dropped."""
    chooser = LearnedKeep(32, 4, 2, 0.5)

    def step():
        x = torch.randn(2, 200, 32)
        worth = x[..., :1].sign()
        keep = chooser(Projected(None, None, None, x=x), None)
        gain = (worth * keep.q_gate * keep.q).sum() + (worth * keep.k_gate * keep.k).sum()
        return -gain, (torch.cat((keep.q, keep.k), dim=2) == (worth > 0)).float().mean((0, 1))

    assert train(chooser, step).min() > 0.8


def test_gates_are_one_and_carry_gradients():
    p = torch.rand(1000, requires_grad=True)
    gate = straight_through(p)
    assert torch.equal(gate, torch.ones(1000))
    (3 * gate).sum().backward()
    assert torch.equal(p.grad, torch.full((1000,), 3.0))


def test_the_pull_is_in_units_of_the_gradient():
    """Head by head, and the same at every scale of the loss."""
    x, weights = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5, 3)
    direction = torch.tensor([0.0, 1.0, -2.0])
    for scale in (1.0, 1e6):
        (gradient,) = torch.autograd.grad((scale * weights * pulled(x, direction)).sum(), x)
        expected = scale * (weights + direction * weights.abs().mean((0, 1)))
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("make", [RandomHash, LearnedHash])
def test_queries_and_keys_hash_alike(make):
    """The same vector, the same bucket, in every head of a group; near ones often, opposite ones never under lsh."""
    hashing, x = make(2, 16, 8), torch.randn(1, 500, 2, 16)
    of_keys = hashing(x)[0]
    of_queries = hashing(x.repeat_interleave(2, dim=2))[0]
    assert torch.equal(of_queries, of_keys.repeat_interleave(2, dim=2))
    assert not torch.equal(of_keys[..., 0], hashing(x.flip(2))[0][..., 1])  # another hash in every key-value head
    near = hashing(x + 0.1 * torch.randn_like(x))[0]
    assert (near == of_keys).float().mean() > 0.75
    if make is RandomHash:
        assert not (hashing(-x)[0] == of_keys).any()
    shares = torch.nn.functional.one_hot(of_keys.long(), 8).float().mean((0, 1))
    assert shares.min() > 0.04 and shares.max() < 0.3


def test_the_learned_hash_stays_balanced():
    """A loss that wants every token in the first bucket, of tokens that lean the same way."""
    hashing = LearnedHash(2, 16, 8)

    def step():
        x = torch.nn.functional.layer_norm(torch.randn(2, 400, 2, 16) + 0.5 * torch.arange(16) / 16, (16,))
        bucket, gate = hashing(x)
        return -(gate * (bucket == 0)).sum(), torch.nn.functional.one_hot(bucket.long(), 8).float().mean((0, 1))

    shares = train(hashing, step)
    assert shares.max() < 0.25 and shares.square().sum(-1).max() < 1.2 / 8  # cost goes with the sum of squares


def test_dropped_queries_add_nothing():
    form = FORMS["random"]
    module, p = form.attention_of_layer(0)(32, 4, 2, form), projected(40)
    o = module.attend(p)[0]
    keep = module.marks(p, torch.arange(40)).q
    assert torch.equal(o[~keep], torch.zeros_like(o[~keep])) and (~keep).any()


def test_with_a_window_only_dropped_queries_see_nothing():
    """Most keys are dropped. Alone with itself, a query gives its own value."""
    form = AttentionConfig("sparse_qk", sparse_qk=SparseQKConfig(drop=0.9, window=1))
    module, p = form.attention_of_layer(0)(32, 4, 2, form), projected(40)
    o, marks = module.attend(p)[0], module.marks(p, torch.arange(40))
    assert torch.equal(o[~marks.q], torch.zeros_like(o[~marks.q])) and (o[marks.q].abs().amax(-1) > 0).all()
    earlier = marks.k.repeat_interleave(2, dim=2).cumsum(1) - marks.k.repeat_interleave(2, dim=2).long()
    alone = marks.q & (earlier == 0)
    assert alone.any()
    torch.testing.assert_close(o[alone], p.v.repeat_interleave(2, dim=2)[alone])


@pytest.mark.parametrize("name", ["lsh", "lsh, window"])
def test_what_is_hashed_is_what_meets(name):
    """By hand: a softmax over the earlier keys in the bucket of the query, or in the window."""
    form = FORMS[name]
    module, p = form.attention_of_layer(0)(32, 4, 2, form), projected(30, batch=1)
    o, marks = module.attend(p)[0], module.marks(p, torch.arange(30))
    for head in range(4):
        q, k, v = p.q[0, :, head], p.k[0, :, head // 2], p.v[0, :, head // 2]
        for t in range(30):
            seen = marks.k[0, : t + 1, head // 2] == marks.q[0, t, head]
            seen[max(0, t + 1 - module.window) :] = True
            weights = (q[t] @ k[: t + 1][seen].T * 8**-0.5).softmax(-1)
            torch.testing.assert_close(o[0, t, head], weights @ v[: t + 1][seen])


@pytest.mark.parametrize("form, factor", [("random", 4), ("lsh", 4)])
def test_cost_at_long_contexts(form, factor):
    """Half of the queries and keys: a quarter of softmax's. Four buckets: the same."""
    sparse, dense = (
        config.attention_of_layer(0)(32, 4, 2, config) for config in (FORMS[form], AttentionConfig("softmax"))
    )
    for stated, whole in zip(sparse.attend_flops(10**6), dense.attend_flops(10**6), strict=True):
        assert whole / stated == pytest.approx(factor, rel=0.01)


def test_cost_of_a_window():
    """As many keys more, and the tile that they begin in; the same at any context."""
    costs = {}
    for window in (0, 1000):
        form = AttentionConfig("sparse_hash", sparse_hash=SparseHashConfig(window=window))
        costs[window] = form.attention_of_layer(0)(32, 4, 2, form).attend_flops(10**5)
    more = [near - none for near, none in zip(costs[1000], costs[0], strict=True)]
    assert more == pytest.approx([2 * 2 * 32 * (1000 + ROWS), 5 * 2 * 32 * (1000 + ROWS)])


def test_memory_is_counted_where_shapes_depend_on_values(form):
    config = ModelConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, vocab_size=50, attention=form)
    softmax = ModelConfig(**vars(config) | {"attention": AttentionConfig("softmax")})
    state = torch.get_rng_state()
    found, other = (activation_elements(x).always for x in (config, softmax))
    assert 0.5 * other < found < 4 * other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "config, wrong, named",
    [
        (SparseQKConfig, {"keep": "all"}, "'all'"),
        (SparseQKConfig, {"drop": 1.0}, "drop is 1.0"),
        (SparseQKConfig, {"drop": 0.0}, "drop is 0.0"),
        (SparseHashConfig, {"hash": "md5"}, "'md5'"),
        (SparseHashConfig, {"buckets": 1}, "buckets is 1"),
        (SparseHashConfig, {"buckets": 7}, "buckets is 7"),
        (SparseQKConfig, {"window": -1}, "sparse_qk.window is -1"),
        (SparseHashConfig, {"window": -1}, "window is -1"),
    ],
)
def test_wrong_settings_are_named(config, wrong, named):
    with pytest.raises(ValueError, match=named):
        config(**wrong)


def test_decoding_goes_on_with_positions_and_marks(form):
    """Token by token, by the module: what a state carries is enough."""
    module, x = form.attention_of_layer(0)(32, 4, 2, form).double(), torch.randn(2, 30, 32, dtype=torch.float64)
    rotary = rotary_table(torch.arange(30), 8, 10_000.0)
    expected, state = module(x, rotary), None
    for t in range(30):
        o, state = module.extend(x[:, t : t + 1], tuple(table[t : t + 1] for table in rotary), state)
        torch.testing.assert_close(o, expected[:, t : t + 1], rtol=1e-9, atol=1e-9)
    assert sum(x.nbytes for x in state[0]) <= 2 * 2 * module.state_bytes(30)  # in float64
