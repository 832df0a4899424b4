"""What a model costs: parameters, FLOPs a token, bytes. The one place that adds them up."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lcpt.model.gpt import GPT, ModelConfig


@dataclass
class Cost:
    parameters: int
    flops_forward: float  # a token
    flops_step: float  # a token, forward and backward, with recomputation where there is any
    state_bytes: int  # of one sequence, for decoding the token after `context`


def model_cost(config: ModelConfig, context: int) -> Cost:
    """Counted on the model itself, built without memory: matrix products at 2 FLOPs a multiply-add, and the
    attention of each layer as its kind states it."""
    with torch.device("meta"):
        model = GPT(config)
    parameters = sum(p.numel() for p in model.parameters())
    # Every matrix of a block, but a sketch's, meets a token once; the embedding does as the head.
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2)
    forward, backward = 2.0 * matrices, 4.0 * matrices
    head = 2.0 * config.vocab_size * config.d_model
    recomputed = 0.0
    for block in model.blocks:
        attend_forward, attend_backward = block.attention.attend_flops(context)
        forward += attend_forward
        backward += attend_backward
    if config.activation_checkpointing:
        recomputed = forward - head
    state = sum(block.attention.state_bytes(context) for block in model.blocks)
    return Cost(parameters, forward, forward + backward + recomputed, state)


def memory_per_rank(
    config: ModelConfig, parameters: int, *, tokens: int, world: int, zero_stage: int, precision: str
) -> dict[str, float]:
    """Estimated bytes on one rank that holds `tokens` tokens at a time: model, gradients, optimizer, activations.

    ZeRO divides the optimizer's fp32 copy and moments by the world at stage 1, gradients too at 2, weights too at 3.
    Activations are what autograd keeps of a block: about 14 d_model + 3 d_ff numbers a token, or the block's input
    alone under activation checkpointing, when one block is in full at a time.
    """
    width = 2 if precision == "bf16" else 4
    numbers = 14 * config.d_model + 3 * config.ff_width
    if config.activation_checkpointing:
        numbers = numbers + config.n_layers * config.d_model
    else:
        numbers = numbers * config.n_layers
    return {
        "weights": width * parameters / (world if zero_stage >= 3 else 1),
        "gradients": width * parameters / (world if zero_stage >= 2 else 1),
        "optimizer": 12 * parameters / world,
        "activations": width * numbers * tokens,
    }
