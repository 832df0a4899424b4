"""Build what an attention benchmark can time: kinds of attention as modules, kernels alone, and baselines."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from typing import cast

import torch
from lcpt_kernels import squared_attention
from torch import Tensor

from lcpt.attention import ATTENTION, Attention, AttentionConfig
from lcpt.attention.base import LinearCost, Projected, rotary_table
from lcpt.attention.polynomial import power_scale
from lcpt.attention.polysketch import DEGREE, Polysketch
from lcpt.attention.sketch import RandomSketch
from lcpt.benchmarking.attention_baselines import BASELINES, Unavailable
from lcpt.benchmarking.attention_layer import ROUNDED, Layer, Method
from lcpt.benchmarking.kernel_work import Size, block_causal_cost


def methods(names: list[str], config: AttentionConfig, layer: Layer) -> tuple[dict[str, Method], dict[str, str]]:
    """Build methods by name, and say why a baseline is left out. ValueError for a name that is not one of
    `known(layer.device)`."""
    if unknown := [name for name in names if name not in known(layer.device)]:
        raise ValueError(f"no method is called {', '.join(unknown)}; there are {', '.join(known(layer.device))}")
    found, left_out = {}, {}
    for name in names:
        try:
            found[name] = _method(name, config, layer)
        except Unavailable as error:
            left_out[name] = str(error)
    return found, left_out


def known(device: torch.device) -> list[str]:
    return [*ATTENTION, "squared", *baselines(device)]


def baselines(device: torch.device) -> dict[str, Callable[[Layer], Method]]:
    """List the baselines of a device by name."""
    return BASELINES.get(device.type, {})


def random_projections(layer: Layer, tokens: int) -> Projected:
    """Project random tokens, with gradients to every part; the gate is added by each kind."""
    with torch.no_grad():
        module = _module(AttentionConfig("softmax"), layer)
        module.keep_plain = True  # for the kinds that use them
        x = torch.randn(layer.batch, tokens, layer.d_model, device=layer.device).to(layer.dtype)
        p = module.project(x, rotary_table(torch.arange(tokens, device=layer.device), layer.head_dim, 10_000.0))
    given = {name: part for name, part in p._asdict().items() if part is not None}
    return p._replace(**{name: part.detach().requires_grad_() for name, part in given.items()})


def _method(name: str, config: AttentionConfig, layer: Layer) -> Method:
    if name in baselines(layer.device):
        return baselines(layer.device)[name](layer)
    return _squared(config, layer) if name == "squared" else _kind(name, config, layer)


def _module(config: AttentionConfig, layer: Layer) -> Attention:
    module = config.attention_of_layer(0)(layer.d_model, layer.heads, layer.heads, config)
    return module.to(layer.device, layer.dtype)


def _kind(kind: str, config: AttentionConfig, layer: Layer) -> Method:
    """Build a kind as a module. All between projections and output matrix is timed: sketch, maps, pooling, gate."""
    config = replace(config, kind=kind)
    module = _module(config, layer)
    exact = deepcopy(module).double()

    def inputs(p: Projected) -> list[Tensor]:
        return cast(list[Tensor], [p.q, p.k, p.v, p.q_plain, p.k_plain, p.x])

    def gated(attention, q, k, v, q_plain, k_plain, x) -> Projected:
        return Projected(q, k, v, attention.gate(x), q_plain, k_plain, x)

    def attend(*inputs: Tensor) -> Tensor:
        return module.attend(gated(module, *inputs))[0]

    def definition(*inputs: Tensor) -> Tensor:
        p = gated(exact, *inputs)
        if not isinstance(exact, LinearCost):
            return exact.attend(p)[0]
        return exact.attend_blocks(
            p,
            block_size=exact.block_size,
            local_blocks=exact.local_blocks,
            log_gate=p.log_gate,
            initial_state=None,
            output_final_state=False,
            cu_seqlens=None,
            backend="reference",
        )[0]

    settings = asdict(config).get(kind, {})
    if hasattr(module, "block_size"):
        settings["block_size"] = config.block_size
    if isinstance(module, LinearCost):
        settings["gate"] = config.gate
    weights, exact_weights = tuple(module.parameters()), tuple(exact.parameters())
    cost = _cost(module, config, layer)
    return Method(
        settings=settings,
        inputs=inputs,
        attend=attend,
        definition=definition,
        weights=weights,
        exact_weights=exact_weights,
        tolerance=ROUNDED,
        cost=cost,
        cost_of="triton",
    )


def _cost(module: Attention, config: AttentionConfig, layer: Layer) -> Callable[[int, str], tuple[float, float]] | None:
    """Count polysketch without a gate: the sketches, whose backward is twice their forward, and the kernels."""
    if not isinstance(module, Polysketch) or config.gate != "none":
        return None

    def cost(context: int, mode: str) -> tuple[float, float]:
        flops, n_bytes = block_causal_cost(layer.heads, _size(config, layer, context), mode)
        maps = (module.n_heads + module.n_kv_heads) * module.map_flops() * context
        return flops + maps * (3 if mode == "forward_backward" else 1), n_bytes

    return cost


def _size(config: AttentionConfig, layer: Layer, context: int) -> Size:
    own = config.polysketch
    return Size(
        tokens=context,
        head_dim=layer.head_dim,
        features=own.size,
        block_size=config.block_size,
        local_blocks=own.local_blocks,
        dtype=layer.dtype,
    )


def _squared(config: AttentionConfig, layer: Layer) -> Method:
    """Build the kernel of polysketch alone, on given sketches."""
    scale, shift = power_scale(DEGREE, config.polysketch.shift, layer.head_dim), config.polysketch.shift
    sketch = RandomSketch(layer.head_dim, config.polysketch.size, "gaussian", scale, shift).to(layer.device)
    options = {
        "degree": DEGREE,
        "scale": scale,
        "shift": shift,
        "block_size": config.block_size,
        "local_blocks": config.polysketch.local_blocks,
    }

    def inputs(p: Projected) -> list[Tensor]:
        a, b = (sketch(x.detach()).requires_grad_() for x in (p.q, p.k))
        return [a, b, p.v, p.q, p.k]

    def attend(a, b, v, q, k) -> Tensor:
        return squared_attention(a, b, v, q=q, k=k, **options)[0]

    def definition(a, b, v, q, k) -> Tensor:
        return squared_attention(a, b, v, q=q, k=k, **options, backend="reference")[0]

    def cost(context: int, mode: str) -> tuple[float, float]:
        return block_causal_cost(layer.heads, _size(config, layer, context), mode)

    return Method(
        settings={"size": config.polysketch.size, **options},
        inputs=inputs,
        attend=attend,
        definition=definition,
        cost=cost,
        cost_of="triton",
    )
