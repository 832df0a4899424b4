"""Sum up a profiler's trace: where the device's time went."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path

PARTS = (  # a kernel belongs to the first part of which it has a word in its name
    ("communication", ("nccl",)),
    ("loss", ("cross_entropy",)),
    ("attention", ("block_", "interval", "delta", "flash", "fmha", "sdpa")),
    (
        "norms, rotary, features, activations",
        ("norm", "rotary", "sketch", "feature_map", "gelu", "silu", "glu", "pooling"),
    ),
    ("matrix products", ("gemm", "nvjet", "cutlass", "mm_", "addmm", "bmm")),
    ("optimizer", ("adam", "multi_tensor")),
    ("copies", ("memcpy", "memset", "copy")),
)
REST = "elementwise and the rest"


def device_seconds(trace: Path) -> dict[str, float]:
    """Sum the device's time in seconds by part of a step, from a trace of torch.profiler; {} if it has no kernels."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            seconds[part_of(event["name"])] += event["dur"] / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def part_of(kernel: str) -> str:
    name = kernel.lower()
    return next((part for part, words in PARTS if any(word in name for word in words)), REST)
