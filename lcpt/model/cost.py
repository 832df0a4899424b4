"""Count what a model costs: parameters, FLOPs a token, bytes. Nothing else adds them up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from lcpt_kernels.cross_entropy import LOGITS_IN_TRITON
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from lcpt.attention.base import rotary_table
from lcpt.model.feed_forward import PIECE, FeedForward
from lcpt.model.gpt import GPT, Block, ModelConfig

SAMPLE = 1024  # tokens on which memory is counted; it grows in proportion
REDUCE_BUCKET = 500_000_000  # elements of the buffer in which DeepSpeed collects gradients before it reduces them
LIVE_WEIGHTS = 1_000_000_000  # weights that DeepSpeed leaves gathered at stage 3


class Flops(NamedTuple):
    """Counts FLOPs a token."""

    forward: float
    backward: float
    recomputed: float  # what activation checkpointing computes again in backward


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Holds what a model costs: see model_cost."""

    modules: dict[str, tuple[int, ...]]  # sizes of the parameters of "embedding", each block ("blocks.0"), "norm", …
    flops: dict[str, Flops]  # by part: projections, attention of each kind, feed-forward, head
    state_bytes: int  # of one sequence, for decoding the token after `context`

    @property
    def parameters(self) -> int:
        return sum(map(sum, self.modules.values()))

    @property
    def flops_forward(self) -> float:  # a token
        return sum(part.forward for part in self.flops.values())

    @property
    def flops_trained(self) -> float:  # a token, forward and backward
        return self.flops_forward + sum(part.backward for part in self.flops.values())

    @property
    def flops_step(self) -> float:  # the same with what activation checkpointing computes again
        return self.flops_trained + sum(part.recomputed for part in self.flops.values())


class Saved(NamedTuple):
    """Counts elements a token that exist for backward."""

    always: float
    at_times: float  # beside the others, while backward runs through a block
    in_pieces: float = 0.0  # beside those, of at most PIECE tokens


def model_cost(config: ModelConfig, context: int) -> Cost:
    """Count the cost on the model itself, built without memory: matrix products at 2 FLOPs a multiply-add, and the
    attention of each layer as its kind states it."""
    with torch.device("meta"):
        model = GPT(config)
    again = float(config.recomputes_blocks)
    # In pieces the feed-forward network is computed with its block, and each piece once more.
    times = {"projections": again, "feed-forward": again + (config.activation_checkpointing == "offload")}
    flops: dict[str, Flops] = {}

    def add(part: str, forward: float, backward: float, recomputed: float) -> None:
        before = flops.get(part, Flops(0.0, 0.0, 0.0))
        flops[part] = Flops(before.forward + forward, before.backward + backward, before.recomputed + recomputed)

    for block, kind in zip(model.blocks, config.kinds, strict=True):
        for part, module in {"projections": block.attention, "feed-forward": block.feed_forward}.items():
            # Every matrix of a block, but a sketch's, meets a token once.
            product = 2.0 * sum(p.numel() for p in module.parameters() if p.ndim == 2)
            add(part, product, 2 * product, times[part] * product)
        forward, backward = block.attention.attend_flops(context)
        add(f"attention: {kind}", forward, backward, again * forward)
    head = 2.0 * config.vocab_size * config.d_model  # an embedding is no product
    add("head", head, 2 * head, 0.0)
    return Cost(
        modules=_sizes_by_module(model),
        flops=flops,
        state_bytes=sum(b.attention.state_bytes(context) + b.attention.key_shift_bytes() for b in model.blocks),
    )


def _sizes_by_module(model: GPT) -> dict[str, tuple[int, ...]]:
    modules: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        first, number, *_ = name.split(".")
        modules.setdefault(f"{first}.{number}" if first == "blocks" else first, []).append(parameter.numel())
    return {name: tuple(sizes) for name, sizes in modules.items()}


def memory_per_rank(
    config: ModelConfig,
    parameters: int,
    saved: Saved,
    *,
    tokens: int,
    world: int,
    zero_stage: int,
    precision: str,
    reduce_bucket: float = REDUCE_BUCKET,
) -> dict[str, float]:
    """Estimate the bytes on one rank of `world` that holds `tokens` tokens at a time, by what they hold.

    `saved` is that of activation_elements. Gradients are summed in fp32. ZeRO divides the optimizer's fp32
    weights and moments by the world at stage 1, the sum of gradients too at 2, weights too at 3; stage 0 divides
    nothing and has no copy of its fp32 weights. A micro-batch's own gradients are whole at stage 1 in bf16. At 2 and 3,
    and at 1 in fp32, they pass through a buffer of reduce_bucket elements; stage 2 then has a second share of them
    before it adds it to the sum, and stage 3 a copy of what the buffer holds. PyTorch's own memory, other communication
    buffers and short-lived temporaries are not counted.
    """
    width = 2 if precision == "bf16" else 4
    of_micro_batch = {
        0: 0,  # added to the sum where they are made
        1: width * (parameters if precision == "bf16" else reduce_bucket),
        2: width * reduce_bucket + 4 * parameters / world,
        3: 4 * (reduce_bucket + min(parameters, reduce_bucket)),
    }[zero_stage]
    parts = {
        "weights": width * parameters / (world if zero_stage >= 3 else 1),
        "gathered weights": width * min(parameters, LIVE_WEIGHTS) if zero_stage >= 3 else 0,
        "gradients": 4 * parameters / (world if zero_stage >= 2 else 1),
        "gradients of a micro-batch": of_micro_batch,
        "optimizer": 12 * parameters / world if zero_stage else 8 * parameters,
        "activations": width * saved.always * tokens,
        # A block is made again when the loss is over.
        "loss, or a block made again": max(
            _head_bytes(config, tokens, width),
            width * (saved.at_times * tokens + saved.in_pieces * min(tokens, PIECE)),
        ),
    }
    return {name: n_bytes for name, n_bytes in parts.items() if n_bytes}


