"""Tile sizes, warps and stages of every kernel, by the wider of q and v, and by type. No search at run time.

BM are queries and BN keys: of the program, or of a step of its loop. BT are tokens, PAIRS tiles of 64 features, B the
numbers of a state. Chosen by what the compiler makes of them for sm_90 (report.py): no spills, no serialised wgmma,
states read by as many rows as fit. Which are fastest, a GPU has yet to say.
"""

from __future__ import annotations

import torch


def scan(numbers: int) -> dict[str, int]:
    """numbers: of the states of one block each of all documents and heads. Few make small programs, for every
    multiprocessor some."""
    if numbers < 2**18:
        return {"B": 128, "num_warps": 1, "num_stages": 1}
    return {"B": 512, "num_warps": 4, "num_stages": 1}


def state(width: int, type: torch.dtype) -> dict[str, int]:
    if type == torch.float32:
        return {"PAIRS": 1, "BT": 32, "num_warps": 8, "num_stages": 1}
    if width <= 128:
        return {"PAIRS": 2, "BT": 64, "num_warps": 8, "num_stages": 2}
    return {"PAIRS": 1, "BT": 32, "num_warps": 8, "num_stages": 2}


def rest(type: torch.dtype) -> dict[str, int]:
    return {"BT": 32 if type == torch.float32 else 64, "num_warps": 4, "num_stages": 1}


def output(width: int, type: torch.dtype) -> dict[str, int]:
    if type == torch.float32:
        return {"BM": 32, "BN": 32, "num_warps": 4, "num_stages": 1}
    if width <= 128:
        return {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 2}
    return {"BM": 64, "BN": 32, "num_warps": 8, "num_stages": 2}


def backward_query(width: int, type: torch.dtype) -> dict[str, int]:
    if type == torch.float32:
        return {"BM": 32, "BN": 32, "num_warps": 8, "num_stages": 1}
    if width <= 128:
        return {"BM": 128, "BN": 32, "num_warps": 8, "num_stages": 2}
    return {"BM": 64, "BN": 32, "num_warps": 8, "num_stages": 2}


def backward_value(width: int, type: torch.dtype) -> dict[str, int]:
    if type == torch.float32:
        return {"BM": 32, "BN": 32, "num_warps": 8, "num_stages": 1}
    if width <= 128:
        return {"BM": 32, "BN": 128, "num_warps": 8, "num_stages": 2}
    return {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 1}


def backward_key(width: int, type: torch.dtype) -> dict[str, int]:
    if type == torch.float32:
        return {"BM": 32, "BN": 32, "num_warps": 4, "num_stages": 1}
    if width <= 128:
        return {"BM": 32, "BN": 128, "num_warps": 8, "num_stages": 2 if width <= 64 else 1}
    return {"BM": 16, "BN": 128, "num_warps": 8, "num_stages": 1}


def interval_output(width: int, type: torch.dtype) -> dict[str, int]:
    """Those of intervals have a stage more than others, for the rows' places, which are read before the rows."""
    if type == torch.float32:
        return interval_of_fp32(width)
    if width <= 128:
        return {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3}
    return {"BM": 64, "BN": 32, "num_warps": 8, "num_stages": 3}


def interval_backward_query(width: int, type: torch.dtype) -> dict[str, int]:
    return interval_output(width, type)


def interval_backward_key(width: int, type: torch.dtype) -> dict[str, int]:
    if type == torch.float32:
        return interval_of_fp32(width)
    if width <= 128:
        return {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 3}
    return {"BM": 32, "BN": 32, "num_warps": 8, "num_stages": 3}


def interval_of_fp32(width: int) -> dict[str, int]:
    size = 32 if width <= 64 else 16
    return {"BM": size, "BN": size, "num_warps": 8, "num_stages": 1}
