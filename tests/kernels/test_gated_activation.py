"""gated_activation in PyTorch: its definition, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from lcpt_kernels import gated_activation


@pytest.mark.parametrize("activation, function", [("gelu", F.gelu), ("silu", F.silu)])
def test_is_the_activation_of_the_first_half_times_the_second(activation, function):
    packed = torch.randn(2, 3, 10)
    gate, value = packed[..., :5], packed[..., 5:]
    assert torch.equal(gated_activation(packed, activation=activation), function(gate) * value)
    assert torch.equal(gated_activation(packed), F.gelu(gate) * value)


@pytest.mark.parametrize(
    "packed, options, named",
    [
        (torch.zeros(3, 5), {}, "packed is 5 wide"),
        (torch.zeros(3, 0), {}, "packed is 0 wide"),
        (torch.zeros(()), {}, "packed has 0 dimensions"),
        (torch.zeros(3, 4), {"activation": "relu"}, "activation 'relu' is none of gelu, silu"),
        (torch.zeros(3, 4), {"backend": "reference"}, "backend 'reference' is none of auto, torch, triton"),
        (torch.zeros(3, 4), {"backend": "triton"}, "backend triton: tensors are on cpu"),
    ],
)
def test_errors_name_what_does_not_fit(packed, options, named):
    with pytest.raises(ValueError, match=named):
        gated_activation(packed, **options)
