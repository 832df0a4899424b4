"""Count what a model costs: parameters, FLOPs a token, bytes. Nothing else adds them up."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from lcpt.attention.base import rotary_table
from lcpt.model.gpt import GPT, Block, ModelConfig

SAMPLE = 1024  # tokens on which memory is counted; it grows in proportion


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    parameters: int
    flops_forward: float  # a token
    flops_step: float  # a token, forward and backward, with recomputation where there is any
    state_bytes: int  # of one sequence, for decoding the token after `context`


def model_cost(config: ModelConfig, context: int) -> Cost:
    """Count the cost on the model itself, built without memory: matrix products at 2 FLOPs a multiply-add, and the
    attention of each layer as its kind states it."""
    with torch.device("meta"):
        model = GPT(config)
    parameters = sum(p.numel() for p in model.parameters())
    # Every matrix of a block, but a sketch's, meets a token once, and so does the head. An embedding is no product.
    head = config.vocab_size * config.d_model
    matrices = head + sum(p.numel() for block in model.blocks for p in block.parameters() if p.ndim == 2)
    forward, backward = 2.0 * matrices, 4.0 * matrices
    recomputed = 0.0
    for block in model.blocks:
        attend_forward, attend_backward = block.attention.attend_flops(context)
        forward += attend_forward
        backward += attend_backward
    if config.activation_checkpointing is True:
        recomputed = forward - 2.0 * head
    state = sum(block.attention.state_bytes(context) + block.attention.key_shift_bytes() for block in model.blocks)
    return Cost(
        parameters=parameters,
        flops_forward=forward,
        flops_step=forward + backward + recomputed,
        state_bytes=state,
    )


def memory_per_rank(
    config: ModelConfig, parameters: int, *, tokens: int, world: int, zero_stage: int, precision: str
) -> dict[str, float]:
    """Estimate the bytes on one rank that holds `tokens` tokens at a time: weights, gradients, optimizer, activations.

    ZeRO divides the optimizer's fp32 copy and moments by the world at stage 1, gradients too at 2, weights too at 3.
    Stage 0 divides nothing and has no copy of its fp32 weights.
    Under activation checkpointing every block saves its input alone, and one block at a time all the rest. PyTorch's
    own memory, communication buffers and short-lived temporaries are not counted.
    """
    width = 2 if precision == "bf16" else 4
    saved = {kind: saved_elements(config, config.kinds.index(kind)) for kind in set(config.kinds)}
    if config.activation_checkpointing is True:
        elements = config.n_layers * config.d_model + max(saved.values())
    else:
        elements = sum(saved[kind] for kind in config.kinds)
    return {
        "weights": width * parameters / (world if zero_stage >= 3 else 1),
        "gradients": width * parameters / (world if zero_stage >= 2 else 1),
        "optimizer": 12 * parameters / world if zero_stage else 8 * parameters,
        "activations": width * elements * tokens,
    }


def saved_elements(config: ModelConfig, layer: int) -> float:
    """Count the elements a token that autograd saves for one block, on tensors without memory; on real ones where
    what is saved depends on values."""
    try:
        return _saved_elements(config, layer, FakeTensorMode())
    except (DataDependentOutputException, DynamicOutputShapeException):
        return _saved_elements(config, layer, torch.random.fork_rng(devices=[]))


def _saved_elements(config: ModelConfig, layer: int, mode: AbstractContextManager) -> float:
    saved: dict[int, torch.UntypedStorage] = {}  # by address: the storages stay alive, so that none is used twice

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with mode, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        block = Block(config, layer)
        x = torch.randn(1, SAMPLE, config.d_model, requires_grad=True)
        y = block(x, rotary_table(torch.arange(SAMPLE), config.head_dim, config.rope_base))
        own = {p.untyped_storage()._cdata for p in block.parameters()}
        elements = sum(storage.nbytes() for address, storage in saved.items() if address not in own) / y.itemsize
    return elements / SAMPLE
