"""How long kernels take at least on a GPU that is not here, by their work and their machine code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lcpt_kernels.triton.block_causal.state import number_of_pieces

from lcpt.benchmarking.kernel_work import Work

QUARTERS = 4  # of a multiprocessor; each issues an instruction a clock
FLOPS_A_CLOCK = 1024  # of the tensor core of a quarter, 16 bits


class Gpu(NamedTuple):
    """Gives the peaks that programs reach, and the seconds of a launch."""

    flops: float  # a second, of bf16 products
    bytes: float  # a second, of a copy, read and written
    launch: float
    multiprocessors: int
    clock: float  # a second


def roof(kernels: Iterable[Work], heads: int, gpu: Gpu) -> float:
    """Return the seconds that `kernels` take at least: each the larger of its FLOPs and its bytes at the peaks."""
    return sum(max(heads * work.flops / gpu.flops, heads * work.bytes / gpu.bytes) for work in kernels)


def issue(work: Work, row: dict, heads: int, gpu: Gpu) -> float:
    """Return the seconds that the instructions of a kernel take: on all multiprocessors, or those of one program where
    programs are too few. A loop takes the largest of the clocks in which its warps issue, use the tensor cores, and use
    the unit of special functions. `row` is the kernel's in the kernel report.

    Raises:
        ValueError: the machine code has other loops than `work` counts.
    """
    loops = [loop for loop in row["loops"] if loop["tensor_clocks"]]
    others = [loop for loop in row["loops"] if not loop["tensor_clocks"]]
    for compiled, known in ((loops, work.loops), (others, work.steps)):
        if len(compiled) != len(known):
            raise ValueError(f"{work.kernel}: {len(compiled)} loops in its machine code, {len(known)} known")
    warps = row["settings"]["num_warps"]
    clocks = work.programs * max(row["outside_loops"].values())
    for steps, loop in zip(work.steps, others, strict=True):
        clocks += steps * max(loop.values())
    for flops, loop in zip(work.loops, loops, strict=True):
        # The compiler unrolls some loops: how often one runs follows from the products of a step.
        clocks += flops / (FLOPS_A_CLOCK * warps * loop["tensor_clocks"]) * max(loop.values())
    pieces = number_of_pieces(round(heads * work.programs), work.blocks)
    at_once = min(gpu.multiprocessors, heads * work.programs * pieces)
    walked = 2 - 1 / pieces  # all pieces but the last are walked through twice
    return heads * clocks * walked * warps / QUARTERS / at_once / gpu.clock


def row_of(report: Iterable[dict], kernel: str, settings: dict) -> dict:
    """Return the row of a kernel for these settings on sm_90; a launch that several settings share is a row of one."""
    rows = [row for row in report if row["target"] == "sm_90" and row["kernel"] == kernel_name(kernel)]
    sizes = settings.keys() | {"of"}
    for row in rows:
        others = {name for name in row["settings"] if name.islower() and not name.startswith("num_")} - {"maxnreg"}
        if others == sizes and all(row["settings"][name] == x for name, x in settings.items()):
            return row
    if not rows:
        raise ValueError(f"the report has no {kernel_name(kernel)} for sm_90")
    return rows[0]


def kernel_name(kernel: str) -> str:
    """Return the name in the kernel report: "block_state, backward" is "block_state_kernel, backward"."""
    name, *of = kernel.split(", ")
    return ", ".join((f"{name}_kernel", *of))


def softmax_cost(heads: int, head_dim: int, context: int, mode: str) -> tuple[float, float]:
    """Count flash attention as its authors do: the causal half of two products forward, of five backward; q, k, v and
    o, and backward their gradients too, once, in 16 bits."""
    products, tensors = (7, 12) if mode == "forward_backward" else (2, 4)
    return heads * products * 1.0 * head_dim * context**2, heads * tensors * 2.0 * head_dim * context
