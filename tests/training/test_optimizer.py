"""The optimizer: what decays, what clips, and a step that is skipped."""

import pytest
import torch

from lcpt.attention import AttentionConfig
from lcpt.model import GPT, ModelConfig
from lcpt.training.optimizer import ShardedAdamW, clip_factor, enter_step, parameter_groups
from lcpt.training.parameter_groups import ParameterGroup


def test_matrices_decay_and_vectors_do_not():
    model = GPT(ModelConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=20, attention=AttentionConfig("polysketch")))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, others = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {names[p] for p in others["params"]} == {
        "norm.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.feed_forward_norm.weight",
        "blocks.0.attention.q_norm.weight",
        "blocks.0.attention.q_norm.bias",
        "blocks.0.attention.k_norm.weight",
        "blocks.0.attention.k_norm.bias",
        "blocks.0.attention.gamma",
        "blocks.0.attention.key_shift",
    }
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    assert all(p.ndim >= 2 for p in decayed["params"])


@pytest.mark.parametrize("fused", [False, True])
def test_clipped_is_adamw_on_clipped_gradients(fused):
    torch.manual_seed(0)
    gradients = [torch.randn(7, 5) for _ in range(3)]
    ours, plain = (torch.nn.Parameter(torch.ones(7, 5)) for _ in range(2))
    optimizer, reference = ShardedAdamW([ours], lr=0.1, fused=fused), torch.optim.AdamW([plain], lr=0.1)
    for gradient, max_norm in zip(gradients, (1.0, 0.0, 1e6), strict=True):  # clipped, never, under the limit
        ours.grad, plain.grad = gradient.clone(), gradient.clone()
        optimizer.clip_factor = clip_factor(float(gradient.norm()), max_norm)
        optimizer.step()
        if max_norm:
            torch.nn.utils.clip_grad_norm_([plain], max_norm)
        reference.step()
        torch.testing.assert_close(ours, plain)


def test_a_skipped_step_changes_nothing():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = ShardedAdamW([parameter], lr=0.1)
    parameter.grad = torch.ones(3)
    optimizer.step()
    before, state = parameter.detach().clone(), {k: v.clone() for k, v in optimizer.state[parameter].items()}
    optimizer.clip_factor = None
    optimizer.step()
    assert parameter.equal(before) and all(v.equal(state[k]) for k, v in optimizer.state[parameter].items())
    optimizer.clip_factor = 1.0
    optimizer.step()
    assert not parameter.equal(before)


def test_a_frozen_group_waits_and_then_begins_anew():
    """Also where the step of the others is skipped; its gradient is left to whoever clears it."""
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    rules = ParameterGroup(), ParameterGroup(frozen_steps=2, lr_factor=0.5)
    groups = [{"params": [p], "rule": rule} for p, rule in zip((first, second), rules, strict=True)]
    optimizer = ShardedAdamW(groups, lr=0.1, weight_decay=0.0)
    for step, factor in ((1, 0.5), (2, None), (3, 0.5)):
        enter_step(optimizer, step, warmup_steps=0)
        assert [group["share"] for group in optimizer.param_groups] == [1.0, 0.5 if step == 3 else 0.0]
        for parameter, group in zip((first, second), optimizer.param_groups, strict=True):
            parameter.grad, group["lr"] = torch.ones(3), 0.1 * group["share"]
        optimizer.clip_factor = factor
        optimizer.step()
        assert len(optimizer.param_groups) == 2 and second.grad.tolist() == [factor if step == 3 else 1.0] * 3
        assert (second not in optimizer.state) == (step < 3)
    assert (int(optimizer.state[first]["step"]), int(optimizer.state[second]["step"])) == (2, 1)
    torch.testing.assert_close(first.data, torch.full((3,), 0.8))  # Adam's first steps are of the rate's size
    torch.testing.assert_close(second.data, torch.full((3,), 0.95))
