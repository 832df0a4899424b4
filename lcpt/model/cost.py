"""Count what a model costs: parameters, FLOPs a token, bytes. Nothing else adds them up."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from lcpt_kernels.cross_entropy import LOGITS_IN_TRITON
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from lcpt.attention.base import rotary_table
from lcpt.model.gpt import GPT, Block, ModelConfig

SAMPLE = 1024  # tokens on which memory is counted; it grows in proportion
REDUCE_BUCKET = 500_000_000  # gradients that DeepSpeed collects before it reduces them, stages 2 and 3
LIVE_WEIGHTS = 1_000_000_000  # weights that DeepSpeed leaves gathered at stage 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    parameters: int
    flops_forward: float  # a token
    flops_trained: float  # a token, forward and backward
    flops_step: float  # the same with what activation checkpointing computes again
    state_bytes: int  # of one sequence, for decoding the token after `context`


class Saved(NamedTuple):
    """Counts elements a token that exist for backward."""

    always: float
    at_times: float  # beside the others, while backward runs through a block


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
        flops_trained=forward + backward,
        flops_step=forward + backward + recomputed,
        state_bytes=state,
    )


def memory_per_rank(
    config: ModelConfig,
    parameters: int,
    saved: Saved,
    *,
    tokens: int,
    world: int,
    zero_stage: int,
    precision: str,
) -> dict[str, float]:
    """Estimate the bytes on one rank of `world` that holds `tokens` tokens at a time, by what they hold.

    `saved` is that of activation_elements. Gradients are summed in fp32. ZeRO divides the optimizer's fp32
    weights and moments by the world at stage 1, the sum of gradients too at 2, weights too at 3; stage 0 divides
    nothing and has no copy of its fp32 weights. PyTorch's own memory, communication buffers and short-lived temporaries
    are not counted.
    """
    width = 2 if precision == "bf16" else 4
    sums_itself = precision == "fp32" and zero_stage < 2  # then a micro-batch's gradient is added where it is made
    shared = min(parameters, REDUCE_BUCKET if zero_stage >= 2 else parameters)
    parts = {
        "weights": width * parameters / (world if zero_stage >= 3 else 1),
        "gathered weights": width * min(parameters, LIVE_WEIGHTS) if zero_stage >= 3 else 0,
        "gradients": 4 * parameters / (world if zero_stage >= 2 else 1),
        "gradients of a micro-batch": 0 if sums_itself else width * shared,
        "optimizer": 12 * parameters / world if zero_stage else 8 * parameters,
        "activations": width * saved.always * tokens,
        # A block is made again when the loss is over.
        "loss, or a block made again": max(_head_bytes(config, tokens, width), width * saved.at_times * tokens),
    }
    return {name: n_bytes for name, n_bytes in parts.items() if n_bytes}


def _head_bytes(config: ModelConfig, tokens: int, width: int) -> float:
    """Count what lives while the loss is computed: the last norm's input and output with a gradient, a chunk of logits,
    the gradient of the head's matrix in fp32 and then as it is returned."""
    logits = min(tokens * config.vocab_size, LOGITS_IN_TRITON)
    matrix = config.vocab_size * config.d_model
    return 3 * width * config.d_model * tokens + width * logits + (4 + width) * matrix


def activation_elements(config: ModelConfig) -> Saved:
    """Count what all blocks save for backward. Under full activation checkpointing every block saves its input alone,
    and one block at a time all the rest."""
    kinds = {kind: saved_elements(config, config.kinds.index(kind)) for kind in set(config.kinds)}
    if config.activation_checkpointing is True:
        return Saved(config.n_layers * config.d_model, max(kinds.values()))
    return Saved(sum(kinds[kind] for kind in config.kinds), 0.0)


def saved_elements(config: ModelConfig, layer: int) -> float:
    """Count the elements a token that autograd saves for one block, on tensors without memory; on real ones where
    what is saved depends on values. It is that of PyTorch's operators: fused kernels save less, by up to a fifth."""
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
        delta = torch.randn(1, SAMPLE, config.d_model, requires_grad=True)
        y, _ = block(x, delta, rotary_table(torch.arange(SAMPLE), config.head_dim, config.rope_base))
        own = {p.untyped_storage()._cdata for p in block.parameters()}
        elements = sum(storage.nbytes() for address, storage in saved.items() if address not in own) / y.itemsize
    return elements / SAMPLE
