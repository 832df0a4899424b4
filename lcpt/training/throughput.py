"""Say how fast training is: in tokens, in FLOPs of the algorithm that runs, and as a part of the GPU's peak."""

from __future__ import annotations

import torch

from lcpt.model.cost import ModelConfig, model_cost
from lcpt.parallel import groups
from lcpt.utils.gpus import peak_flops


class Throughput:
    """Turns tokens a second, over all ranks, into FLOP/s.

    tflops_per_second is that of one rank: (tokens a second · FLOPs a token, forward and backward) / (ranks · 1e12).
    What activation checkpointing computes again does not count. mfu is its part of the GPU's dense peak in bf16, None
    on a CPU and on a GPU whose peak is not known.
    """

    def __init__(self, model: ModelConfig, context: int, device: torch.device):
        self._flops_a_token = model_cost(model, context).flops_trained
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

    def of(self, tokens_per_second: float) -> dict[str, float | None]:
        flops = tokens_per_second * self._flops_a_token / groups.world_size()
        return {
            "tokens_per_second": tokens_per_second,
            "tflops_per_second": flops / 1e12,
            "mfu": flops / self._peak if self._peak else None,
        }


def of_ranks(seconds: list[float]) -> dict[str, float]:
    """Name the fastest and the slowest of the ranks that needed these seconds."""
    return {
        "fastest_rank_seconds": min(seconds),
        "slowest_rank_seconds": max(seconds),
        "slowest_rank": seconds.index(max(seconds)),
    }
