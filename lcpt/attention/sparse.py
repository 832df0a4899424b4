"""sparse_qk and sparse_hash: softmax over fewer pairs (SCFA, arXiv 2306.01160).

sparse_qk: every head drops a share of its queries and of its keys. sparse_hash: it sees the keys in the bucket of its
query alone. A query that is dropped, or finds no key, adds nothing: the residual stream passes it on. Keys are dropped
or hashed per key-value head. Decisions depend on a token itself and its position alone, never on later tokens, nor on
the batch: they are the same in training, in its recomputation, in evaluation and in decoding. Where they are learned,
the pull towards a share is by all tokens of a micro-batch, packed documents together, on all ranks that share it.

With a window, a query that is not dropped sees its last tokens, itself among them, whatever is decided about them.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
from lcpt_kernels import sparse_attention
from lcpt_kernels.feature_maps import per_head
from lcpt_kernels.sparse import ROWS
from torch import Tensor, nn

from lcpt.attention.base import Attention, Projected, in_fp32, positions_in_documents
from lcpt.attention.resplit import Resplit, mean_over_ranks
from lcpt.parallel.sequence import SequenceSlice

AUX_LOSS_WEIGHT = (
    20.0  # where a loss pushes all scores one way, their share comes to rest 1 / AUX_LOSS_WEIGHT off its target
)
SEEDS = 2**24  # checkpoints hold fp32, which is exact up to here


@dataclass
class SparseQKConfig:
    """Says which queries and keys sparse_qk keeps. Raises ValueError that names a key out of its range."""

    keep: str = "random"  # random | learned
    drop: float = 0.5  # share of the queries, and of the keys, that a head drops
    window: int = 0  # last tokens that are seen in any case: 1 is the token itself, 0 none

    def __post_init__(self):
        check_window("sparse_qk", self.window)
        if self.keep not in ("random", "learned"):
            raise ValueError(f"model.attention.sparse_qk.keep is {self.keep!r}; it is random or learned")
        if not 0 < self.drop < 1:
            raise ValueError(f"model.attention.sparse_qk.drop is {self.drop}; it must be > 0 and < 1")


@dataclass
class SparseHashConfig:
    """Says how sparse_hash makes buckets. Raises ValueError that names a key out of its range."""

    hash: str = "lsh"  # lsh | learned
    buckets: int = 16
    window: int = 0  # last tokens that are seen in any case: 1 is the token itself, 0 none

    def __post_init__(self):
        check_window("sparse_hash", self.window)
        if self.hash not in ("lsh", "learned"):
            raise ValueError(f"model.attention.sparse_hash.hash is {self.hash!r}; it is lsh or learned")
        if self.buckets < 2 or self.hash == "lsh" and self.buckets % 2:
            raise ValueError(f"model.attention.sparse_hash.buckets is {self.buckets}; it must be ≥ 2, for lsh even")


def check_window(kind: str, window: int) -> None:
    if window < 0:
        raise ValueError(f"model.attention.{kind}.window is {window}; it must be ≥ 0")


class Marks(NamedTuple):
    """What a kind decides of T tokens; where it learns to, gates that are 1 and carry the gradient of the decision."""

    q: Tensor  # [B, T, H]
    k: Tensor  # [B, T, Hkv]
    q_gate: Tensor | None = None  # as q
    k_gate: Tensor | None = None  # as k


class Sparse(Attention):
    """The state is every key and value so far, and their marks: [B, P, Hkv, ·] each."""

    mark_bytes: int
    window: int

    @abstractmethod
    def marks(self, p: Projected, positions: Tensor, exchange: Resplit | None = None) -> Marks:
        """positions int64 [T], each token's in its document; exchange: of the ranks that share the sequence."""

    @abstractmethod
    def attend_to(
        self, q: Tensor, k: Tensor, v: Tensor, q_marks: Tensor, k_marks: Tensor, cu_seqlens: Tensor | None
    ) -> Tensor:
        """sparse_attention with these marks, both [B, ·, H]."""

    def attend(self, p: Projected, state=None, keep: bool = False, cu_seqlens: Tensor | None = None):
        if cu_seqlens is None:
            past = 0 if state is None else state[0].shape[1]
            positions = torch.arange(past, past + p.q.shape[1], device=p.q.device)
        else:
            positions = positions_in_documents(cu_seqlens, p.q.shape[1])
        marks = self.marks(p, positions)
        kept: tuple[Tensor, ...] = p.k, _gated(p.v, marks.k_gate), marks.k
        if state is not None:
            kept = tuple(torch.cat((before, x), dim=1) for before, x in zip(state, kept, strict=True))
        k, v, k_marks = kept
        o = _gated(self.attend_to(p.q, k, v, marks.q, self._per_query_head(k_marks), cu_seqlens), marks.q_gate)
        return o, kept if keep else None

    def attend_between_ranks(self, p: Projected, part: SequenceSlice) -> Tensor:
        tokens, device = p.q.shape[1], p.q.device
        if part.cu_seqlens is None:
            positions = torch.arange(part.start, part.start + tokens, device=device)
        else:
            positions = positions_in_documents(part.cu_seqlens.to(device, non_blocking=True), tokens, part.start)
        exchange = Resplit(part, p.k)
        marks = self.marks(p, positions, exchange)
        queries, q_marks = exchange.queries(p.q), exchange.queries(marks.q)
        kept = exchange.keys({"k": p.k, "v": _gated(p.v, marks.k_gate)}) | exchange.keys({"marks": marks.k})
        outputs = []
        for q, q_mark, piece in zip(queries, q_marks, exchange.pieces, strict=True):
            k, v, k_marks = (kept[name][:, piece.keys] for name in ("k", "v", "marks"))
            outputs.append(self.attend_to(q, k, v, q_mark, self._per_query_head(k_marks), piece.cu_seqlens(device)))
        return _gated(exchange.home(outputs), marks.q_gate)

    def _per_query_head(self, k_marks: Tensor) -> Tensor:
        return k_marks.repeat_interleave(self.n_heads // self.n_kv_heads, dim=2)

    def pair_flops(self, queries: float, keys: float) -> tuple[float, float]:
        """queries: the share of tokens that ask; keys: what one of them could see at the end of the sequence. A tile
        of ROWS queries computes all keys between its first and its last; backward makes the scores anew."""
        near = self.window + ROWS if self.window else 0
        product = 2.0 * self.n_heads * self.head_dim * queries * (keys / 2 + ROWS + near)
        return 2 * product, 5 * product

    def state_bytes(self, context: int) -> int:
        return self.n_kv_heads * (4 * 2 * self.head_dim + self.mark_bytes) * context


class SparseQK(Sparse):
    """Drops queries and keys: at random, or as each head learns to.

    Random is drawn once and kept: a head's seed, mixed with a token's position in its document, decides. So training
    is trained on what evaluation and decoding use, nothing has to be carried through recomputation or between ranks,
    and half of a head's pairs being lost is known to the model. Drawn anew at every forward pass, as in the paper, the
    same weights would have to serve every draw, and perplexity would be a matter of luck.
    """

    mark_bytes = 1

    def __init__(self, d_model, n_heads, n_kv_heads, config):
        super().__init__(d_model, n_heads, n_kv_heads, config)
        own: SparseQKConfig = config.sparse_qk
        self.drop, self.window = own.drop, own.window
        self.chooser = CHOOSERS[own.keep](d_model, n_heads, n_kv_heads, own.drop)

    def marks(self, p: Projected, positions: Tensor, exchange: Resplit | None = None) -> Marks:
        return self.chooser(p, positions, exchange)

    def attend_to(self, q, k, v, q_marks, k_marks, cu_seqlens):
        return sparse_attention(q, k, v, q_keep=q_marks, k_keep=k_marks, window=self.window, cu_seqlens=cu_seqlens)

    def attend_flops(self, context: int) -> tuple[float, float]:
        return self.pair_flops(1 - self.drop, (1 - self.drop) * context)


class RandomKeep(nn.Module):
    """A token is kept where its position and the head's seed, mixed, fall into the upper part of 2³² integers."""

    q_seeds: Tensor  # [H]
    k_seeds: Tensor  # [Hkv]

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, drop: float):
        super().__init__()
        self.threshold = int(drop * 2**32)
        self.register_buffer("q_seeds", torch.randint(SEEDS, (n_heads,)))
        self.register_buffer("k_seeds", torch.randint(SEEDS, (n_kv_heads,)))

    def forward(self, p: Projected, positions: Tensor, exchange: Resplit | None = None) -> Marks:
        keep = [mixed(positions[:, None] ^ mixed(seeds)) >= self.threshold for seeds in (self.q_seeds, self.k_seeds)]
        return Marks(*(x.expand(len(p.q), -1, -1) for x in keep))


