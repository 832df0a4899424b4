"""Time and memory of attention, method beside method, each after it has shown that it is right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lcpt.attention.base import Projected
from lcpt.evaluation.attention_methods import Layer, Method, baselines, projected
from lcpt.evaluation.timing import time_in_turn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ("forward", "forward_backward")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}  # of a kernel: DESIGN.md, section 5
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of a module, which rounds its sketches and feature maps too


class WrongResult(ValueError):
    """A method whose output or gradient is not what its definition says."""


def check(name: str, method: Method, layer: Layer, tokens: int) -> None:
    """Compare output and every gradient with the definition in float64, on the same rounded inputs.

    WrongResult if ‖found − exact‖ / ‖exact‖ of one of them is more than rounding explains. `tokens` should be more
    than three blocks, so that there is a state.
    """
    limit = (ROUNDED if method.weights else TOLERANCE)[layer.dtype]
    given = method.inputs(projected(layer, tokens))
    exact_given = [x.detach().double().requires_grad_() for x in given]
    o, exact_o = method.attend(*given), method.definition(*exact_given)
    do = torch.randn_like(o)
    found = _output_and_gradients(o, given, method.weights, do)
    exact = _output_and_gradients(exact_o, exact_given, method.exact_weights, do.double())
    for x, y in zip(found, exact, strict=True):
        if not (x - y).norm() <= limit * y.norm():  # NaN is wrong too
            raise WrongResult(f"{name} is wrong at {tokens} tokens: its output or a gradient has a relative error of "
                              f"{(x - y).norm() / y.norm():.2g}, rounding explains {limit:g}")


def _output_and_gradients(o: Tensor, inputs: list[Tensor], weights: tuple[Tensor, ...], do: Tensor) -> list[Tensor]:
    """o, the gradient of each input, and those of all weights as one: a γ alone may sum to little."""
    gradients = torch.autograd.grad(o, [*inputs, *weights], do, allow_unused=True, materialize_grads=True)
    of_weights = [gradient.flatten() for gradient in gradients[len(inputs) :]]
    return [o, *gradients[: len(inputs)], torch.cat(of_weights or [o.new_zeros(0)])]


def measure(
    methods: dict[str, Method], layer: Layer, context: int, mode: str, repeats: int, budget: float,
    progress: Callable[[str], None] = lambda name: None,
) -> list[dict]:
    """A row a method (DESIGN.md, section 3): the methods in turn, `repeats` times or until one has taken `budget`
    seconds. peak_memory_bytes: what a pass takes beyond its inputs, for outputs, gradients and all between."""
    p = projected(layer, context)
    steps = {name: _step(method, p, mode) for name, method in methods.items()}
    figures = time_in_turn(steps, repeats, layer.device, budget=budget, progress=progress)
    medians = {name: figure["milliseconds"]["p50"] for name, figure in figures.items()}
    rivals = [name for name in methods if name in baselines(layer.device)]
    return [
        {
            "method": name, "settings": method.settings, "context": context, "batch": layer.batch,
            "heads": layer.heads, "head_dim": layer.head_dim,
            "dtype": next(dtype for dtype in DTYPES if DTYPES[dtype] == layer.dtype),
            "device": layer.device.type, "backend": "torch", "mode": mode,
            "milliseconds": figures[name]["milliseconds"], "repeats": figures[name]["repeats"],
            "peak_memory_bytes": figures[name]["peak_memory_bytes"] - figures[name]["memory_before_bytes"],
            "speedup": {rival: medians[rival] / medians[name] for rival in rivals if rival != name},
        }
        for name, method in methods.items()
    ]


def _step(method: Method, p: Projected, mode: str) -> Callable[[], None]:
    given = method.inputs(p)
    do = torch.randn_like(p.q)

    def forward() -> None:
        with torch.no_grad():
            method.attend(*given)

    def forward_backward() -> None:
        torch.autograd.grad(method.attend(*given), [*given, *method.weights], do, allow_unused=True)

    return forward if mode == "forward" else forward_backward
