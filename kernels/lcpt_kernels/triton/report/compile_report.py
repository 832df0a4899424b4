"""Compile every kernel without a GPU and report registers, spills, shared memory, tensor-core instructions, hazards.

The kernels are those that a forward and a backward pass launch, with the same arguments: a launch is recorded instead
of run. This needs a process in which Triton compiles (no TRITON_INTERPRET=1); it compiles for any target.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.report.compile_cases import FEW, SETTINGS, output_of
from lcpt_kernels.triton.report.sass import Code, loops, required_match, wgmma_hazards

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# KiB of shared memory a multiprocessor and a block of threads may have, by NVIDIA's compute capability tables
SHARED = {"sm_80": (164, 163), "sm_90": (228, 227), "sm_100": (228, 227)}
REGISTERS, WARPS = 65536, 64  # of a multiprocessor, the same for these
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
TILES = ("BC", "BF", "BT", "BH", "BR", "DT", "BM", "BN", "BV", "STEPS", "NETWORKS", "PROGRAMS")
SIZES = (*TILES, "num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A kernel and the specialisation that Triton compiles."""

    kernel: JITFunction
    signature: dict[str, str | tuple[str, ...]]  # name -> "*bf16", "i32", "constexpr", or a tuple of these
    constants: dict  # of the constexprs: name -> value
    divisible: tuple[tuple[int, ...], ...]  # places of arguments that are multiples of 16
    options: dict[str, int]  # num_warps, num_stages, and maxnreg where registers are capped


def rows(target: str, first: int | None = None, part: int = 0, parts: int = 1, keep: Path | None = None) -> list[dict]:
    """Compile the launches of the `first` of SETTINGS for one of TARGETS (None: all for sm_90, a few for others).

    A launch that several settings share is a row of the first of them. Each of `parts` processes compiles every
    `parts`-th row, from `part` on. A kernel that does not compile is a row with "error". PTX and machine code of every
    row are written to the folder `keep`, under the name in "file".
    """
    found: dict[str, tuple[Launch, dict[str, Any]]] = {}
    for settings in SETTINGS[: first or (len(SETTINGS) if target == "sm_90" else FEW)]:
        for launch in launches(target, **settings):
            found.setdefault(repr(launch), (launch, settings))
    numbered = list(enumerate(found.values()))[part::parts]
    return [
        row(launch, settings, target, keep and keep / f"{target}-{place:03}-{launch.kernel.__name__}")
        for place, (launch, settings) in numbered
    ]


def launches(target: str, **settings) -> list[Launch]:
    """Return the launches of a case in `compile_cases`, forward and backward, each once."""
    found: dict[str, Launch] = {}

    def note(kernel, *args, grid, warmup, num_warps=4, num_stages=3, maxnreg=None, **kwargs):
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        options = {"num_warps": num_warps, "num_stages": num_stages} | ({"maxnreg": maxnreg} if maxnreg else {})
        launch = specialise(kernel, arguments, options)
        found.setdefault(repr(launch), launch)

    with mock.patch.object(JITFunction, "run", note), mock.patch.object(launch_configs, "target", return_value=target):
        output = output_of(**settings)
        if output.requires_grad:
            output.sum().backward()
    return list(found.values())


