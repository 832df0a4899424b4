"""The steps around attention that have fused kernels, at the size of a layer, and the loss of a head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lcpt_kernels.add_norm import add_layer_norm, add_rms_norm
from lcpt_kernels.cross_entropy import linear_cross_entropy
from lcpt_kernels.feature_maps import FEATURE_MAPS, affine, feature_map, matrix_shapes
from lcpt_kernels.gated_activation import gated_activation
from lcpt_kernels.learned_sketch import learned_sketch
from lcpt_kernels.norm_rotary import norm_rotary
from lcpt_kernels.pooling import pool_blocks
from torch import Tensor

from lcpt.attention.base import rotary_table
from lcpt.benchmarking.attention_benchmark import WrongResult
from lcpt.benchmarking.attention_layer import Layer
from lcpt.benchmarking.kernel_cases import DTYPES
from lcpt.benchmarking.kernel_check import LIMITS

LIMIT_OF = {DTYPES[name]: limit for name, limit in LIMITS.items()}


class Step(NamedTuple):
    function: Callable[..., tuple[Tensor | None, ...]]  # of the inputs, and of backend
    inputs: list[Tensor]  # with gradients, but for tables and labels; the first is [B, ...]


def steps(
    layer: Layer,
    tokens: int,
    block_size: int = 256,
    summaries: int = 32,
    sketch: int = 32,
    vocabulary: int = 32000,
) -> dict[str, Step]:
    """Return the steps by name, with random inputs on the layer's device, which may be "meta"."""
    B, T, H, D, c, r = layer.batch, tokens, layer.heads, layer.head_dim, block_size, summaries

    def random(*shape: int, size: float = 1.0) -> Tensor:
        x = size * torch.randn(*shape, device=layer.device)
        return x.to(layer.dtype).requires_grad_()

    qkv = random(B, T, 3 * H, D)  # as a layer has them: a slice of each token's row
    x, v = qkv[:, :, :H].detach().requires_grad_(), qkv[:, :, 2 * H :].detach().requires_grad_()
    cos, sin = rotary_table(torch.arange(T, device=layer.device), D, 10_000.0)
    norm = [random(D), random(D), cos, sin]
    hidden = 2 * sketch
    up, down = random(2, D, hidden, size=D**-0.5), random(2, hidden, sketch, size=hidden**-0.5)
    blocks = [y[:, : T // c * c].unflatten(1, (-1, c)) for y in (x, v, random(B, T, H, r))]
    segments = torch.zeros(c, 1, r, device=layer.device)
    width = H * D  # of the residual stream; the loss is that of one sequence
    head = [random(1, T, width), random(vocabulary, width, size=width**-0.5)]
    labels = torch.randint(vocabulary, (1, T), device=layer.device)
    stream = [random(B, T, width), random(B, T, width), random(width)]
    packed = random(B, T, 2 * (8 * width // 3 // 8 * 8))  # as wide as lcpt.model makes it
    return {
        "cross_entropy": Step(lambda *x, **options: linear_cross_entropy(*x, **options)[:1], [*head, labels]),
        "cross_entropy, all logits": Step(as_tuple(loss_of_all_logits), [*head, labels]),
        "add_layer_norm": Step(add_layer_norm, stream),
        "add_rms_norm": Step(add_rms_norm, stream),
        "gated_activation, gelu": Step(as_tuple(gated_activation), [packed]),
        "gated_activation, silu": Step(as_tuple(partial(gated_activation, activation="silu")), [packed]),
        "norm_rotary": Step(norm_rotary, [x, *norm]),
        "norm_rotary, both": Step(partial(norm_rotary, keep_plain=True), [x, *norm]),
        "norm_rotary, key shift": Step(
            lambda *inputs, **options: norm_rotary(*inputs[:-1], key_shift=inputs[-1], **options),
            [x, *norm, random(H, D)],
        ),
        "linear_sketch": Step(as_tuple(affine), [x, random(H, D, sketch, size=D**-0.5), random(H, sketch)]),
        "learned_sketch": Step(
            as_tuple(lambda x, up, down, **options: learned_sketch(x, [up], [down], **options)), [x, up, down]
        ),
        **map_steps(x),
        "pool_blocks": Step(
            lambda k, v, logits, **options: pool_blocks(k, v, logits=logits, segments=segments, **options),
            [y.detach().requires_grad_() for y in blocks],
        ),
    }


def loss_of_all_logits(hidden: Tensor, weight: Tensor, labels: Tensor, backend: str) -> Tensor:
    """Compute the loss as one writes it, from logits [T, V] in fp32; with backend "triton" it is the fused one."""
    if backend == "triton":
        return linear_cross_entropy(hidden, weight, labels, backend=backend)[0]
    logits = (hidden @ weight.mT).flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels.flatten(), reduction="sum")


def map_steps(x: Tensor) -> dict[str, Step]:
    """Return a step for every feature map of the registry on x [B, T, H, D]; two for a map with an option: keys are
    mapped without it, queries with it."""
    found, (H, D) = {}, x.shape[2:]
    for name, entry in FEATURE_MAPS.items():
        matrices = []
        for shape in matrix_shapes(entry.matrices, H, D, entry.expansion * D, D // 4).values():
            w = torch.randn(shape, device=x.device)
            matrices.append(w if entry.fixed else (w * shape[1] ** -0.5).to(x.dtype).requires_grad_())
        function = partial(feature_map, name)
        if entry.options:
            found[f"{name}, keys"] = Step(as_tuple(function), [x, *matrices])
            function = partial(function, **dict.fromkeys(entry.options, True))
        found[f"{name}, queries" if entry.options else name] = Step(as_tuple(function), [x, *matrices])
    return found


def as_tuple(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    """Return `function` with its output in a tuple."""
    return lambda *inputs, **options: (function(*inputs, **options),)


def check(step: Step) -> None:
    """Raise WrongResult if an output or a gradient in Triton is farther from the float64 definition than rounding
    explains, or if its bits differ the second time."""
    found, again = (outputs_and_gradients(step.function, step.inputs, backend="triton") for _ in range(2))
    wide = [x.detach().double().requires_grad_() if x.requires_grad else in_float64(x) for x in step.inputs]
    exact = outputs_and_gradients(step.function, wide, backend="torch")
    limit = LIMIT_OF[step.inputs[0].dtype]
    for x, other, y in zip(found, again, exact, strict=True):
        if not torch.equal(x, other):
            raise WrongResult("the same inputs gave other bits the second time")
        if not (x - y).norm() <= limit * y.norm():  # NaN is wrong too
            raise WrongResult(f"a relative error of {(x - y).norm() / y.norm():.2g}, rounding explains {limit:g}")


def in_float64(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def outputs_and_gradients(function: Callable, inputs: list[Tensor], **options) -> list[Tensor]:
    outputs = [x for x in function(*inputs, **options) if x is not None]
    generator = torch.Generator(inputs[0].device).manual_seed(0)
    given = [torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) for x in outputs]
    return outputs + list(torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], given))
