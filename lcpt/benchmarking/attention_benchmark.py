"""Measure time and memory of attention, method beside method, each after a check against its definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lcpt.attention.base import Projected
from lcpt.benchmarking.attention_layer import Layer, Method
from lcpt.benchmarking.attention_methods import baselines, random_projections
from lcpt.benchmarking.timing import first_passes, time_in_turn
from lcpt.utils.provenance import backend_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ("forward", "forward_backward")


class WrongResult(ValueError):
    """Says that a method's output or gradient is not what its definition says."""


def check(name: str, method: Method, layer: Layer, tokens: int) -> str:
    """Compare output and every gradient with the definition in float64, on the same rounded inputs; one sequence.

    Returns the backend that computed it. WrongResult if ‖found − exact‖ / ‖exact‖ of one of them is more than rounding
    explains. `tokens` should be more than three blocks, so that there is a state.
    """
    limit = method.tolerance[layer.dtype]
    given = method.inputs(random_projections(replace(layer, batch=1), tokens))
    exact_given = [x.detach().double().requires_grad_() for x in given]
    o, exact_o = method.attend(*given), method.definition(*exact_given)
    backend = backend_of(o)
    do = torch.randn_like(o)
    found = _output_and_gradients(o, given, method.weights, do)
    exact = _output_and_gradients(exact_o, exact_given, method.exact_weights, do.double())
    for x, y in zip(found, exact, strict=True):
        if not (x - y).norm() <= limit * y.norm():  # NaN is wrong too
            raise WrongResult(
                f"{name} is wrong at {tokens} tokens: its output or a gradient has a relative error of "
                f"{(x - y).norm() / y.norm():.2g}, rounding explains {limit:g}"
            )
    return backend


def _output_and_gradients(o: Tensor, inputs: list[Tensor], weights: tuple[Tensor, ...], do: Tensor) -> list[Tensor]:
    """List o, the gradient of each input, and those of all weights in one vector: that of a γ alone may be tiny."""
    gradients = torch.autograd.grad(o, [*inputs, *weights], do, allow_unused=True, materialize_grads=True)
    of_weights = [gradient.flatten() for gradient in gradients[len(inputs) :]]
    return [o, *gradients[: len(inputs)], torch.cat(of_weights or [o.new_zeros(0)])]


def measure(
    methods: dict[str, Method],
    backends: dict[str, str],
    layer: Layer,
    context: int,
    mode: str,
    *,
    repeats: int,
    budget: float,
    peaks: dict[str, float] | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> tuple[list[dict], dict[str, str]]:
    """Time the methods in turn, `repeats` times or until one has taken `budget` seconds.

    Returns a row a method, as docs/contract.md describes it, and the reason for each method that a GPU could not run.
    peak_memory_bytes: the memory of a pass beyond its inputs, for outputs, gradients and intermediates.
    """
    p = random_projections(layer, context)
    steps = {name: _step(method, p, mode) for name, method in methods.items()}
    failed = first_passes(steps, layer.device)
    for name in failed:
        del steps[name]
    figures = time_in_turn(steps, repeats, layer.device, budget=budget, progress=progress)
    medians = {name: figure["milliseconds"]["p50"] for name, figure in figures.items()}
    rivals = [name for name in steps if name in baselines(layer.device)]
    rows = [
        {
            "method": name,
            "settings": methods[name].settings,
            "context": context,
            "batch": layer.batch,
            "heads": layer.heads,
            "head_dim": layer.head_dim,
            "dtype": next(dtype for dtype in DTYPES if DTYPES[dtype] == layer.dtype),
            "device": layer.device.type,
            "backend": backends[name],
            "mode": mode,
            "milliseconds": figures[name]["milliseconds"],
            "repeats": figures[name]["repeats"],
            "peak_memory_bytes": figures[name]["peak_memory_bytes"] - figures[name]["memory_before_bytes"],
            "percent_of_peak": _percent(methods[name], backends[name], layer, context, mode, medians[name], peaks),
            "speedup": {rival: medians[rival] / medians[name] for rival in rivals if rival != name},
        }
        for name in steps
    ]
    return rows, failed


def _percent(
    method: Method,
    backend: str,
    layer: Layer,
    context: int,
    mode: str,
    milliseconds: float,
    peaks: dict[str, float] | None,
) -> dict[str, float] | None:
    """Compute the percent of the measured peaks that the counted FLOPs and bytes reach; None where none are counted."""
    if peaks is None or method.cost is None or (method.cost_of is not None and method.cost_of != backend):
        return None
    flops, n_bytes = (layer.batch * count / milliseconds * 1e3 for count in method.cost(context, mode))
    return {"flops": 100 * flops / peaks["flops_per_second"], "bytes": 100 * n_bytes / peaks["bytes_per_second"]}


def _step(method: Method, p: Projected, mode: str) -> Callable[[], None]:
    given = method.inputs(p)
    do = torch.randn_like(p.q)

    def forward() -> None:
        with torch.no_grad():
            method.attend(*given)

    def forward_backward() -> None:
        torch.autograd.grad(method.attend(*given), [*given, *method.weights], do, allow_unused=True)

    return forward if mode == "forward" else forward_backward
