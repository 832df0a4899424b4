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


def test_what_changes_in_place_is_read_and_written_and_what_is_only_written_once():
    x, y = torch.randn(2, 3, 5)
    with Traffic() as moved:
        x.mul_(y)  # x and y read, x written
        torch.mul(x, y, out=torch.empty(3, 5))  # x and y read, another written
    assert (moved.bytes, moved.operators) == (6 * 4 * 15, 2)


def test_a_kernel_that_works_in_place_counts_so():
    pytest.importorskip("triton")
    import lcpt_kernels.triton.fused.cross_entropy  # noqa: F401, which defines the operator

    logits, labels = torch.empty(7, 48, device="meta"), torch.empty(7, dtype=torch.int32, device="meta")
    with Traffic() as moved:
        torch.ops.lcpt_kernels.cross_entropy_(logits, labels, 37, 0.0)
    assert (moved.bytes, moved.operators) == (2 * 4 * 7 * 48 + 4 * 7 + 4 * 7, 1)  # logits twice, labels, losses


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