class LearnedKeep(nn.Module):
    """A token is kept where its score w·x + b of this head is positive; σ of the score is what the gate's gradient
    reaches. The bias starts where the target share of normally distributed scores is positive, and the pull holds the
    share of a batch near it. Scores learn from tokens that are seen; the layer's input learns nothing from them."""

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, drop: float):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.kept = n_heads, n_kv_heads, 1 - drop
        self.projection = nn.Linear(d_model, n_heads + n_kv_heads)
        nn.init.normal_(self.projection.weight, std=d_model**-0.5)
        nn.init.constant_(self.projection.bias, NormalDist().inv_cdf(self.kept))

    def forward(self, p: Projected, positions: Tensor, exchange: Resplit | None = None) -> Marks:
        assert p.x is not None
        scores = in_fp32(self.projection(p.x.detach()))  # [B, T, H + Hkv]
        keep = scores > 0
        share = over_all_tokens(keep.to(scores.dtype), exchange)
        gate = straight_through(pulled(scores, AUX_LOSS_WEIGHT * (share - self.kept), exchange).sigmoid())
        heads = self.n_heads, self.n_kv_heads
        return Marks(*keep.split(heads, dim=2), *gate.split(heads, dim=2))


class SparseHash(Sparse):
    """Sees the keys in its own bucket: of a fixed random hash, or a learned one.

    Queries and keys are hashed alike, after rotary positions: what shares a bucket has a high product.
    """

    mark_bytes = 4

    def __init__(self, d_model, n_heads, n_kv_heads, config):
        super().__init__(d_model, n_heads, n_kv_heads, config)
        own: SparseHashConfig = config.sparse_hash
        self.buckets, self.window = own.buckets, own.window
        self.hash = HASHES[own.hash](n_kv_heads, self.head_dim, own.buckets)

    def marks(self, p: Projected, positions: Tensor, exchange: Resplit | None = None) -> Marks:
        (q, q_gate), (k, k_gate) = self.hash(p.q, exchange), self.hash(p.k, exchange)
        return Marks(q, k, q_gate, k_gate)

    def attend_to(self, q, k, v, q_marks, k_marks, cu_seqlens):
        return sparse_attention(q, k, v, q_bucket=q_marks, k_bucket=k_marks, window=self.window, cu_seqlens=cu_seqlens)

    def attend_flops(self, context: int) -> tuple[float, float]:
        """As if buckets were of equal size."""
        forward, backward = self.pair_flops(1, context / self.buckets)
        maps = (self.n_heads + self.n_kv_heads) * self.hash.flops
        return forward + maps, backward + maps * self.hash.learns


