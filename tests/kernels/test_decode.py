"""Sequences that go on token by token: what reads them, and the memory that their keys grow in."""

import pytest
import torch
from lcpt_kernels import in_pytorch, squared_attention
from torch.utils._pytree import tree_map_only

from tests.kernels.test_streaming import FAMILIES, OFFSET, C, cut, squared


def continued(function, arguments, start, stop, state=None, **options):
    """Return the outputs of tokens start … stop, one call each, and the states after them."""
    outputs, states = [], []
    for t in range(start, stop):
        o, state = function(**cut(arguments, t, t + 1), initial_state=state, output_final_state=True, **options)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, dim=1), states


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
@pytest.mark.parametrize("local_blocks, gated, hkv", [(1, True, 2), (2, True, 1), (1, False, 4), (2, False, 2)])
def test_tokens_one_by_one_are_the_whole(function, inputs, shape, local_blocks, gated, hkv):
    """From the first token of all, over the borders of blocks."""
    tokens, options = 4 * C + 2, {"block_size": C, "local_blocks": local_blocks, **OFFSET}
    arguments = inputs(tokens, **shape | {"gated": gated, "hkv": hkv})
    o, states = continued(function, arguments, 0, tokens, backend="torch", **options)
    expected, _ = function(**arguments, **options, backend="reference")
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-10)
    _, at_once = function(**arguments, **options, output_final_state=True, backend="torch")
    torch.testing.assert_close(states[-1].S, at_once.S, rtol=1e-10, atol=1e-10)
    for name, x in at_once.tail.items():
        assert torch.equal(states[-1].tail[name], x), name


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
def test_blocks_are_read_only_where_one_leaves(monkeypatch, function, inputs, shape):
    """Any other token is one product with the state, which stays, and its keys are written behind those before."""
    lengths, attention = [], in_pytorch.attention

    def noted(plan, q, a, keys, *others):
        lengths.append(keys["v"].shape[1])
        return attention(plan, q, a, keys, *others)

    monkeypatch.setattr(in_pytorch, "attention", noted)
    arguments = inputs(3 * C, **shape)
    _, states = continued(function, arguments, 0, 3 * C, block_size=C, local_blocks=1, backend="torch")
    assert lengths == [1, C, C, C]
    inside = states[C + 1 : 2 * C - 1]
    assert len({state.S.data_ptr() for state in inside}) == len({x.tail["v"].data_ptr() for x in inside}) == 1


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
def test_a_state_that_goes_on_twice(function, inputs, shape):
    """Neither continuation sees the other's tokens, and the state before both is as it was."""
    options = {"block_size": C, "local_blocks": 2, "backend": "torch"}
    arguments = inputs(2 * C - 2, **shape)
    others = arguments | {name: -x for name, x in arguments.items() if name == "v"}
    _, states = continued(function, arguments, 0, C + 1, **options)
    before = {name: x.clone() for name, x in states[-1].tail.items()}
    first, after_first = continued(function, arguments, C + 1, C + 3, states[-1], **options)
    second, _ = continued(function, others, C + 1, C + 3, states[-1], **options)
    first_again, _ = continued(function, arguments, C + 3, C + 4, after_first[-1], **options)
    expected, _ = function(**cut(arguments, 0, C + 4), **options)
    torch.testing.assert_close(torch.cat((first, first_again), dim=1), expected[:, C + 1 :], rtol=1e-10, atol=1e-10)
    joined = cut(arguments, 0, C + 3)
    joined["v"] = torch.cat((arguments["v"][:, : C + 1], others["v"][:, C + 1 : C + 3]), dim=1)
    expected, _ = function(**joined, **options)
    torch.testing.assert_close(second, expected[:, C + 1 :], rtol=1e-10, atol=1e-10)
    assert all(torch.equal(states[-1].tail[name], x) for name, x in before.items())


def test_copies_of_a_state_grow_on_their_own():
    """As those of several continuations of one prompt do."""
    options, arguments = {"block_size": C, "backend": "torch"}, squared(4, b=1)
    _, (*_, state) = continued(squared_attention, arguments, 0, 3, **options)
    twice = tree_map_only(torch.Tensor, lambda x: x.repeat_interleave(2, dim=0), state)
    last = {name: torch.cat((x, -x)) if name == "v" else x.repeat_interleave(2, dim=0) for name, x in arguments.items()}
    o, _ = continued(squared_attention, last, 3, 4, twice, **options)
    expected, _ = squared_attention(**arguments, **options)
    torch.testing.assert_close(o[:1], expected[:, 3:], rtol=1e-10, atol=1e-10)
    assert not torch.equal(o[0], o[1])


def test_a_state_of_inference_mode_goes_on_outside():
    options, arguments = {"block_size": C, "backend": "torch"}, squared(4)
    with torch.inference_mode():
        _, (*_, state) = continued(squared_attention, arguments, 0, 3, **options)
    o, _ = continued(squared_attention, arguments, 3, 4, state, **options)
    torch.testing.assert_close(o, squared_attention(**arguments, **options)[0][:, 3:], rtol=1e-10, atol=1e-10)


def test_a_transform_is_refused():
    options, arguments = {"block_size": C, "backend": "torch"}, squared(3)
    _, (*_, state) = continued(squared_attention, arguments, 0, 2, **options)

    def output(v):
        return squared_attention(**cut(arguments, 2, 3) | {"v": v}, initial_state=state, **options)[0]

    with pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.vmap(output)(cut(arguments, 2, 3)["v"][None])


def test_a_token_may_need_gradients():
    """Then its state and keys are read as those of any other piece."""
    options = {"block_size": C, "backend": "torch"}
    arguments = squared(4)
    _, (*_, state) = continued(squared_attention, arguments, 0, 3, **options)
    last = {name: x.requires_grad_() for name, x in cut(arguments, 3, 4).items()}
    squared_attention(**last, initial_state=state, **options)[0].sum().backward()
    assert all(x.grad is not None for x in last.values())
