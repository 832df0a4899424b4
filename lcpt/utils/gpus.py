"""Know the memory of GPUs by name."""

from __future__ import annotations

GPU_BYTES = {  # as their names say, in powers of ten: what a process can use is a little more or less
    "A100-40GB": 40_000_000_000,
    "A100-80GB": 80_000_000_000,
    "L40S-48GB": 48_000_000_000,
    "H100-80GB": 80_000_000_000,
    "H200-141GB": 141_000_000_000,
    "B200-192GB": 192_000_000_000,
}


def gpu_bytes(name: str) -> int:
    """Return the memory of a GPU. ValueError for a name that is not in GPU_BYTES."""
    if name not in GPU_BYTES:
        raise ValueError(f"no GPU {name!r} is known; known are {', '.join(GPU_BYTES)}")
    return GPU_BYTES[name]
