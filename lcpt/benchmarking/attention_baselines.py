"""Define the baselines: softmax by PyTorch's kernels, a sliding window, linear attention by another library.

Each comes with its own definition. Where a library is not installed, Unavailable says so; a backend that does not
support the tensors raises its own error, when it is first run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from lcpt_kernels import sparse_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lcpt.attention.base import Projected
from lcpt.benchmarking.attention_layer import ROUNDED, Layer, Method
from lcpt.benchmarking.roofline import softmax_cost

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SOFTMAX = (*(f"sdpa_{name}" for name in SDPA), "sdpa_cpu", "flex")  # one function by different kernels
WINDOW = 1024  # tokens that a query sees: four blocks of 256
GLA_FEATURES = 640  # their state is as large as that of a sketch of 32
BASED_FEATURES = 16  # the widest queries and keys that Based takes
MASK_BLOCK = 128  # tokens of a block of a mask


class Unavailable(ImportError):
    """Names in one line what a baseline needs."""


def sdpa(name: str, layer: Layer) -> Method:
    """Use one backend of scaled_dot_product_attention; "cpu" leaves the choice to PyTorch."""

    def attend(q, k, v) -> Tensor:
        if name not in SDPA:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        with sdpa_kernel([SDPA[name]]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    cost = partial(softmax_cost, layer.heads, layer.head_dim)
    return Method(
        settings={},
        inputs=heads_first,
        attend=attend,
        definition=partial(softmax, window=None),
        tolerance=ROUNDED,
        cost=cost,
    )


def flex(window: int | None, layer: Layer) -> Method:
    """Use FlexAttention, causal or over a sliding window; on a GPU compiled for each context anew, which is fastest."""
    run = compiled if layer.device.type == "cuda" else lambda tokens: flex_attention

    def attend(q, k, v) -> Tensor:
        mask = causal_mask(q.shape[2], window, q.device)
        return run(q.shape[2])(q, k, v, block_mask=mask).transpose(1, 2)

    settings = {} if window is None else {"window": window}
    return Method(
        settings=settings,
        inputs=heads_first,
        attend=attend,
        definition=partial(softmax, window=window),
        tolerance=ROUNDED,
    )


def flex_sparse(marking: Callable[[Layer, int], dict[str, Tensor]], layer: Layer) -> Method:
    """Use FlexAttention with the mask of sparse attention. In token order almost every block has pairs to see, so that
    it skips only blocks after the diagonal."""
    run = compiled if layer.device.type == "cuda" else lambda tokens: flex_attention
    marks = lru_cache(maxsize=1)(partial(marking, layer))
    mask = lru_cache(maxsize=1)(lambda tokens: sparse_mask(marks(tokens)))

    def attend(q, k, v) -> Tensor:
        return run(q.shape[2])(q, k, v, block_mask=mask(q.shape[2])).transpose(1, 2)

    def definition(q, k, v) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return sparse_attention(q, k, v, **marks(q.shape[1]), backend="reference")

    return Method(
        settings={"marks": marking.__name__},
        inputs=heads_first,
        attend=attend,
        definition=definition,
        tolerance=ROUNDED,
    )


def half_kept(layer: Layer, tokens: int) -> dict[str, Tensor]:
    """Draw marks of sparse_attention that drop half of the queries and of the keys of every head."""
    return {name: random_marks(layer, tokens, 2).bool() for name in ("q_keep", "k_keep")}


def sixteen_buckets(layer: Layer, tokens: int) -> dict[str, Tensor]:
    return {name: random_marks(layer, tokens, 16) for name in ("q_bucket", "k_bucket")}


def random_marks(layer: Layer, tokens: int, values: int) -> Tensor:
    return torch.randint(values, (layer.batch, tokens, layer.heads), device=layer.device)


def sparse_mask(marks: dict[str, Tensor]) -> BlockMask:
    """Build the mask of marks [B, T, H]: a query sees the kept keys up to itself that are in its bucket."""
    q_marks, k_marks = (x.transpose(1, 2).contiguous() for x in marks.values())
    kept, tokens = "q_keep" in marks, q_marks.shape[2]

    def seen(batch, head, t, s):
        q_mark, k_mark = q_marks[batch, head, t], k_marks[batch, head, s]
        return (s <= t) & (q_mark & k_mark if kept else q_mark == k_mark)

    blocks = torch.ones(2 * (-(-tokens // MASK_BLOCK),), dtype=torch.bool, device=q_marks.device).tril()
    return BlockMask.from_kv_blocks(
        *block_indices(blocks), BLOCK_SIZE=MASK_BLOCK, mask_mod=seen, seq_lengths=(tokens, tokens)
    )


@lru_cache(maxsize=1)
def compiled(tokens: int) -> Callable[..., Tensor]:
    torch.compiler.reset()  # it keeps a few versions of a function; beyond those it runs a slow one
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=4)
def causal_mask(tokens: int, window: int | None, device: torch.device) -> BlockMask:
    """Build the mask t − window < s ≤ t by blocks: at a long context [T, T] would not fit in memory."""

    def seen(batch, head, t, s):
        return (s <= t) if window is None else (s <= t) & (t - s < window)

    first = torch.arange(0, tokens, MASK_BLOCK, device=device)
    last = (first + MASK_BLOCK).clamp(max=tokens) - 1
    some = first[None, :] <= last[:, None]
    whole = (last[None, :] <= first[:, None]) & (first + MASK_BLOCK <= tokens)[
        :, None
    ]  # a short block has rows to mask
    if window is not None:
        some &= first[:, None] - last[None, :] < window
        whole &= last[:, None] - first[None, :] < window
    return BlockMask.from_kv_blocks(
        *block_indices(some & ~whole),
        *block_indices(whole),
        BLOCK_SIZE=MASK_BLOCK,
        mask_mod=seen,
        seq_lengths=(tokens, tokens),
    )


def block_indices(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Convert bool [n, n] to BlockMask's form, int32: counts of each row [1, 1, n], set columns first [1, 1, n, n]."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], order.int()[None, None].contiguous()


def fla_simple_gla(layer: Layer) -> Method:
    """Use linear attention of given features, without a gate: with one it needs a newer Triton on Hopper."""
    require_fla()
    from fla.ops.simple_gla import chunk_simple_gla

    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(layer.head_dim, GLA_FEATURES, generator=generator).to(layer.device) * layer.head_dim**-0.5

    def inputs(p: Projected) -> list[Tensor]:
        q, k = (F.relu(x.detach().float() @ draw).to(x.dtype).requires_grad_() for x in (p.q, p.k))
        return [q, k, p.v.detach().contiguous().requires_grad_()]

    def attend(q, k, v) -> Tensor:
        return chunk_simple_gla(q, k, v, scale=1 / GLA_FEATURES)[0]

    return Method(
        settings={"features": GLA_FEATURES, "gate": "none"},
        inputs=inputs,
        attend=attend,
        definition=linear,
        tolerance=ROUNDED,
    )


def fla_based(layer: Layer) -> Method:
    """Use Based (arXiv 2402.18668): 1 + s + s²/2 of narrow queries and keys, in the library's kernel of linear cost."""
    require_fla()
    from fla.ops.based import fused_chunk_based

    def inputs(p: Projected) -> list[Tensor]:
        narrow = (x.detach()[..., :BASED_FEATURES].contiguous().requires_grad_() for x in (p.q, p.k))
        return [*narrow, p.v.detach().contiguous().requires_grad_()]

    return Method(
        settings={"features": BASED_FEATURES},
        inputs=inputs,
        attend=fused_chunk_based,
        definition=based,
        tolerance=ROUNDED,
    )


