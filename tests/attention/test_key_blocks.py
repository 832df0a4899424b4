"""Attention over blocks of keys: softmax of all keys at once, however they came, and no copy of them all."""

import pytest
import torch
import torch.nn.functional as F

from lcpt.attention import key_blocks
from lcpt.attention.key_blocks import add_keys, attend_to_blocks, joined


def reference(q, k, v):
    """In float64, under a mask."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-14)])
@pytest.mark.parametrize("group", [1, 3])
def test_any_pieces_give_softmax_of_all_keys(dtype, tolerance, group, monkeypatch):
    monkeypatch.setattr(key_blocks, "BLOCK", 5)
    torch.manual_seed(0)
    blocks, lengths = (), []
    for tokens in (3, 1, 7, 2, 1, 1, 9):
        q = 3 * torch.randn(2, tokens, 2 * group, 8, dtype=dtype)
        k, v = torch.randn(2, 2, tokens, 2, 8, dtype=dtype)
        k[:, -1] *= 5  # denominators of blocks that differ much
        o, blocks = attend_to_blocks(q, blocks, k, v), add_keys(blocks, k, v)
        torch.testing.assert_close(o.double(), reference(q, *joined(blocks)), rtol=tolerance, atol=tolerance)
        assert o.dtype == dtype
        lengths = [k.shape[1] for k, _ in blocks]
    assert lengths == [4, 7, 4, 9]


def test_two_may_go_on_from_the_same_blocks():
    """As samples of one prompt do."""
    one = add_keys((), *torch.zeros(2, 1, 3, 1, 4))
    left, right = (add_keys(one, *torch.full((2, 1, 2, 1, 4), value)) for value in (1.0, 2.0))
    assert [joined(blocks)[0][0, :, 0, 0].tolist() for blocks in (one, left, right)] == [
        [0, 0, 0],
        [0, 0, 0, 1, 1],
        [0, 0, 0, 2, 2],
    ]


def test_kept_values_do_not_keep_what_they_were_cut_from():
    whole = torch.zeros(1, 10, 6, 4)
    (k, v), *_ = add_keys((), whole[:, :, 2:4], whole[:, :, 4:])
    assert k.untyped_storage().nbytes() == v.untyped_storage().nbytes() == whole.nbytes // 3


def test_no_tensor_is_as_large_as_all_keys(largest_tensor, monkeypatch):
    monkeypatch.setattr(key_blocks, "BLOCK", 64)
    blocks = ()
    for _ in range(30):
        blocks = add_keys(blocks, *torch.randn(2, 1, 64, 2, 8))
    q, k, v = torch.randn(3, 1, 16, 2, 8)
    with largest_tensor() as largest:
        attend_to_blocks(q, blocks, k, v)
        add_keys(blocks, k, v)
    assert largest.n_bytes <= 64 * 2 * 8 * 4
