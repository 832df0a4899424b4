"""Tile sizes, warps and stages of every kernel: by width of the rows and by type. No search at run time.

B… are rows a program works on, and rows of a step of its loop. Chosen by ahead-of-time compilation (kernel_report):
no spills, wgmma not serialised on sm_90. Which are fastest, a GPU has yet to say.
"""

from __future__ import annotations

import torch


def state(width: int, type: torch.dtype) -> dict[str, int]:
    if type == torch.float32:
        return {"PAIRS": 1, "BT": 32, "num_warps": 4, "num_stages": 1}
    return {"PAIRS": 2 if width <= 128 else 1, "BT": 64, "num_warps": 8 if width <= 128 else 4, "num_stages": 2}


def rest(width: int, type: torch.dtype) -> dict[str, int]:
    return {"BT": 32 if type == torch.float32 else 64, "num_warps": 4, "num_stages": 1}


def scan() -> dict[str, int]:
    return {"B": 512, "num_warps": 4, "num_stages": 3}


def output(width: int, type: torch.dtype) -> dict[str, int]:
    if type == torch.float32:
        return {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 1}
    return {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 2}


def backward_query(width: int, type: torch.dtype) -> dict[str, int]:
    if type == torch.float32:
        return {"BM": 32, "BN": 32, "num_warps": 4, "num_stages": 1}
    return {"BM": 128, "BN": 32, "num_warps": 8, "num_stages": 2}


def backward_value(width: int, type: torch.dtype) -> dict[str, int]:
    if type == torch.float32:
        return {"BM": 32, "BN": 32, "num_warps": 4, "num_stages": 1}
    return {"BM": 64, "BN": 128, "num_warps": 8, "num_stages": 1}  # more stages: wgmma is serialised


def backward_key(width: int, type: torch.dtype) -> dict[str, int]:
    if type == torch.float32:
        return {"BM": 32, "BN": 32, "num_warps": 4, "num_stages": 1}
    return {"BM": 32, "BN": 128, "num_warps": 8, "num_stages": 2 if width <= 64 else 1}