def specialise(kernel: JITFunction, arguments: dict, options: dict[str, int]) -> Launch:
    """Return the launch with the types and constants that Triton compiles each argument as when a kernel starts."""
    signature: dict[str, str | tuple[str, ...]] = {}
    constants: dict[tuple[int], Any] = {}
    divisible: list[tuple[int, ...]] = []
    for place, parameter in enumerate(kernel.params):
        x = arguments[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or x is None or (isinstance(x, int) and x == 1 and not free):
            signature[parameter.name], constants[(place,)] = "constexpr", x
        elif isinstance(x, tuple):
            signature[parameter.name] = ("i32",) * len(x)
            divisible += [(place, n) for n, value in enumerate(x) if value % 16 == 0]
        elif isinstance(x, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[x.dtype]
            divisible.append((place,))
        else:
            signature[parameter.name] = "fp32" if isinstance(x, float) else "i32"
            if isinstance(x, int) and x % 16 == 0 and not free:
                divisible.append((place,))
    return Launch(kernel=kernel, signature=signature, constants=constants, divisible=tuple(divisible), options=options)


def row(launch: Launch, settings: dict, target: str, keep: Path | None = None) -> dict:
    """Return one row of the report; `keep` is the path of PTX and machine code without an ending."""
    constants = constexpr_values(launch)
    of = ", backward" * constants.get("QUERIES", False)
    of += ", state alone" * (not constants.get("LOCAL", True)) + ", local alone" * (not constants.get("STATE", True))
    found = {
        "kernel": launch.kernel.__name__ + of,
        "settings": settings | tiles(launch),
        "target": target,
        "triton": triton.__version__,
    }
    source = ASTSource(
        launch.kernel,
        launch.signature,
        launch.constants,
        {place: [["tt.divisibility", 16]] for place in launch.divisible},
    )
    try:
        compiled = triton.compile(source, target=TARGETS[target], options=launch.options)
        if keep is not None:
            found["file"] = write_code(compiled, target, keep)
        figures = nvidia(compiled, target, launch.options["num_warps"]) if target in SHARED else amd(compiled)
    except Exception as error:  # an error of one kernel must not hide the others
        return found | {"error": last_line(error)}
    return found | figures


def last_line(error: Exception) -> str:
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    return (said.strip().splitlines() or [type(error).__name__])[-1]


def write_code(compiled, target: str, path: Path) -> str:
    """Write PATH.ptx and PATH.sass, for AMD PATH.amdgcn. Return the name without an ending."""
    if target in SHARED:
        path.with_suffix(".ptx").write_text(compiled.asm["ptx"])
        path.with_suffix(".sass").write_text(disassembled(compiled))
    else:
        path.with_suffix(".amdgcn").write_text(compiled.asm["amdgcn"])
    return path.name


def tiles(launch: Launch) -> dict[str, int]:
    """Return the sizes of tiles, warps and stages of a launch."""
    named = constexpr_values(launch)
    return {name: named[name] for name in TILES if name in named} | launch.options


def constexpr_values(launch: Launch) -> dict:
    return {launch.kernel.params[place].name: x for (place,), x in launch.constants.items()}


def nvidia(compiled, target: str, warps: int) -> dict:
    tensor_core_ops = len(re.findall(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", compiled.asm["ptx"]))
    sass = disassembled(compiled) if target == "sm_90" else ""  # the one target with wgmma
    steps, outside = loops(sass)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        assembler = NVIDIA_TOOLS / ("ptxas-blackwell" if target == "sm_100" else "ptxas")
        architecture = required_match(r"\.target (\w+)", compiled.asm["ptx"])[1]
        log = call(assembler, "-v", f"--gpu-name={architecture}", ptx, "-o", Path(folder, "again.cubin"))
    registers = int(required_match(r"Used (\d+) registers", log)[1])
    shared = compiled.metadata.shared
    return {
        "registers": registers,
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        "shared_bytes": shared,
        "tensor_core_ops": tensor_core_ops,
        "wgmma_serialized": bool(re.search(r"C75\d\d.*serialized", log)),
        "wgmma_hazards": wgmma_hazards(sass),
        "loops": [step._asdict() for step in steps],
        "outside_loops": outside._asdict(),
        "occupancy": occupancy(registers, shared, warps, *SHARED[target]),
    }


def disassembled(compiled) -> str:
    """Return the machine code of a compiled kernel as text."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        return call(NVIDIA_TOOLS / "nvdisasm", "-c", cubin)


def amd(compiled) -> dict:
    text = compiled.asm["amdgcn"]
    return {
        "registers": int(required_match(r"\.vgpr_count:\s*(\d+)", text)[1]),
        "spill_bytes": 4 * int(required_match(r"\.vgpr_spill_count:\s*(\d+)", text)[1]),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core_ops": len(re.findall(r"\bv_mfma", text)),
        "wgmma_serialized": False,
        "wgmma_hazards": 0,
        "loops": [],
        "outside_loops": Code(0, 0, 0)._asdict(),
        "occupancy": None,
    }


def occupancy(registers: int, shared: int, warps: int, shared_of_all: int, shared_of_one: int) -> int:
    """Return how many blocks of `warps` warps a multiprocessor holds at a time."""
    if shared > shared_of_one * 1024:
        return 0
    registers_per_warp = -(-registers * 32 // 256) * 256  # registers are allocated in units of 256
    by_registers = REGISTERS // registers_per_warp // 4 * 4 // warps  # and warps in units of 4
    return min(by_registers, shared_of_all * 1024 // (shared + 1024), WARPS // warps, 32)


def call(*command) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def fault(row: dict) -> str | None:
    """Say why a row fails the report: it does not compile, or it is for sm_90 and has a spill or a hazard. None: it
    passes."""
    if "error" in row:
        return row["error"]
    if row["target"] != "sm_90":
        return None
    if row["spill_bytes"]:
        return f"{row['spill_bytes']} bytes spilled"
    if row["wgmma_serialized"]:
        return "wgmma serialised"
    if row["wgmma_hazards"]:
        return f"{row['wgmma_hazards']} instructions overwrite registers of an unfinished wgmma"
    if row["occupancy"] == 0:
        return f"{row['shared_bytes']} bytes of shared memory, more than a block may have"
    return None
