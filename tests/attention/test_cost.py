"""The stated cost of a layer: FLOPs, and bytes of state."""

import pytest
import torch

from lcpt.attention import ATTENTION, AttentionConfig
from lcpt.attention.base import Projected
from lcpt.attention.polysketch import PolysketchConfig
from lcpt.attention.summaries import SummariesConfig
from tests.attention.variants import BLOCK, D_MODEL, LINEAR, build


@pytest.mark.parametrize("variant", LINEAR)
def test_linear_cost_does_not_grow_with_the_context(variant):
    module = build(variant)
    assert module.attend_flops(1_000) == module.attend_flops(100_000)
    assert module.state_bytes(1_000) == module.state_bytes(100_000)
    assert sum(module.attend_flops(BLOCK)) < sum(module.attend_flops(BLOCK + 1))  # no state inside the first block


@pytest.mark.parametrize("kind", ["softmax", "polynomial"])
def test_cost_of_quadratic_kinds_grows_with_the_context(kind):
    """A token sees half the context on average: 2 products of T·D, 2 FLOPs a multiply-add."""
    module = build(kind)
    forward, backward = module.attend_flops(1_000)
    assert forward == 2 * 2 * D_MODEL * 1_000 / 2 and backward == 2.5 * forward
    assert module.attend_flops(3_000) == (3 * forward, 3 * backward)
    assert module.state_bytes(1_000) == 4 * 2 * D_MODEL * 1_000


@pytest.mark.parametrize("kind", [kind for kind in ATTENTION if kind != "softmax"])  # PyTorch counts no SDPA on a CPU
def test_stated_flops_are_what_pytorch_counts(kind):
    """Forward, and forward with backward, within 15 %: the column of ones, and tiles on the diagonal."""
    from torch.utils.flop_counter import FlopCounterMode

    context = 2048
    config = AttentionConfig(block_size=64, polysketch=PolysketchConfig(size=16))
    config.flurka.summaries = config.lowrank.summaries = SummariesConfig(projection="table")
    module = ATTENTION[kind](64, 2, 2, config)
    q, k, v, q_plain, k_plain = (torch.randn(1, context, 2, 32, requires_grad=True) for _ in range(5))
    p = Projected(q, k, v, None, q_plain, k_plain)
    with FlopCounterMode(display=False) as counter:
        o = module.attend(p)[0]
        forward = counter.get_total_flops() / context
        o.sum().backward()
        step = counter.get_total_flops() / context
    stated = module.attend_flops(context)
    assert forward == pytest.approx(stated[0], rel=0.15)
    assert step == pytest.approx(sum(stated), rel=0.15)
