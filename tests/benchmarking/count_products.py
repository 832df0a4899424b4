"""Run with TRITON_INTERPRET=1: what the kernels of one head really multiply and are given, per kernel, as JSON.

count_products.py squared TOKENS HEAD_DIM SKETCH BLOCK_SIZE LOCAL_BLOCKS
                  flurka TOKENS HEAD_DIM FEATURES BLOCK_SIZE SUMMARIES
                  sparse TOKENS HEAD_DIM BUCKETS, 0: half of the tokens are kept
                  heads TOKENS HEAD_DIM SKETCH: what is before squared attention
"""

import json
import sys
from collections import defaultdict

import torch
from lcpt_kernels import flurka_attention, sparse_attention, squared_attention
from lcpt_kernels.feature_maps import affine
from lcpt_kernels.norm_rotary import norm_rotary
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from lcpt.benchmarking.interval_work import random_marks

SMALL = {"blocks", "pair_table", "documents"}  # tables that heads share, weights, and the gradients of these
SMALL |= {"weight", "bias", "key_shift", "shares", "affine_shares", "shift_shares", "W", "dW"}
running, flops, n_bytes = [], defaultdict(float), defaultdict(float)
dot, run = InterpreterBuilder.create_dot, InterpretedFunction.run


def counted_dot(self, a, b, *rest):
    flops[running[-1]] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
    return dot(self, a, b, *rest)


def counted_run(self, *args, **kwargs):
    given = dict(zip(self.arg_names, args, strict=False)) | kwargs
    tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor) and name not in SMALL}
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
    marks = random_marks(tokens, buckets=buckets) if buckets else random_marks(tokens, kept=0.5)
    return sparse_attention(*rows(tokens, dim, dim, dim), **marks, backend="triton")


def heads(tokens, dim, sketch):
    q, k = rows(tokens, dim, dim)
    weight, bias, shift = torch.randn(dim), torch.randn(dim), torch.randn(1, dim)
    angles = torch.randn(tokens, 1, dim // 2)
    W, b = torch.randn(1, dim, sketch, requires_grad=True), torch.randn(1, sketch, requires_grad=True)
    of_q, of_k = (
        norm_rotary(x, weight, bias, angles.cos(), angles.sin(), key_shift=m, backend="triton")[0]
        for x, m in ((q, None), (k, shift))
    )
    return affine(of_q, W, b, backend="triton") + affine(of_k, W, b, backend="triton")


InterpreterBuilder.create_dot, InterpretedFunction.run = counted_dot, counted_run
torch.manual_seed(0)
o = {"squared": squared, "flurka": flurka, "sparse": sparse, "heads": heads}[sys.argv[1]](*map(int, sys.argv[2:]))
forward = dict(flops), dict(n_bytes)
o.sum().backward()
both = flops, n_bytes
print(json.dumps({"forward": forward, "forward_backward": both}))
