"""Compile Triton kernels ahead of time, without a GPU, in a process that does nothing else.

The code that launches kernels runs on small CPU tensors. Each launch compiles, and fills Triton's cache under the key
that the same launch on a GPU looks up, but starts nothing: results are uninitialised memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import triton
from lcpt_kernels import dispatch
from lcpt_kernels.triton.common import launch_configs
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Compiled(NamedTuple):
    """Records the kernels of a process so far."""

    kernels: dict[tuple[str, str], int]  # name and Triton's key -> its place in their order
    errors: dict[str, str]  # kernel -> why it did not compile, in one line


class TargetDriver:
    """Stands in for a GPU driver: it only names the target to compile for."""

    def __init__(self, target: str):
        self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(target: str, part: int, parts: int) -> Compiled:
    """Make kernels of lcpt_kernels take CPU tensors from now on, and a launch compile for `target` ("sm_90").

    Only kernels of this part are compiled: every `parts`-th distinct one, from `part` on. All parts must make the same
    launches in the same order.
    """
    compiled, run = Compiled({}, {}), JITFunction.run

    def skip(*, fn, key: str, **_) -> bool:
        return compiled.kernels.setdefault((fn.name, key), len(compiled.kernels)) % parts != part

    def compile_it(kernel, *args, grid, warmup, **kwargs) -> None:
        try:
            run(kernel, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:  # of the compiler; the other kernels are still worth compiling
            last = (str(error).strip().splitlines() or [""])[-1]
            compiled.errors[kernel.__name__] = f"{type(error).__name__}: {last[:200]}"

    JITFunction.run = compile_it
    triton.knobs.runtime.jit_cache_hook = skip
    driver.set_active(TargetDriver(target))
    launch_configs.target = cache(lambda: target)
    dispatch.INTERPRETED = True
    return compiled


def forward_backward(function: Callable, inputs: list[Tensor], weights: tuple[Tensor, ...] = ()) -> None:
    """Launch the kernels of a forward and a backward pass."""
    outputs = function(*inputs)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]
    wanted = [x for x in (*inputs, *weights) if x.requires_grad]
    torch.autograd.grad(outputs, wanted, [torch.zeros_like(x) for x in outputs], allow_unused=True)
