"""Tensors of more than 2³¹ numbers, of which few are touched."""

import numpy as np
import torch
from lcpt_kernels import squared_attention

from tests.kernels.conftest import relative_error
from tests.kernels.triton.conftest import DEVICE, INTERPRETED

C, T, STRIDE, D = 16, 67, 2**25, 16  # the last token stands at 2.1e9


def test_offsets_of_64_bits(monkeypatch):
    if INTERPRETED:  # it would copy all of the memory onto itself
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
        memory = torch.from_numpy(np.empty((T, STRIDE), dtype=np.float16))
    else:
        memory = torch.cuda.FloatTensor(T, STRIDE).half()
    torch.manual_seed(0)
    small = torch.randn(T, 6 * D, dtype=torch.float16, device=DEVICE) / 4
    memory[:, : 6 * D] = small

    def run(rows):
        q, k, v, a, b, do = (x[None, :, None] for x in rows.split(D, dim=1))
        leaves = [x.detach().requires_grad_() for x in (a, b, v, q, k)]
        a, b, v, q, k = leaves
        o, _ = squared_attention(a, b, v, q=q, k=k, block_size=C, scale=1 / 16, backend="triton")
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    for found, expected in zip(run(memory[:, : 6 * D]), run(small), strict=True):
        assert torch.equal(found, expected), relative_error(found, expected)
