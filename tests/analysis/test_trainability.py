"""Every kind starts so that it can learn to recall; what does not start so is known, with its figure."""

import pytest
import torch

from lcpt.analysis.trainability import last_weights, trainability
from lcpt.attention import ATTENTION, AttentionConfig
from lcpt.attention.balance import mean_power, mean_squared_product, normed
from lcpt.attention.feature_maps import FEATURE_MAPS
from lcpt.attention.polysketch import Polysketch

# What lies below 0.7, and what it reaches at least: see the docstring of `trainability`.
LOW = {"polysketch": 0.6, "feedforward": 0.45}
LOW_MAPS = {
    "relu": 0.4,
    "favor": 0.1,
    "sketch": -0.1,
    "linear_sketch": 0.15,
    "softplus": 0.4,
    "oglu": 0.4,
    "aoglu": 0.4,
}


def configured(kind, **settings) -> AttentionConfig:
    config = AttentionConfig(kind=kind)
    for name, value in settings.items():
        setattr(getattr(config, kind), name, value)
    return config


@pytest.mark.parametrize("kind", ATTENTION)
def test_weights_grow_with_the_score_and_both_parts_weigh_the_same(kind):
    found = trainability(kind, 2048)
    assert found.correlation > LOW.get(kind, 0.7)
    assert found.far_near is None or 0.5 < found.far_near < 2


@pytest.mark.parametrize("kind", ["polysketch", "flurka"])
def test_the_balance_is_that_of_any_context(kind):
    assert 0.5 < trainability(kind, 32_768).far_near < 2


@pytest.mark.parametrize("sketch, size", [("linear", 16), ("linear_products", 32), ("learned", 32), ("srht", 64)])
def test_every_sketch_is_balanced(sketch, size):
    found = trainability("polysketch", 2048, config=configured("polysketch", sketch=sketch, size=size))
    assert 0.4 < found.far_near < 2.5
    if sketch.startswith("linear"):
        assert found.correlation > 0.75 * ((size - 1) / 64) ** 0.5


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.parametrize("kind", ["kernel", "flurka"])
def test_every_feature_map_is_balanced(kind, name):
    found = trainability(kind, 2048, config=configured(kind, feature_map=name))
    assert found.correlation > LOW_MAPS.get(name, 0.7)
    assert 0.25 < found.far_near < 4  # a few queries of a heavy-tailed map decide


@pytest.mark.parametrize("sketch", ["linear", "learned", "gaussian"])
def test_mean_weights_are_those_of_pairs(sketch):
    """The averages that γ comes from, over all pairs of many queries and keys."""
    torch.manual_seed(0)
    module = Polysketch(64, 1, 1, configured("polysketch", sketch=sketch))
    q, k = normed(64), normed(64)
    a, b = module.sketch(q)[0, :, 0], module.sketch(k)[0, :, 0]
    far = (a @ b.T).square().mean()
    near = (module.scale * (q[0, :, 0] @ k[0, :, 0].T) + 1).pow(4).mean()
    assert mean_squared_product(module.sketch, 1, 64).item() == pytest.approx(far.item(), rel=0.2)
    assert mean_power(module.scale, 1, 4, 64) == pytest.approx(near.item(), rel=0.03)
    assert module.gamma.exp().item() == pytest.approx((near / far).item(), rel=0.2)


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_without_a_shift_the_weight_does_not_know_the_sign(degree):
    found = trainability("polynomial", 512, config=configured("polynomial", degree=degree, shift=0.0))
    assert abs(found.correlation) < 0.15
    assert trainability("polynomial", 512, config=configured("polynomial", degree=degree)).correlation > 0.8


def test_an_unbalanced_state_is_noticed(monkeypatch):
    """γ = 0 with elu1 features: 49 times."""
    monkeypatch.setattr("lcpt.attention.flurka.balance", lambda *_: 0.0)
    found = trainability("flurka", 2048, config=configured("flurka", feature_map="elu1"))
    assert 40 < found.far_near < 60


@pytest.mark.parametrize("kind", ["softmax", "polysketch", "flurka"])
def test_weights_are_those_of_the_last_token(kind):
    """They add up to 1 over all tokens, and softmax's are its definition."""
    torch.manual_seed(0)
    config = AttentionConfig(kind=kind, block_size=8)
    module = config.attention_of_layer(0)(16, 1, 1, config)
    near, far = last_weights(module, 45)
    tokens_in_state = {"softmax": 0, "polysketch": 40, "flurka": 32}[kind]
    assert len(near.weights) == 45 - tokens_in_state
    total = near.weights.sum() + (0 if far is None else tokens_in_state * far.of_token)
    assert total == pytest.approx(1, abs=1e-3)
    if kind == "softmax":
        torch.testing.assert_close(near.weights, (near.scores / 4).softmax(0), rtol=1e-4, atol=1e-6)
