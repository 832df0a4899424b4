"""Run with TRITON_INTERPRET=1: what the kernels of one head really multiply and are given, per kernel, as JSON.

count_products.py TOKENS HEAD_DIM SKETCH BLOCK_SIZE LOCAL_BLOCKS
"""

import json
import sys
from collections import defaultdict

import torch
from lcpt_kernels import squared_attention
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

TABLES = {"blocks", "pair_table", "documents"}  # shared by all heads, and small
running, flops, n_bytes = [], defaultdict(float), defaultdict(float)
dot, run = InterpreterBuilder.create_dot, InterpretedFunction.run


def counted_dot(self, a, b, *rest):
    flops[running[-1]] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
    return dot(self, a, b, *rest)


def counted_run(self, *args, **kwargs):
    given = dict(zip(self.arg_names, args, strict=False)) | kwargs
    tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor) and name not in TABLES}
    name = self.fn.__name__.removesuffix("_kernel")
    running.append(name)
    flops[name] += 0
    n_bytes[name] += sum(x.numel() * x.element_size() for x in tensors.values())
    return run(self, *args, **kwargs)


InterpreterBuilder.create_dot, InterpretedFunction.run = counted_dot, counted_run
tokens, dim, sketch, block_size, local_blocks = map(int, sys.argv[1:])
torch.manual_seed(0)
leaves = {name: torch.randn(1, tokens, 1, sketch if name in "ab" else dim, requires_grad=True) for name in "abvqk"}
o, _ = squared_attention(**leaves, block_size=block_size, local_blocks=local_blocks, backend="triton")
forward = dict(flops), dict(n_bytes)
o.sum().backward()
both = flops, n_bytes
print(json.dumps({"forward": forward, "forward_backward": both}))
