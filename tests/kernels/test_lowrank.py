"""lowrank_attention against its definition."""

import pytest
import torch
from lcpt_kernels import lowrank_attention

C, R = 6, 2


def inputs(t, *, b=2, h=4, hkv=2, d=8, dv=5, m=3, dtype=torch.float64):
    torch.manual_seed(0)
    n = t // C * R
    made = {
        "q": torch.randn(b, t, h, d),
        "k": torch.randn(b, t, hkv, d),
        "v": torch.randn(b, t, hkv, dv),
        "q_far": torch.randn(b, t, h, m),
        "k_summary": torch.randn(b, n, hkv, m),
        "v_summary": torch.randn(b, n, hkv, dv),
    }
    return {name: x.to(dtype) for name, x in made.items()}


@pytest.mark.parametrize("local_blocks", [1, 2])
@pytest.mark.parametrize("t", [1, 5, 6, 7, 24, 31])
def test_agrees_with_the_definition(agree, local_blocks, t):
    agree(lowrank_attention, inputs(t), 1e-10, block_size=C, summaries=R, local_blocks=local_blocks)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_precision(agree, dtype, tolerance):
    agree(lowrank_attention, inputs(200, d=64, dv=64, m=64, dtype=dtype), tolerance, block_size=C, summaries=R)


def test_by_hand():
    """One head: two summaries of the first block of six, each standing for three tokens, and the block after it."""
    given = inputs(8, b=1, h=1, hkv=1)
    o = lowrank_attention(**given, summaries=R, block_size=C, local_blocks=1, scale=0.5)
    q, k, v, q_far, k_state, v_state = (x[0, :, 0] for x in given.values())
    local, state = (0.5 * q[7] @ k[6:].T).exp(), 3 * (0.5 * q_far[7] @ k_state.T).exp()
    torch.testing.assert_close(o[0, 7, 0], (local @ v[6:] + state @ v_state) / (local.sum() + state.sum()))


@pytest.mark.parametrize("n", [1, C - 1, C, 2 * C, 3 * C + 1])
def test_later_queries_alone(n):
    """Queries n … T against the keys from a block's beginning on give what they give in the whole."""
    t, given = 4 * C + 2, inputs(4 * C + 2)
    whole = lowrank_attention(**given, summaries=R, block_size=C)
    first = max(0, n // C - 1) * C
    later = {name: x[:, n:] if name in ("q", "q_far") else x for name, x in given.items()}
    later |= {name: given[name][:, first:] for name in ("k", "v")}
    for backend in ("torch", "reference"):
        found = lowrank_attention(**later, summaries=R, block_size=C, backend=backend)
        torch.testing.assert_close(found, whole[:, n:t], rtol=1e-10, atol=1e-10)


def test_packed_documents_are_documents_alone():
    lengths = [C, 4, 2 * C + 1, 3]
    given, ends = inputs(sum(lengths), b=1), [0, 6, 10, 23, 26]
    rows = [0, R, R, 3 * R, 3 * R]
    assert given["k_summary"].shape[1] > 3 * R  # the rest is seen by none
    packed = lowrank_attention(**given, summaries=R, block_size=C, cu_seqlens=torch.tensor(ends))
    for n in range(4):
        alone = {
            name: x[:, rows[n] : rows[n + 1]] if "summary" in name else x[:, ends[n] : ends[n + 1]]
            for name, x in given.items()
        }
        o = lowrank_attention(**alone, summaries=R, block_size=C)
        torch.testing.assert_close(packed[:, ends[n] : ends[n + 1]], o, rtol=1e-12, atol=1e-12)


def test_missing_summaries_are_named():
    given = inputs(31)
    given["k_summary"] = given["k_summary"][:, :8]
    with pytest.raises(ValueError, match="8 rows"):
        lowrank_attention(**given, summaries=R, block_size=C)
    given = {name: x[:1] for name, x in given.items()}
    with pytest.raises(ValueError, match="8 rows; 2 summaries of every whole block of 6 tokens are 10"):
        lowrank_attention(**given, summaries=R, block_size=C, cu_seqlens=torch.tensor([0, 31]))
