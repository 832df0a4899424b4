"""Record where figures come from: the commit, the versions, the machine and the command that made them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

# Triton kernels are behind PyTorch operators with this in their names, and behind the functions of these modules.
TRITON_OPERATOR_PREFIX = "lcpt_kernels_"
TRITON_MODULES = ("fla.",)
PACKAGES = "torch deepspeed triton numpy sentencepiece tokenizers safetensors flash-linear-attention".split()


def report_header(device: torch.device) -> dict:
    """Return the keys with which every report of measured figures begins."""
    gpu = {}
    if device.type == "cuda":
        gpu = {"cuda": torch.version.cuda or "absent", "cudnn": str(torch.backends.cudnn.version())}
    return {
        "schema_version": 1,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "device": device_name(device),
        "versions": versions() | gpu,
        "command": command(),
    }


def command() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def backend_of(x: torch.Tensor) -> str:
    """Return "triton" if a function in the autograd graph of x starts Triton kernels, else "torch"."""
    waiting, seen = [x.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)  # the torch.autograd.Function, where it is one
        by_module = function is not None and function.__module__.startswith(TRITON_MODULES)
        if by_module or TRITON_OPERATOR_PREFIX in node.name():
            return "triton"
        waiting += [before for before, _ in node.next_functions]
    return "torch"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' * (threads > 1)}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def git_commit() -> str | None:
    """Return the commit of lcpt's own checkout; where it has no .git, the variable LCPT_COMMIT, or None."""
    root = Path(__file__).parents[2]
    command = ["git", "-C", str(root), "rev-parse", "HEAD", "--show-toplevel"]
    given = os.environ.get("LCPT_COMMIT") or None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return given
    commit, _, top = done.stdout.strip().partition("\n")
    if done.returncode or Path(top) != root.resolve():  # there is no repository, or only one around this folder
        return given
    return commit
