"""Know the memory and the speed of GPUs by name."""

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


BANDWIDTH = {  # of its memory, bytes a second, by the maker's data sheet
    "A100-40GB": 1.555e12,
    "A100-80GB": 2.039e12,
    "L40S-48GB": 0.864e12,
    "H100-80GB": 3.35e12,
    "H200-141GB": 4.8e12,
    "B200-192GB": 8.0e12,
}
NVLINK = {  # to the other GPUs of a machine, bytes a second each way: half of what data sheets add up; L40S has none
    "A100-40GB": 300e9,
    "A100-80GB": 300e9,
    "H100-80GB": 450e9,
    "H200-141GB": 450e9,
    "B200-192GB": 900e9,
}
FP32_FLOPS = {  # a second, without tensor cores: PyTorch's fp32 products do not round to TF32 unless told to
    "A100-40GB": 19.5e12,
    "A100-80GB": 19.5e12,
    "L40S-48GB": 91.6e12,
    "H100-80GB": 67e12,
    "H200-141GB": 67e12,
    "B200-192GB": 75e12,
}


def gpu_peaks(name: str, precision: str) -> tuple[float, float]:
    """Return (FLOP/s of dense products in bf16 or fp32, bytes a second of its memory) of a GPU. ValueError for a name
    that is not in GPU_BYTES."""
    gpu_bytes(name)
    flops = peak_flops(name) if precision == "bf16" else FP32_FLOPS[name]
    assert flops is not None, f"BF16_FLOPS lacks {name}"
    return flops, BANDWIDTH[name]


BF16_FLOPS = (  # dense peak a second; the first that occurs in a device's name counts
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("MI300X", 1307e12),
)


def peak_flops(device_name: str) -> float | None:
    """Return the dense peak of a GPU in bf16, a second, by the name that PyTorch gives it; None if it is not known."""
    return next((flops for name, flops in BF16_FLOPS if name in device_name), None)
