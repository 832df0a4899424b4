"""Compile a model's blocks with torch.compile: norms, activations and residual sums take fewer passes over memory.

A block is one graph, the same for all layers of a kind. Its `forward` alone is compiled: the hooks of ZeRO stage 3,
which gather a block's weights, stay outside, where they break no graph.
"""

from __future__ import annotations

import torch

from lcpt.model import GPT

BACKEND = "inductor"


def compile_blocks(model: GPT, setting: str, device: torch.device) -> None:
    """Compile each block's forward if `setting` is "true", or "auto" and this is a GPU.

    Under "auto" what cannot be compiled runs as it is, with a warning of PyTorch; under "true" it is an error.
    """
    if setting == "false" or (setting == "auto" and device.type != "cuda"):
        return
    if setting == "auto":
        torch._dynamo.config.suppress_errors = True
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=BACKEND)  # type: ignore[method-assign]
