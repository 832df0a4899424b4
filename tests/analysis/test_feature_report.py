"""Dimensions, costs, errors and ranks of features, against figures known otherwise."""

import math

import pytest
import torch

from lcpt.analysis.feature_costs import costs, dimensions, kinds
from lcpt.analysis.feature_report import feature_report
from lcpt.analysis.ranks import FUNCTIONS, rank_and_stable_rank, ranks
from lcpt.analysis.real_heads import heads, projections
from lcpt.analysis.sketch_error import errors_of_layer, experiment, pairs, variance
from lcpt.attention import ATTENTION, AttentionConfig
from lcpt.attention.base import Projected
from lcpt.attention.polysketch import Polysketch, PolysketchConfig
from lcpt.attention.sketch import DRAW
from lcpt.model import GPT, ModelConfig


@pytest.mark.parametrize(
    "head_dim, exact, cumulative",
    [
        (16, [136, 816, 3_876], [153, 969, 4_845]),
        (64, [2_080, 45_760, 766_480], [2_145, 47_905, 814_385]),
    ],
)
def test_dimensions_equal_known_values(head_dim, exact, cumulative):
    rows = {(row["features"], row["degree"]): row for row in dimensions(head_dim, 4, 32)}
    assert [rows["exact", p]["dimension"] for p in (2, 3, 4)] == exact
    assert [rows["exact, cumulative", p]["dimension"] for p in (2, 3, 4)] == cumulative
    assert rows["sketch, packed", 4]["dimension"] == 528 and rows["sketch, tiled", 4]["dimension"] == 640
    assert rows["sketch, tiled", 4]["state_bytes"] == 4 * 640 * (head_dim + 1)


def test_every_kind_has_its_own_costs():
    found = {row["kind"]: row for row in costs(64, kinds(4, 16, 128))}
    assert found.keys() == (ATTENTION.keys() - {"polynomial"}) | {"polynomial 2", "polynomial 4"}
    for name, row in found.items():
        kind, _, degree = name.partition(" ")
        config = AttentionConfig(kind, block_size=128)
        config.polysketch.size, config.polynomial.degree = 16, int(degree or 4)
        head = config.attention_of_layer(0)(64, 1, 1, config)
        for at in row["at"]:
            forward, backward = head.attend_flops(at["context"])
            assert (at["forward"], at["forward_backward"]) == (forward, forward + backward)
            assert at["state_bytes"] == head.state_bytes(at["context"])


def test_crossover_is_where_the_flops_cross():
    softmax = AttentionConfig("softmax")
    softmax = softmax.attention_of_layer(0)(64, 1, 1, softmax)
    configs = kinds(4, 32, 256)
    found = {row["kind"]: row["crossover"] for row in costs(64, configs)}
    assert found["polynomial 4"] == {"forward": None, "forward_backward": None} == found["softmax"]
    for name in ("polysketch", "polynomial 2", "fastmax", "kernel", "feedforward", "flurka", "lowrank"):
        head = configs[name].attention_of_layer(0)(64, 1, 1, configs[name])
        for mode, parts in (("forward", 1), ("forward_backward", 2)):
            ahead = [
                sum(head.attend_flops(n)[:parts]) < sum(softmax.attend_flops(n)[:parts])
                for n in range(found[name][mode] - 3, found[name][mode] + 3)
            ]
            assert ahead == [False] * 3 + [True] * 3, name