class RandomHash(nn.Module):
    """The nearest of ± buckets/2 random directions: argmax [x R, −x R], as in Reformer (arXiv 2001.04451).

    One R per key-value head, drawn once; it travels with the weights. [B, T, H, d] -> int32 [B, T, H], and no gate.
    """

    learns = False
    R: Tensor  # [Hkv, d, buckets / 2]

    def __init__(self, n_kv_heads: int, head_dim: int, buckets: int):
        super().__init__()
        R = torch.randn(n_kv_heads, head_dim, buckets // 2)
        self.register_buffer("R", R / R.norm(dim=1, keepdim=True))
        self.flops = 2.0 * head_dim * (buckets // 2)

    @torch.no_grad()
    def forward(self, x: Tensor, exchange: Resplit | None = None) -> tuple[Tensor, None]:
        along = per_head(in_fp32(x), self.R)
        return torch.cat((along, -along), dim=-1).argmax(-1).int(), None


class LearnedHash(nn.Module):
    """argmax of x W + b, of one W and b per key-value head; the probability of the chosen bucket is what the gate's
    gradient reaches, and the pull makes buckets equal. Only W and b learn from it."""

    learns = True

    def __init__(self, n_kv_heads: int, head_dim: int, buckets: int):
        super().__init__()
        self.W = nn.Parameter(torch.randn(n_kv_heads, head_dim, buckets) * head_dim**-0.5)
        self.b = nn.Parameter(torch.zeros(n_kv_heads * buckets))
        self.flops = 2.0 * head_dim * buckets

    def forward(self, x: Tensor, exchange: Resplit | None = None) -> tuple[Tensor, Tensor]:
        b = in_fp32(self.b).view(len(self.W), -1).repeat_interleave(x.shape[2] // len(self.W), dim=0)
        logits = per_head(in_fp32(x.detach()), self.W) + b  # [B, T, H, buckets]
        bucket = logits.argmax(-1)
        hits = nn.functional.one_hot(bucket, logits.shape[-1]).to(logits.dtype)
        share = over_all_tokens(hits, exchange)  # [H, buckets]
        logits = pulled(logits, AUX_LOSS_WEIGHT * (logits.shape[-1] * share - 1), exchange)
        return bucket.int(), straight_through(logits.softmax(-1).gather(-1, bucket[..., None])[..., 0])


def over_all_tokens(x: Tensor, exchange: Resplit | None) -> Tensor:
    """Return the mean of x [B, T, ...] over the tokens of all ranks."""
    mean = x.mean((0, 1))
    return mean if exchange is None else mean_over_ranks(mean, exchange.part.group)


def pulled(x: Tensor, direction: Tensor, exchange: Resplit | None = None) -> Tensor:
    """Return x [B, T, H, ...] as it is; add `direction` to its gradient, in units of the head's mean absolute gradient.

    In proportion to the gradient, so that it means the same at any scale of the loss, and adds up over micro-batches
    and ranks as gradients do.
    """
    if exchange is None:
        return AuxLossGradient.apply(x, x.new_empty(0), direction, None)[0]
    x, exchange.thread = AuxLossGradient.apply(x, exchange.thread, direction, exchange.part.group)
    return x


class AuxLossGradient(torch.autograd.Function):
    """What `pulled` does. The thread of an exchange goes through it, as its backward pass has a collective too."""

    @staticmethod
    def forward(ctx, x, thread, direction, group):
        ctx.save_for_backward(direction)
        ctx.group = group
        return x.view_as(x), thread.view_as(thread)

    @staticmethod
    def backward(ctx, gradient, d_thread):
        (direction,) = ctx.saved_tensors
        others = [n for n in range(gradient.ndim) if n != 2]
        size = gradient.abs().mean(others, keepdim=True)
        if ctx.group is not None:
            size = mean_over_ranks(size, ctx.group)
        return gradient + direction * size, d_thread, None, None


def straight_through(p: Tensor) -> Tensor:
    """Exactly 1, with the gradient of p."""
    return (p - p.detach()) + 1


def mixed(x: Tensor) -> Tensor:
    """Numbers below 2³², int64, scrambled one to one: every bit of x moves half of the bits."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x045D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate[..., None].to(x.dtype)


CHOOSERS = {"random": RandomKeep, "learned": LearnedKeep}
HASHES = {"lsh": RandomHash, "learned": LearnedHash}
