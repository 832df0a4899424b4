"""Which layer gets which kind, and settings that are refused by name."""

import pytest

from lcpt.attention import AttentionConfig
from lcpt.attention.fastmax import FastmaxConfig
from lcpt.attention.feedforward import FeedforwardConfig
from lcpt.attention.flurka import FlurkaConfig
from lcpt.attention.kernel import KernelConfig
from lcpt.attention.polynomial import PolynomialConfig
from lcpt.attention.polysketch import PolysketchConfig
from lcpt.attention.summaries import SummariesConfig


def test_pattern_cycles_over_the_layers():
    config = AttentionConfig(kind="polynomial", pattern=["polysketch", "polysketch", "softmax"])
    assert [config.kind_of_layer(n) for n in range(7)] == [
        "polysketch",
        "polysketch",
        "softmax",
        "polysketch",
        "polysketch",
        "softmax",
        "polysketch",
    ]
    assert AttentionConfig(kind="polynomial").kind_of_layer(5) == "polynomial"


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"kind": "flash"}, "'flash'"),
        ({"pattern": ["softmax", "sofmax"]}, "'sofmax'"),
        ({"block_size": 0}, "0"),
    ],
)
def test_wrong_settings_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        AttentionConfig(**wrong)


@pytest.mark.parametrize(
    "config, wrong, named",
    [
        (KernelConfig, {"feature_map": "cosine"}, "'cosine'"),
        (KernelConfig, {"size": 0}, "size is 0"),
        (FastmaxConfig, {"order": 3}, "order is 3"),
        (PolynomialConfig, {"shift": -0.5}, "polynomial.shift is -0.5"),
        (PolynomialConfig, {"degree": 3}, "degree is 3"),
        (FeedforwardConfig, {"map": "mlp"}, "'mlp'"),
        (FeedforwardConfig, {"layers": 0}, "layers is 0"),
        (FlurkaConfig, {"local": "none"}, "'none'"),
        (FlurkaConfig, {"feature_map": "cosine"}, "flurka.feature_map"),
        (SummariesConfig, {"number": 0}, "number is 0"),
        (SummariesConfig, {"projection": "mean"}, "'mean'"),
    ],
)
def test_wrong_settings_of_kernels_are_named(config, wrong, named):
    with pytest.raises(ValueError, match=named):
        config(**wrong)


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"sketch": "count"}, "'count'"),
        ({"shift": -1.0}, "polysketch.shift is -1.0"),
        ({"shift": float("nan")}, "polysketch.shift is nan"),
        ({"shift": 0.0}, "sketch linear needs a constant"),
        ({"size": 1}, "size is 1, too small"),
        ({"sketch": "learned", "size": 1}, "size is 1, too small"),
        ({"size": 0}, "size is 0"),
        ({"expansion": 0}, "expansion is 0"),
        ({"levels": 0}, "levels is 0"),
        ({"local_blocks": 3}, "local_blocks is 3"),
    ],
)
def test_wrong_settings_of_polysketch_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        PolysketchConfig(**wrong)


def test_a_gate_without_a_state_is_refused():
    with pytest.raises(ValueError, match="no state to gate"):
        AttentionConfig(kind="softmax", gate="data")
    with pytest.raises(ValueError, match="'open'"):
        AttentionConfig(gate="open")
    AttentionConfig(pattern=["polysketch", "softmax"], gate="data")
