"""lowrank_attention, backend="triton", against the definition: output and every gradient."""

from functools import partial

import pytest
import torch
from lcpt_kernels import lowrank_attention
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.triton.conftest import DEVICE

C, R = 20, 3  # tokens and summaries of a block


@pytest.fixture
def agree(agree, small_tiles):
    return partial(agree, attention=lowrank_attention)


def inputs(t, *, n=None, past=0, b=1, h=1, hkv=None, d=16, dv=16, m=16):
    torch.manual_seed(0)
    hkv, n = hkv or h, (past + t) // C if n is None else n
    shapes = {
        "q": (b, t, h, d),
        "k": (b, past + t, hkv, d),
        "v": (b, past + t, hkv, dv),
        "q_far": (b, t, h, m),
        "k_summary": (b, n * R, hkv, m),
        "v_summary": (b, n * R, hkv, dv),
    }
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("t, local_blocks", [(2, 2), (C - 1, 1), (2 * C, 1), (2 * C + 1, 2), (4 * C + 7, 2)])
def test_every_length(agree, t, local_blocks):
    agree(inputs(t), block_size=C, summaries=R, local_blocks=local_blocks)


@pytest.mark.parametrize("shape", [{"h": 4, "hkv": 2, "dv": 7}, {"b": 2, "m": 5}, {"m": 40, "d": 20}], ids=str)
def test_shapes(agree, shape):
    agree(inputs(3 * C + 1, **shape), block_size=C, summaries=R, scale=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(agree, dtype):
    agree(inputs(4 * C, d=64, dv=64, m=64), 5e-3, dtype=dtype, block_size=C, summaries=R)


def test_keys_of_earlier_blocks(agree):
    """The last 13 tokens of eight blocks and a half, the keys of the last two blocks and a half."""
    agree(inputs(13, past=2 * C, n=7, h=2), block_size=C, summaries=R)


def test_packed_documents(agree):
    lengths = [C, 1, 2 * C + 1, 0, 3, 0, 0]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    agree(inputs(sum(lengths), n=3), block_size=C, summaries=R, local_blocks=1, cu_seqlens=ends)


def test_lengths_share_one_graph():
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lowrank_attention, fullgraph=True, backend=count)
    for t in (C + 1, C + 2, 2 * C + 1):
        given = {name: x.float().to(DEVICE) for name, x in inputs(t, n=2).items()}
        options = {"block_size": C, "summaries": R, "backend": "triton"}
        assert torch.equal(compiled(**given, **options), lowrank_attention(**given, **options))
    assert count.frame_count == 2  # for the first length, and for any