def require_fla() -> None:
    if find_spec("fla") is None:
        raise Unavailable("flash-linear-attention is not installed")


def heads_first(p: Projected) -> list[Tensor]:
    """Transpose q, k and v to PyTorch's [B, H, T, D]."""
    return [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (p.q, p.k, p.v)]


def softmax(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Compute softmax attention, q, k, v [B, H, T, D] -> [B, T, H, D], over a token and the window − 1 before it."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    unseen = torch.ones_like(scores, dtype=torch.bool).triu(1)
    if window is not None:
        unseen |= torch.ones_like(unseen).tril(-window)
    return (scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute o_t = Σ_{s ≤ t} (q_t·k_s / F) v_s, q, k [B, T, H, F], v [B, T, H, D]."""
    weights = torch.einsum("bthf,bshf->bhts", q, k).tril() / GLA_FEATURES
    return torch.einsum("bhts,bshd->bthd", weights, v)


def based(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention of weights 1 + s + s²/2, s = q_t·k_s / 4, normalised; q, k [B, T, H, 16], v [B, T, H, D]."""
    s = torch.einsum("bthf,bshf->bhts", q, k) * q.shape[-1] ** -0.5
    weights = (1 + s + s.square() / 2).tril()
    return torch.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdim=True), v)


BASELINES: dict[str, dict[str, Callable[[Layer], Method]]] = {  # by type of device
    "cpu": {"sdpa_cpu": partial(sdpa, "cpu")},
    "cuda": {f"sdpa_{name}": partial(sdpa, name) for name in SDPA}
    | {
        "flex": partial(flex, None),
        "window": partial(flex, WINDOW),
        "flex_qk": partial(flex_sparse, half_kept),
        "flex_hash": partial(flex_sparse, sixteen_buckets),
        "fla_simple_gla": fla_simple_gla,
        "fla_based": fla_based,
    },
}
