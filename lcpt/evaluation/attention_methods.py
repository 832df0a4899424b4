"""What an attention benchmark can time: kinds of attention as modules, kernels alone, and baselines of a device."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lcpt_kernels import squared_attention
from torch import Tensor

from lcpt.attention import ATTENTION, AttentionConfig
from lcpt.attention.base import LinearCost, Projected, rotary_table
from lcpt.attention.polysketch import DEGREE
from lcpt.attention.sketch import RandomSketch


class Layer(NamedTuple):
    """Of what size the attention is, in what it computes, and where."""

    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def d_model(self) -> int:
        return self.heads * self.head_dim


class Method(NamedTuple):
    settings: dict
    inputs: Callable[[Projected], list[Tensor]]  # what is ready before the clock starts
    attend: Callable[..., Tensor]  # of the inputs -> o [B, T, H, D]: what is timed
    definition: Callable[..., Tensor]  # of the inputs in float64 -> the same, as it should be
    weights: tuple[Tensor, ...] = ()  # that learn, of `attend`
    exact_weights: tuple[Tensor, ...] = ()  # the same in float64, of `definition`


def methods(names: list[str], config: AttentionConfig, layer: Layer) -> dict[str, Method]:
    """ValueError for a name that is none of `known(layer.device)`."""
    if unknown := [name for name in names if name not in known(layer.device)]:
        raise ValueError(f"no method is called {', '.join(unknown)}; there are {', '.join(known(layer.device))}")
    return {name: _method(name, config, layer) for name in names}


def known(device: torch.device) -> list[str]:
    return [*ATTENTION, "squared", *baselines(device)]


def baselines(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """name -> softmax attention of q, k, v [B, H, T, D], causal -> [B, H, T, D]: what others are compared with."""
    return BASELINES.get(device.type, {})


def projected(layer: Layer, tokens: int) -> Projected:
    """Of random tokens, with gradients to every part of it; the gate is each kind's own."""
    with torch.no_grad():
        module = _module(AttentionConfig("softmax"), layer)
        x = torch.randn(layer.batch, tokens, layer.d_model, device=layer.device).to(layer.dtype)
        p = module.project(x, rotary_table(torch.arange(tokens, device=layer.device), layer.head_dim, 10_000.0))
    return Projected(*(part if part is None else part.detach().requires_grad_() for part in p))


def _method(name: str, config: AttentionConfig, layer: Layer) -> Method:
    if name in baselines(layer.device):
        return _baseline(baselines(layer.device)[name])
    return _squared(config, layer) if name == "squared" else _kind(name, config, layer)


def _module(config: AttentionConfig, layer: Layer):
    module = config.attention_of_layer(0)(layer.d_model, layer.heads, layer.heads, config)
    return module.to(layer.device, layer.dtype)


def _kind(kind: str, config: AttentionConfig, layer: Layer) -> Method:
    """Everything between projections and output matrix is timed: sketch, feature maps, pooling, gate."""
    config = replace(config, kind=kind)
    module = _module(config, layer)
    exact = deepcopy(module).double()

    def inputs(p: Projected) -> list[Tensor]:
        return [p.q, p.k, p.v, p.q_plain, p.k_plain, p.x]

    def gated(attention, q, k, v, q_plain, k_plain, x) -> Projected:
        return Projected(q, k, v, attention.gate(x), q_plain, k_plain, x)

    def attend(*inputs: Tensor) -> Tensor:
        return module.attend(gated(module, *inputs))[0]

    def definition(*inputs: Tensor) -> Tensor:
        p = gated(exact, *inputs)
        if not isinstance(exact, LinearCost):
            return exact.attend(p)[0]
        return exact.attend_blocks(
            p, block_size=exact.block_size, local_blocks=exact.local_blocks, log_gate=p.log_gate, initial_state=None,
            output_final_state=False, cu_seqlens=None, backend="reference",
        )[0]

    settings = asdict(config).get(kind, {})
    if hasattr(module, "block_size"):
        settings["block_size"] = config.block_size
    if isinstance(module, LinearCost):
        settings["gate"] = config.gate
    return Method(settings, inputs, attend, definition, tuple(module.parameters()), tuple(exact.parameters()))


def _squared(config: AttentionConfig, layer: Layer) -> Method:
    """The kernel of polysketch alone, on sketches that are given."""
    sketch = RandomSketch(layer.head_dim, config.polysketch.size, "gaussian").to(layer.device)
    stream = {"degree": DEGREE, "scale": 1 / layer.head_dim, "block_size": config.block_size,
              "local_blocks": config.polysketch.local_blocks}

    def inputs(p: Projected) -> list[Tensor]:
        a, b = (sketch(x.detach()).requires_grad_() for x in (p.q, p.k))
        return [a, b, p.v, p.q, p.k]

    def attend(a, b, v, q, k) -> Tensor:
        return squared_attention(a, b, v, q=q, k=k, **stream)[0]

    def definition(a, b, v, q, k) -> Tensor:
        return squared_attention(a, b, v, q=q, k=k, **stream, backend="reference")[0]

    return Method({"size": config.polysketch.size, **stream}, inputs, attend, definition)


def _baseline(sdpa: Callable[..., Tensor]) -> Method:
    def inputs(p: Projected) -> list[Tensor]:
        return [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (p.q, p.k, p.v)]

    def attend(q, k, v) -> Tensor:
        return sdpa(q, k, v).transpose(1, 2)

    def definition(q, k, v) -> Tensor:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2)

    return Method({}, inputs, attend, definition)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


BASELINES: dict[str, dict[str, Callable[..., Tensor]]] = {"cpu": {"sdpa_cpu": _sdpa}}  # by type of device