def _head_bytes(config: ModelConfig, tokens: int, width: int) -> float:
    """Count what lives while the loss is computed: the last norm's input and output with a gradient, a chunk of logits,
    the gradient of the head's matrix in fp32 and then as it is returned."""
    logits = min(tokens * config.vocab_size, LOGITS_IN_TRITON)
    matrix = config.vocab_size * config.d_model
    return 3 * width * config.d_model * tokens + width * logits + (4 + width) * matrix


def bytes_moved(
    config: ModelConfig, parameters: int, *, kept: float, made: float, tokens: int, micro_batches: int, width: int
) -> float:
    """Count the bytes that one rank's forward and backward passes of a step, `tokens` tokens in all, at least move
    between a GPU and its memory.

    Of `made` elements a token that backward reads, a forward pass writes all and keeps `kept` (Saved.always, without
    and with activation checkpointing); the others are written again. In every micro-batch weights are read forward and
    backward, and for a full recomputation; gradients are written, read and added to an fp32 sum. Temporaries and a
    second reading of what no cache holds come on top.
    """
    again = config.recomputes_blocks
    per_micro_batch = (2 + again) * width + 2 * width + 2 * 4
    return width * (2 * made + made - kept) * tokens + micro_batches * per_micro_batch * parameters


def activation_elements(config: ModelConfig) -> Saved:
    """Count what all blocks save for backward. Under full activation checkpointing every block saves its input alone,
    and one block at a time all the rest, with the gradients of its two outputs and a wide one of its feed-forward
    network. Under offload the device has one of the inputs, that of the block before while a block is made again, and
    the gradient of what the feed-forward network reads, piece by piece."""
    whole = replace(config, activation_checkpointing=True) if config.recomputes_blocks else config
    kinds = {kind: saved_elements(whole, config.kinds.index(kind)) for kind in set(config.kinds)}
    if not config.recomputes_blocks:
        return Saved(sum(kinds[kind] for kind in config.kinds), 0.0)
    block, gradients = max(kinds.values()), 2 * config.d_model
    if config.activation_checkpointing is True:
        return Saved(config.n_layers * config.d_model, block + gradients + config.ff_width)
    wide = _saved_by_feed_forward(config)
    return Saved(config.d_model, block - wide + gradients + config.d_model, wide + config.ff_width)


def elements_on_host(config: ModelConfig) -> int:
    """Count the elements a token that the host keeps for backward: it gets them once, and gives them back once."""
    return config.n_layers * config.d_model if config.activation_checkpointing == "offload" else 0


def saved_elements(config: ModelConfig, layer: int) -> float:
    """Count the elements a token that autograd saves for one block, on tensors without memory; on real ones where
    what is saved depends on values. It is that of PyTorch's operators: fused kernels save less, by up to a fifth."""
    try:
        return _saved_elements(config, layer, FakeTensorMode())
    except (DataDependentOutputException, DynamicOutputShapeException):
        return _saved_elements(config, layer, torch.random.fork_rng(devices=[]))


def _saved_elements(config: ModelConfig, layer: int, mode: AbstractContextManager) -> float:
    with mode:
        block, (x, delta) = Block(config, layer), (_sample(config) for _ in range(2))
        rotary = rotary_table(torch.arange(SAMPLE), config.head_dim, config.rope_base)
        return _saved_by(lambda: block(x, delta, rotary), block.parameters())


def _saved_by_feed_forward(config: ModelConfig) -> float:
    """Count the same for the feed-forward network without its input."""
    with FakeTensorMode():
        x, network = _sample(config), FeedForward(config.feed_forward, config.d_model, config.ff_width, config.bias)
        return _saved_by(lambda: network(x), [x, *network.parameters()])


def _sample(config: ModelConfig) -> torch.Tensor:
    return torch.randn(1, SAMPLE, config.d_model, requires_grad=True)


def _saved_by(function: Callable[[], object], others: Iterable[torch.Tensor]) -> float:
    saved: dict[int, torch.UntypedStorage] = {}  # by address: the storages stay alive, so that none is used twice

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        function()
    own = {x.untyped_storage()._cdata for x in others}
    width = torch.get_default_dtype().itemsize
    return sum(storage.nbytes() for address, storage in saved.items() if address not in own) / width / SAMPLE
