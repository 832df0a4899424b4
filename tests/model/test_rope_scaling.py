"""Scaled frequencies are those of the published formulas, computed by hand in float64."""

import math
from decimal import Decimal, localcontext

import pytest
import torch

from lcpt.config import ConfigError, load_config
from lcpt.model.rope_scaling import (
    LinearConfig,
    Llama3Config,
    RopeScalingConfig,
    YarnConfig,
    scaled_rotary_table,
)

D, POSITIONS = 16, torch.tensor([0, 1, 5, 100])


def angles_of(config, base=10_000.0, head_dim=D):
    """The angles of positions 0 and 1, fp32 [2, D/2], and the length of (cos, sin)."""
    cos, sin = (x[:, 0].double() for x in scaled_rotary_table(torch.arange(2), head_dim, base, config))
    return torch.atan2(sin, cos)[1], torch.hypot(cos, sin)


def test_none_is_rope():
    cos, sin = scaled_rotary_table(POSITIONS, D, 10_000.0, RopeScalingConfig())
    angles = POSITIONS.double()[:, None] * 10_000.0 ** (-torch.arange(0, D, 2).double() / D)
    torch.testing.assert_close(cos[:, 0].double(), angles.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sin[:, 0].double(), angles.sin(), rtol=0, atol=1e-5)


PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


@pytest.mark.parametrize("base, head_dim", [(10_000.0, 64), (500_000.0, 128)])
@pytest.mark.parametrize("kind", ["none", "linear"])
def test_far_positions_are_exact(base, head_dim, kind):
    """Against angles of 60 digits, taken modulo 2π; in fp32 they were off by up to 4e-2 at 1M."""
    positions = [0, 1, 8191, 32_768, 1_000_000, 2**24 + 1]
    config = RopeScalingConfig(kind, LinearConfig(3.0))
    cos, sin = scaled_rotary_table(torch.tensor(positions), head_dim, base, config)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (len(positions), 1, head_dim // 2)
    with localcontext() as digits:
        digits.prec = 60
        for row, position in enumerate(positions):
            for i in range(head_dim // 2):
                theta = Decimal(base) ** (Decimal(-2 * i) / head_dim) / (3 if kind == "linear" else 1)
                angle = float(position * theta % (2 * PI))
                assert abs(cos[row, 0, i].item() - math.cos(angle)) < 1e-7
                assert abs(sin[row, 0, i].item() - math.sin(angle)) < 1e-7


@pytest.mark.parametrize("kind", ["none", "linear", "llama3", "yarn"])
def test_tables_need_no_host_read_and_compile(kind):
    """A tensor without data cannot be read; a full graph has no break."""
    config, positions = RopeScalingConfig(kind), torch.arange(5)
    empty = scaled_rotary_table(positions.to("meta"), D, 10_000.0, config)
    assert all(x.is_meta and x.dtype == torch.float32 for x in empty)
    compiled = torch.compile(scaled_rotary_table, backend="aot_eager", fullgraph=True)
    plain = scaled_rotary_table(positions, D, 10_000.0, config)
    torch.testing.assert_close(compiled(positions, D, 10_000.0, config), plain, rtol=0, atol=0)


def test_linear_divides_positions():
    scaled = scaled_rotary_table(4 * POSITIONS, D, 500.0, RopeScalingConfig("linear", LinearConfig(4.0)))
    plain = scaled_rotary_table(POSITIONS, D, 500.0, RopeScalingConfig())
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-5)


def test_llama_3_1():
    """Its shape: head dimension 128, base 500,000, factor 8, 8,192 tokens. The pairs 0 … 28 turn more than 4 times in
    2,048 tokens and stay; those from 36 on turn less than once in 8,192 and are divided."""
    found, length = angles_of(RopeScalingConfig("llama3", llama3=Llama3Config()), 500_000.0, 128)
    theta = [500_000.0 ** (-i / 64) for i in range(64)]
    turns = [8192 * x / (2 * math.pi) for x in theta]
    assert [sum(x > 4 for x in turns), sum(x >= 1 for x in turns)] == [29, 35]
    assert turns[30] == pytest.approx(2.7785, abs=1e-3)
    by_hand = theta[30] * (1 / 8 + 7 / 8 * (turns[30] - 1) / 3)
    assert found[30].item() == pytest.approx(by_hand, rel=1e-5)
    assert found[:29].tolist() == pytest.approx(theta[:29], rel=1e-5)
    assert found[35:].tolist() == pytest.approx([x / 8 for x in theta[35:]], rel=1e-5)
    torch.testing.assert_close(length, torch.ones_like(length), rtol=0, atol=1e-6)


def test_yarn():
    """Head dimension 128, base 10,000, factor 4 from 4,096 tokens: the ramp goes from pair 20 to pair 46."""
    found, length = angles_of(RopeScalingConfig("yarn", yarn=YarnConfig(4.0, 4096)), 10_000.0, 128)
    theta = [10_000.0 ** (-i / 64) for i in range(64)]
    start = 128 * math.log(4096 / (32 * 2 * math.pi)) / (2 * math.log(10_000))
    end = 128 * math.log(4096 / (2 * math.pi)) / (2 * math.log(10_000))
    assert (math.floor(start), math.ceil(end)) == (20, 46)
    expected = []
    for i, x in enumerate(theta):
        divided = min(max((i - 20) / 26, 0), 1)
        expected.append(divided * x / 4 + (1 - divided) * x)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(length, torch.full_like(length, 0.1 * math.log(4) + 1), rtol=1e-6, atol=0)
    _, length = angles_of(RopeScalingConfig("yarn", yarn=YarnConfig(4.0, 4096, attention_factor=2.0)), 10_000.0, 128)
    torch.testing.assert_close(length, torch.full_like(length, 2.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "setting, named",
    [
        ("kind=ntk", "rope_scaling.kind is 'ntk'"),
        ("linear.factor=0.5", "linear.factor is 0.5; it must be ≥ 1"),
        ("llama3.low_freq_factor=4", "low_freq_factor must be less than high_freq_factor"),
        ("llama3.original_context=0", "original_context is 0"),
        ("yarn.beta_slow=0", "beta_slow is 0.0; it must be > 0"),
        ("yarn.beta_fast=1", "beta_slow must be less than beta_fast"),
        ("yarn.attention_factor=.inf", "attention_factor is inf"),
    ],
)
def test_impossible_settings_are_named(tmp_path, setting, named):
    (tmp_path / "a.yaml").write_text("run: {dir: r}\ndata: {path: d}\n")
    assert load_config(tmp_path / "a.yaml", ["model.rope_scaling.kind=yarn"]).model.rope_scaling.kind == "yarn"
    with pytest.raises(ConfigError, match=named):
        load_config(tmp_path / "a.yaml", [f"model.rope_scaling.{setting}"])
