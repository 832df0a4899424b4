"""Run with TRITON_INTERPRET=1: what the kernels of one head really multiply and are given, per kernel, as JSON.

count_products.py squared TOKENS HEAD_DIM SKETCH BLOCK_SIZE LOCAL_BLOCKS
                  flurka TOKENS HEAD_DIM FEATURES BLOCK_SIZE SUMMARIES
                  sparse TOKENS HEAD_DIM BUCKETS
"""

import json
import sys
from collections import defaultdict

import torch
from lcpt_kernels import flurka_attention, sparse_attention, squared_attention
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from lcpt.benchmarking.interval_work import random_marks

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


def rows(tokens, *widths):
    return [torch.randn(1, tokens, 1, width, requires_grad=True) for width in widths]


def squared(tokens, dim, sketch, block_size, local_blocks):
    a, b, v, q, k = rows(tokens, sketch, sketch, dim, dim, dim)
    options = dict(block_size=block_size, local_blocks=local_blocks, backend="triton")
    return squared_attention(a, b, v, q=q, k=k, **options)[0]


def flurka(tokens, dim, features, block_size, summaries):
    given = rows(tokens, dim, dim, dim, features) + rows(tokens // block_size * summaries, features, dim)
    return flurka_attention(*given, block_size=block_size, backend="triton")[0]


def sparse(tokens, dim, buckets):
    return sparse_attention(*rows(tokens, dim, dim, dim), **random_marks(tokens, buckets=buckets), backend="triton")


InterpreterBuilder.create_dot, InterpretedFunction.run = counted_dot, counted_run
torch.manual_seed(0)
o = {"squared": squared, "flurka": flurka, "sparse": sparse}[sys.argv[1]](*map(int, sys.argv[2:]))
forward = dict(flops), dict(n_bytes)
o.sum().backward()
both = flops, n_bytes
print(json.dumps({"forward": forward, "forward_backward": both}))
