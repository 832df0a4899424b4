"""A model that others build on the meta device, fill with a state and reset is the model of that state."""

import pytest
import torch

from lcpt.model import GPT
from tests.model.conftest import CONFIGS, V


@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_and_reset_buffers_make_it_whole(name):
    model, tokens = GPT(CONFIGS[name]), torch.randint(V, (2, 19))
    with torch.device("meta"):
        other = GPT(CONFIGS[name])
    other.to_empty(device="cpu")
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
    other.load_state_dict(model.state_dict())
    for module in other.modules():
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()
    assert torch.equal(other(tokens), model(tokens))
    assert all(torch.equal(x, y) for x, y in zip(other.buffers(), model.buffers(), strict=True))
