"""Tile sizes, warps and stages of every kernel: a table, and no search at run time.

BM are queries and BN keys: of the program, or of a step of its loop. BT are tokens, PAIRS tiles of 64 features, B the
numbers of a state. A column is for 16 bits and tensors up to so wide, or for fp32; a row of a target says where it
differs from sm_90. Chosen by what the compiler makes of them (report.py): no spills, no serialised wgmma, states read
by as many rows as fit. Which are fastest, a GPU has yet to say. Nothing depends on how many tokens there are.
"""

from __future__ import annotations

from functools import cache

import torch

NAMES = {
    "scan": ("B",), "state": ("PAIRS", "BT"), "rest": ("BT",), "output": ("BM", "BN"),
    "backward_query": ("BM", "BN"), "backward_value": ("BM", "BN"), "backward_key": ("BM", "BN"),
}
TABLE = {  # tiles, then warps and stages
    "scan": {2**18: (128, 1, 1), 2**62: (512, 4, 1)},  # by the numbers of all states of one block: programs for all
    "state": {64: (2, 64, 8, 2), 128: (2, 64, 8, 2), 256: (1, 32, 8, 2), "fp32": (1, 32, 8, 1)},
    "rest": {64: (64, 4, 1), "fp32": (32, 4, 1)},
    "output": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2), "fp32": (32, 32, 4, 1)},
    "backward_query": {64: (128, 32, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2), "fp32": (32, 32, 8, 1)},
    "backward_value": {64: (32, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 64, 8, 1), "fp32": (32, 32, 8, 1)},
    "backward_key": {64: (32, 128, 8, 2), 128: (32, 128, 8, 1), 256: (16, 128, 8, 1), "fp32": (32, 32, 4, 1)},
}
DIFFERENT = {
    "sm_80": {
        "state": {128: (2, 32, 8, 2)},
        "rest": {64: (64, 4, 2)},
        "output": {128: (128, 32, 8, 2)},
        "backward_value": {128: (32, 64, 8, 2)},
        "backward_key": {128: (32, 64, 8, 2)},
    },
    "sm_100": {"backward_value": {64: (32, 128, 8, 1)}},
    "gfx942": {
        "output": {128: (128, 32, 8, 2)},
        "backward_query": {128: (64, 32, 4, 1)},
        "backward_value": {64: (32, 64, 4, 1), 128: (32, 64, 8, 1)},
        "backward_key": {64: (32, 64, 4, 1), 128: (32, 64, 8, 1)},
    },
}


def tiles(kernel: str, width: int = 0, type: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """The constants and options of `kernel`, for tensors no wider than `width`."""
    columns = TABLE[kernel] | DIFFERENT.get(target(), {}).get(kernel, {})
    if type == torch.float32 and "fp32" in columns:
        sizes = columns["fp32"]
    else:
        widths = [column for column in columns if column != "fp32"]
        sizes = columns[min((column for column in widths if column >= width), default=max(widths))]
    return dict(zip((*NAMES[kernel], "num_warps", "num_stages"), sizes, strict=True))


@cache
def target() -> str:
    """The row of the table that is for the current device; without one sm_90."""
    if not torch.cuda.is_available():
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability()
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")
