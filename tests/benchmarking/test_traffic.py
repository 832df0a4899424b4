"""Counted bytes, against those that one counts by hand."""

import pytest
import torch
import torch.nn.functional as F
from lcpt_kernels import feature_attention

from lcpt.benchmarking.traffic import Traffic, traffic


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_operator_counts_with_all_that_it_reads_and_writes(device):
    x = torch.randn(3, 5, device=device)
    with Traffic() as moved:
        y = F.elu(x) + 1  # x read, elu written; elu read, y written
        y.view(15)[:10].expand(4, 10)  # views
        torch.empty(1000, device=device)
    assert (moved.bytes, moved.operators) == (4 * 15 * 4, 2)


def test_what_is_expanded_and_what_is_of_16_bits_counts_as_it_is():
    row = torch.randn(1, 5, dtype=torch.bfloat16).expand(3, 5)
    with Traffic() as moved:
        row + torch.randn(3, 5)
    assert moved.bytes == 2 * 5 + 4 * 15 + 4 * 15 + 4 * 15  # the last: randn writes


def test_traffic_counts_the_backward_pass_too():
    x = torch.randn(7, 2, requires_grad=True)
    counts = traffic(lambda x: (x.exp(),), [x])
    assert counts["forward"] == {"bytes": 2 * 56, "operators": 1}
    assert counts["forward_backward"] == {"bytes": 5 * 56, "operators": 2}  # dy and y read, dx written


def test_an_operator_of_kernels_counts_from_outside():
    q, v = (torch.randn(1, 100, 2, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    counts = traffic(lambda q, v: feature_attention(q, q, v)[:1], [q, v])
    one, sums = 2 * 100 * 2 * 16, 4 * 100 * 2
    assert counts["forward"] == {"bytes": 4 * one + sums, "operators": 1}  # q twice, v, o; Z
