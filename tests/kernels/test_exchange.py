"""Several ranks that share a sequence, played one after the other in one process."""

import itertools

import pytest
import torch
from lcpt_kernels import State, squared_attention
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.test_streaming import FAMILIES, OFFSET, C, cut, squared, with_gradients


class Ranks:
    """An exchange for one rank after the other: what a rank says is kept for those behind it."""

    def __init__(self, starts):
        self.starts, self.tails, self.states, self.rank = starts, [], [], 0

    @property
    def start(self):
        return self.starts[self.rank]

    def shift(self, tensors):
        self.tails.append(tensors)
        return self.tails[self.rank - 1] if self.rank else {name: x[:, :0] for name, x in tensors.items()}

    def before(self, S, log_decay):
        self.states.append((S, log_decay))
        before = torch.zeros_like(S)
        for own, decay in self.states[: self.rank]:
            before = own + (before if decay is None else before * decay.exp()[..., None, None])
        return before


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
@pytest.mark.parametrize("local_blocks", [1, 2])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("starts", [[0, 4 * C], [0, 2 * C, 4 * C, 7 * C], [0, 2 * C + 1, 5 * C - 1]], ids=str)
def test_ranks_make_the_whole(function, inputs, shape, local_blocks, gated, starts):
    """Output and every gradient, also where a block lies on two ranks."""
    tokens = 10 * C + 2
    options = {"block_size": C, "local_blocks": local_blocks, **OFFSET}
    arguments = inputs(tokens, gated=gated, **shape)

    def shared(leaves):
        ranks, outputs = Ranks(starts), []
        for ranks.rank, (start, stop) in enumerate(itertools.pairwise([*starts, tokens])):
            outputs.append(function(**cut(leaves, start, stop), exchange=ranks, **options)[0])
        return torch.cat(outputs, dim=1)

    whole = with_gradients(arguments, lambda leaves: function(**leaves, **options)[0])
    found = with_gradients(arguments, shared)
    for name, expected in whole.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_what_is_exchanged_does_not_grow():
    """A rank tells fewer than ℓ·c tokens and one state, however many tokens it holds."""
    said = []
    for tokens in (4 * C, 40 * C):
        ranks = Ranks([0])
        squared_attention(**squared(tokens + 1), exchange=ranks, block_size=C, local_blocks=2)
        said.append(sum(x.numel() for x in ranks.tails[0].values()) + ranks.states[0][0].numel())
        assert ranks.tails[0]["v"].shape[1] < 2 * C
    assert said[0] == said[1]


@pytest.mark.parametrize("function, inputs, shape", FAMILIES)
@pytest.mark.parametrize("local_blocks", [1, 2])
def test_no_product_is_computed_twice(function, inputs, shape, local_blocks):
    """A rank computes what one call with a state before and a state after computes, forwards and backwards."""
    options = {"block_size": C, "local_blocks": local_blocks, **OFFSET}
    arguments = {name: x.requires_grad_() for name, x in inputs(7 * C, h=2, **shape).items()}
    _, state = function(**cut(arguments, 0, C), output_final_state=True, **options)
    nothing = State(state.S.detach(), {name: x[:, :0].detach() for name, x in state.tail.items()})

    def operations(**past):
        with FlopCounterMode(display=False) as counter:
            o, after = function(**arguments, output_final_state=True, **past, **options)
            (o.sum() + after.S.sum()).backward()
        return counter.get_total_flops()

    assert 0 < operations(exchange=Ranks([0])) <= operations(initial_state=nothing)


def test_too_few_tokens_and_two_pasts_are_refused():
    with pytest.raises(ValueError, match="11 tokens.* 12 are the least"):
        squared_attention(**squared(2 * C - 1), exchange=Ranks([0]), block_size=C, local_blocks=2)
    _, state = squared_attention(**squared(3 * C), output_final_state=True, block_size=C)
    with pytest.raises(ValueError, match="give one"):
        squared_attention(**squared(3 * C), initial_state=state, exchange=Ranks([0]), block_size=C)