@pytest.mark.parametrize("cosine", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("kind", DRAW)
@pytest.mark.parametrize("head_dim, shift", [(16, 0.0), (12, 0.0), (16, 1.0), (12, 0.5)])
def test_the_sketch_error_equals_its_theory(kind, cosine, head_dim, shift):
    """The mean of many draws is within 4 standard errors of the theory, and these are at most 3 %."""
    q, k = pairs(head_dim, cosine, 64)
    found = experiment(q, k, 8, kind, draws=1_500, shift=shift)
    assert found["standard_error"] < 0.03 * found["theory"]
    assert abs(found["relative_rmse"] - found["theory"]) < 4 * found["standard_error"]
    assert found["weight_ratio"] == pytest.approx(found["weight_ratio_theory"], rel=0.16)


def test_the_variance_equals_known_special_cases():
    """A perfect match: √(8/r). Unrelated tokens at d = 64, r = 32: with E[c²] = 1/63 and E[c⁴] = 1/1365 of a cosine c,
    1 + (1 + 4/63 + 3/1365) 1365/32 times too heavy."""
    q, k = pairs(64, 0.0, 100_000)
    torch.testing.assert_close(variance(q, q, 32, "gaussian").sqrt(), torch.full((100_000,), 0.5), rtol=1e-3, atol=0)
    exact = ((q * k).sum(-1) / 64) ** 4
    assert 1 + variance(q, k, 32, "gaussian").mean() / exact.mean() == pytest.approx(46.5, rel=0.03)


def test_rank_is_low_of_polynomials_alone():
    q, k = torch.randn(2, 256, 8, dtype=torch.float64)
    found = {row["function"]: row for row in ranks(q, k)}
    assert [found[name]["rank"] for name in ("x", "x^2", "1+x+x^2/2")] == [8, 36, 45]
    assert [found[name]["bound"] for name in ("x", "x^2", "1+x+x^2/2", "x^4")] == [8, 36, 45, 256]
    for name in FUNCTIONS.keys() - {"x", "x^2", "1+x+x^2/2", "x^8"}:
        assert found[name]["rank"] == 256, name
        assert (found[name]["bound"] is None) == (name != "x^4")


def test_rank_and_stable_rank_by_hand():
    rank, stable = rank_and_stable_rank(torch.diag(torch.tensor([3.0, 4.0, 0.0, 1e-20], dtype=torch.float64)))
    assert rank == 2 and stable == pytest.approx(25 / 16)


class Square(torch.nn.Module):
    """An exact sketch of one coordinate."""

    def forward(self, x):
        return x.square()


def layer_and_heads(gamma):
    """A layer of two heads whose sketch is exact, of one number each, and its q, k, v of 9 tokens."""
    config = AttentionConfig(block_size=4, polysketch=PolysketchConfig(size=1, sketch="gaussian", shift=0.0))
    layer = Polysketch(2, 2, 1, config)
    layer.sketch = Square()
    layer.gamma.data[:] = torch.tensor(gamma)
    return layer, Projected(torch.randn(1, 9, 2, 1), torch.randn(1, 9, 1, 1), torch.randn(1, 9, 1, 1))


def test_error_on_a_layer_by_hand():
    """e^γ = 1 and 3: the second head's weights are three times the exact ones, which one factor mends."""
    exact, thrice = errors_of_layer(*layer_and_heads([0.0, math.log(3)]))
    assert list(exact) == ["relative_error", "best_scale_error", "row_mass_error", "row_mass_ratio"]
    assert list(exact.values()) == pytest.approx([0, 0, 0, 1], abs=1e-6)
    assert list(thrice.values()) == pytest.approx([2, 0, 2, 3], abs=1e-6)


def test_error_counts_far_pairs_alone():
    """Tokens 8 and later ask far keys and are none: a wrong q there is an error, a wrong k is not."""
    layer, p = layer_and_heads([0.0, 0.0])
    late = torch.arange(9)[:, None, None] >= 8
    for wrong, is_error in (("q", True), ("k", False)):
        layer.sketch = Square()
        layer.sketch.register_forward_hook(
            lambda module, args, y, wrong=wrong: torch.where(late & (y.shape[2] == (2 if wrong == "q" else 1)), 9.0, y)
        )
        assert (errors_of_layer(layer, p)[0]["relative_error"] > 0.1) == is_error
    layer.block_size = 9
    assert errors_of_layer(layer, p) == [None, None]


def test_every_head_of_a_model_has_a_row():
    config = ModelConfig(
        n_layers=3,
        d_model=32,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=50,
        attention=AttentionConfig(pattern=["polysketch", "softmax"], block_size=8, polysketch=PolysketchConfig(size=4)),
    )
    model, tokens = GPT(config), torch.randint(50, (1, 40))
    before = model(tokens)
    rows = heads(model, tokens)
    assert [(row["layer"], row["head"], row["kind"]) for row in rows] == [
        (layer, head, kind) for layer, kind in enumerate(["polysketch", "softmax", "polysketch"]) for head in range(4)
    ]
    assert [row["sketch_error"] is None for row in rows] == 4 * [False] + 4 * [True] + 4 * [False]
    attention, p = projections(model, tokens)[1]
    assert attention is model.blocks[1].attention
    assert rows[4 + 3]["ranks"] == ranks(p.q[0, :, 3], p.k[0, :, 1])  # query head 3 looks at key head 1
    assert rows[0]["ranks"][0]["rank"] == 8 and torch.equal(model(tokens), before)


@pytest.mark.parametrize(
    "wrong, part",
    [
        ({"head_dim": 1}, "head dimension 1"),
        ({"degree": 1}, "degree 1"),
        ({"sketch_size": 0}, "sketch size 0"),
        ({"block_size": 0}, "block size 0"),
    ],
)
def test_arguments_out_of_range_are_named(wrong, part):
    with pytest.raises(ValueError, match=part):
        feature_report(**{"head_dim": 8, "degree": 4, "sketch_size": 4, "block_size": 16} | wrong)
