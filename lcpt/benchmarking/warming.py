"""Compiles Triton kernels before they are needed, without a GPU, for a process that does nothing else.

The code that starts kernels runs on small CPU tensors. Each start compiles, and fills Triton's cache under the key that
the same start on a GPU looks up, but launches nothing: results are memory that nobody wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from lcpt_kernels import dispatch
from lcpt_kernels.triton.common import launch_configs
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Seen(NamedTuple):
    """What a process has seen so far."""

    kernels: dict[tuple[str, str], int]  # name and Triton's key -> its place in their order
    errors: dict[str, str]  # kernel -> why it did not compile, in one line


class NoGPU:
    """A driver that only says what to compile for."""

    def __init__(self, target: str):
        self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(target: str, part: int, parts: int) -> Seen:
    """From now on kernels of lcpt_kernels take CPU tensors, and a start compiles for `target` ("sm_90") where the
    kernel is of this part: every `parts`-th distinct kernel, from `part` on. All parts must do the same in turn."""
    seen, run = Seen({}, {}), JITFunction.run

    def skip(*, fn, key: str, **_) -> bool:
        return seen.kernels.setdefault((fn.name, key), len(seen.kernels)) % parts != part

    def compile_it(kernel, *args, grid, warmup, **kwargs) -> None:
        try:
            run(kernel, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:  # a compiler's; the other kernels are still worth compiling
            last = (str(error).strip().splitlines() or [""])[-1]
            seen.errors[kernel.__name__] = f"{type(error).__name__}: {last[:200]}"

    JITFunction.run = compile_it
    triton.knobs.runtime.jit_cache_hook = skip
    driver.set_active(NoGPU(target))
    launch_configs.target = lambda: target
    dispatch.INTERPRETED = True
    return seen


def forward_backward(function: Callable, inputs: list[Tensor], weights: tuple[Tensor, ...] = ()) -> None:
    """Starts the kernels of a pass and of its backward pass."""
    outputs = function(*inputs)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]
    wanted = [x for x in (*inputs, *weights) if x.requires_grad]
    torch.autograd.grad(outputs, wanted, [torch.zeros_like(x) for x in outputs], allow_unused=True)
