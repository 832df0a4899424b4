"""What every kind of attention shares: projections, norms of queries and keys, rotary positions, gates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcpt.attention.qk_norm import QK_NORMS, NormRotary
from lcpt.attention.resplit import Resplit
from lcpt.attention.state_exchange import StateExchange
from lcpt.parallel.sequence import SequenceSlice, shift
from lcpt.utils.recomputation import compute_once, recompute

if TYPE_CHECKING:
    from lcpt.attention import AttentionConfig


# What every kind may have: a layer whose kind changes keeps these, and nothing else of the old kind.
SHARED = ("qkv", "key_shift", "q_norm", "k_norm", "out_norm", "out", "gate_module")


class Projected(NamedTuple):
    """What a layer makes of T tokens before they meet each other."""

    q: Tensor  # [B, T, H, D], after the norm and rotary positions
    k: Tensor  # [B, T, Hkv, D], the same
    v: Tensor  # [B, T, Hkv, D]
    log_gate: Tensor | None = None  # fp32 [B, T, Hkv], ≤ 0
    q_plain: Tensor | None = None  # q and k without their positions, in kinds that have use for them
    k_plain: Tensor | None = None
    x: Tensor | None = None  # the layer's input, [B, T, d_model]
    last_key: Tensor | None = None  # [B, 1, Hkv, D], what the key shift of the next token needs; None without one


class Attention(nn.Module, ABC):
    """Multi-head causal self-attention, [B, T, d_model] -> [B, T, d_model]; a kind adds `attend`.

    Queries and keys pass a norm over the head dimension before RoPE: softmax gains most from it at a high learning
    rate, and the polynomial kinds need bounded scores. Without rotary positions, `rotary` is None. With a key shift m,
    a key is k_t + m ∘ k_{t−1}: it knows the token before its own, which saves associative recall a layer.
    """

    keep_plain = False  # whether `attend` takes q and k without their positions too

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, config: AttentionConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, config.head_dim or d_model // n_heads
        self.qkv = nn.Linear(d_model, (n_heads + 2 * n_kv_heads) * self.head_dim, bias=config.bias)
        # A vector, [Hkv · D]: what has one dimension is not decayed.
        self.key_shift = (
            nn.Parameter(torch.full((n_kv_heads * self.head_dim,), KEY_SHIFT)) if config.key_shift else None
        )
        self.q_norm = QK_NORMS[config.qk_norm](self.head_dim, config.qk_norm_eps)
        self.k_norm = QK_NORMS[config.qk_norm](self.head_dim, config.qk_norm_eps)
        self.out_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if config.output_norm else nn.Identity()
        self.out = nn.Linear(n_heads * self.head_dim, d_model, bias=config.bias)

    @classmethod
    def resolve_class(cls, config: AttentionConfig) -> type[Attention]:
        """The class that is built under this config, where a kind has forms of different cost."""
        return cls

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cu_seqlens: Tensor | None = None,
        norm: Callable[[Tensor], Tensor] | None = None,
        part: SequenceSlice | None = None,
    ) -> Tensor:
        """cu_seqlens int [N + 1]: documents packed in one sequence, B = 1, each as if alone. norm: of x, for selective
        activation checkpointing: its result is made again in backward, and so are the normed queries and keys. part: x
        is this slice of longer sequences, and cu_seqlens has the borders in it; all ranks that share them call this."""
        if part is None:
            p = self.project(x, rotary, cu_seqlens=cu_seqlens, norm=norm)
            return self._merge(self.attend(p, cu_seqlens=cu_seqlens)[0])
        p = self.project(x, rotary, cu_seqlens=cu_seqlens, norm=norm, part=part)
        return self._merge(self.attend_between_ranks(p, part))

    def extend(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, state) -> tuple[Tensor, object]:
        """The same for the continuation of a sequence that left `state`, None at its start; and the state after it."""
        attended, last_key = state or (None, None)
        p = self.project(x, rotary, last_key)
        o, attended = self.attend(p, attended, keep=True)
        return self._merge(o), (attended, None if p.last_key is None else p.last_key.clone())  # a view would keep all

    def project(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        last_key: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        norm: Callable[[Tensor], Tensor] | None = None,
        part: SequenceSlice | None = None,
    ) -> Projected:
        """last_key: that of the tokens before x, where x continues a sequence; with a part it is the left rank's."""
        if norm is None:
            heads = self.qkv(x)
        else:
            x, heads = recompute(lambda x: self._qkv_of(norm(x)), x)
        # On a GPU NormRotary is one kernel, which keeps its input alone: there is nothing to save.
        fused = x.is_cuda and isinstance(self.q_norm, NormRotary)
        run = compute_once if norm is None or fused else recompute
        heads = heads.unflatten(-1, (-1, self.head_dim))  # [B, T, H + 2 Hkv, D]
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=2)
        q, q_plain = run(self.q_norm, q, rotary, self.keep_plain)
        if self.key_shift is None:
            k, k_plain = run(self.k_norm, k, rotary, self.keep_plain)
            return Projected(q, k, v, self.gate(x), q_plain, k_plain, x)
        key_shift = self.key_shift.view(self.n_kv_heads, -1)
        held = 0 if part is None else part.start
        starts = None if cu_seqlens is None else positions_in_documents(cu_seqlens, x.shape[1], held) == 0
        if part is not None:
            last_key = _last_key_before(part, k)
        shifted, k_plain = run(self.k_norm, k, rotary, self.keep_plain, key_shift, last_key, starts)
        return Projected(q, shifted, v, self.gate(x), q_plain, k_plain, x, k[:, -1:])

    def _qkv_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.qkv(x)

    def gate(self, x: Tensor) -> Tensor | None:
        """x [B, T, d_model] -> log gate, fp32 [B, T, Hkv], ≤ 0; None in kinds that have none."""
        return None

    @abstractmethod
    def attend(self, p: Projected, state=None, keep: bool = False, cu_seqlens: Tensor | None = None):
        """-> (o [B, T, H, D], the state after these tokens if `keep`): the continuation of what left `state`."""

    @abstractmethod
    def attend_between_ranks(self, p: Projected, part: SequenceSlice) -> Tensor:
        """Return o [B, T, H, D] of a slice of longer sequences, as `attend` would of the whole."""

    def aux_loss(self) -> Tensor | None:
        """What the last forward pass adds to the mean loss in training, a scalar; None in kinds that add nothing."""
        return None

    @abstractmethod
    def attend_flops(self, context: int) -> tuple[float, float]:
        """FLOPs a token of `attend` at this context, forward and backward, of the algorithm that really runs."""

    @abstractmethod
    def state_bytes(self, context: int) -> int:
        """Bytes that a sequence of `context` tokens leaves behind for decoding the next one, fp32."""

    def key_shift_bytes(self) -> int:
        """Bytes of the last key, which a sequence leaves behind for the shift of the next one, fp32."""
        return 0 if self.key_shift is None else 4 * self.key_shift.numel()

    def _merge(self, o: Tensor) -> Tensor:
        return self.out(self.out_norm(o).flatten(2))


class KeyValueCache(Attention):
    """A kind whose state is every key and value so far: [B, P, Hkv, D] each."""

    @abstractmethod
    def attend_to(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """q [B, T, H, D] against k, v [B, P + T, Hkv, D], whose last T are of the same tokens."""

    def attend(self, p: Projected, state=None, keep: bool = False, cu_seqlens: Tensor | None = None):
        k, v = p.k, p.v
        if state is not None:
            k, v = (torch.cat((before, x), dim=1) for before, x in zip(state, (k, v), strict=True))
        return self.attend_to(p.q, k, v, cu_seqlens), (k, v) if keep else None

    def attend_between_ranks(self, p: Projected, part: SequenceSlice) -> Tensor:
        exchange = Resplit(part, p.k)
        queries = exchange.queries(p.q)
        kept = exchange.keys({"k": p.k, "v": p.v})
        return exchange.home(
            [
                self.attend_to(q, kept["k"][:, piece.keys], kept["v"][:, piece.keys], piece.cu_seqlens(q.device))
                for q, piece in zip(queries, exchange.pieces, strict=True)
            ]
        )

    def state_bytes(self, context: int) -> int:
        return 4 * 2 * self.n_kv_heads * self.head_dim * context


class LinearCost(Attention):
    """A kind with exact weights in the last blocks and a state of features before them; it may have a gate."""

    local_blocks = 1
    summaries_per_block: int | None = None  # where the state is of summaries

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, config: AttentionConfig):
        super().__init__(d_model, n_heads, n_kv_heads, config)
        self.block_size = config.block_size
        self.gate_module = GATES[config.gate](d_model, n_kv_heads) if config.gate in GATES else None

    def gate(self, x: Tensor) -> Tensor | None:
        return None if self.gate_module is None else self.gate_module(x)

    def attend(self, p: Projected, state=None, keep: bool = False, cu_seqlens: Tensor | None = None):
        return self.attend_blocks(
            p,
            block_size=self.block_size,
            local_blocks=self.local_blocks,
            log_gate=p.log_gate,
            initial_state=state,
            output_final_state=keep,
            cu_seqlens=cu_seqlens,
        )

    def attend_between_ranks(self, p: Projected, part: SequenceSlice) -> Tensor:
        return self.attend_blocks(
            p,
            block_size=self.block_size,
            local_blocks=self.local_blocks,
            log_gate=p.log_gate,
            cu_seqlens=part.cu_seqlens,
            exchange=StateExchange(part, self.block_size, self.local_blocks, self.summaries_per_block),
        )[0]

    @abstractmethod
    def attend_blocks(self, p: Projected, **stream):
        """The kind's function of lcpt_kernels, which takes what is in `stream`."""

    @abstractmethod
    def features(self) -> int:
        """F: rows of the state of a head."""

    def score_size(self) -> int:
        """Length of the vectors whose product is a weight inside the last blocks."""
        return self.head_dim

    def map_flops(self) -> float:
        """FLOPs that make features of one query or key of one head, before attention begins."""
        return 0.0

    def floats_per_token(self) -> int:
        """Count the floats that a key-value head keeps of a token which has not yet gone over into the state."""
        return self.score_size() + self.head_dim

    def attend_flops(self, context: int) -> tuple[float, float]:
        reach = self.block_size * self.local_blocks
        maps = (self.n_heads + self.n_kv_heads) * self.map_flops()
        scores = 2.0 * self.n_heads * self.score_size() * min(context, reach)  # tiles are computed whole
        values = 2.0 * self.n_heads * self.head_dim * min(context, reach)
        state = 2.0 * self.n_heads * self.head_dim * self.features() * (context > reach)
        forward = maps + scores + values + 2 * state  # keys into the state, queries out of it
        return forward, 2 * maps + 3 * scores + 2 * values + 5 * state  # backward makes scores and state anew

    def state_bytes(self, context: int) -> int:
        tail = self.block_size * self.local_blocks * self.floats_per_token()
        return 4 * self.n_kv_heads * (self.features() * (self.head_dim + 1) + tail)


def positions_in_documents(cu_seqlens: Tensor, tokens: int, held: int = 0) -> Tensor:
    """Return the position of each token in its packed document, int64 [T]. The first document, which may be empty as
    others may, has `held` tokens before these."""
    # With output_size the host does not wait for the device.
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=tokens)
    place = torch.arange(tokens, device=cu_seqlens.device)
    return place - starts if held == 0 else place - starts + held * (place < cu_seqlens[1])


def _last_key_before(part: SequenceSlice, k: Tensor) -> Tensor:
    """Return the key of the token before the slice, [B, 1, Hkv, D]; 0 where a document begins with it."""
    last = shift(part, {"k": k}, [{"k": int(held > 0)} for held in part.held])["k"]
    return torch.cat((k.new_zeros(k.shape[0], 1 - last.shape[1], *k.shape[2:]), last), dim=1)


def in_fp32(x: Tensor) -> Tensor:
    """x in fp32; float64 stays what it is."""
    return x if x.dtype == torch.float64 else x.float()


class ScalarGate(nn.Module):
    """log g = log σ(b), learned per key-value head, e^−0.001 at first: [B, T, d_model] -> fp32 [B, T, Hkv]."""

    def __init__(self, d_model: int, n_kv_heads: int):
        super().__init__()
        self.bias = nn.Parameter(torch.full((n_kv_heads,), GATE_BIAS))

    def forward(self, x: Tensor) -> Tensor:
        return F.logsigmoid(self.bias.float()).expand(*x.shape[:2], -1)


class DataGate(nn.Module):
    """log g_t = log σ(W x_t + b), e^−0.001 at first (power attention, arXiv 2507.04239)."""

    def __init__(self, d_model: int, n_kv_heads: int):
        super().__init__()
        self.projection = nn.Linear(d_model, n_kv_heads)
        nn.init.zeros_(self.projection.weight)
        nn.init.constant_(self.projection.bias, GATE_BIAS)

    def forward(self, x: Tensor) -> Tensor:
        return F.logsigmoid(self.projection(x).float())


KEY_SHIFT = 0.5  # at first: a model that starts at 0 needs up to twice the steps to learn to recall
GATE_BIAS = 6.906768  # σ of it is 0.999: a memory of a thousand tokens
GATES = {"scalar": ScalarGate, "data": DataGate}


def rotary_table(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE (arXiv 2104.09864) for positions [T], each fp32 [T, 1, D/2]."""
    return cos_and_sin(positions, rotary_frequencies(head_dim, base, positions.device))


def rotary_frequencies(head_dim: int, base: float, device: torch.device) -> Tensor:
    """base^(−2i/D) for the pairs i of a head, float64 [D/2]."""
    return base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)


def cos_and_sin(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles that positions [T] have at frequencies float64 [D/2], each fp32 [T, 1, D/2].

    An angle in fp32 can be off by 1e-3 at position 32k and by 4e-2 at 1M.
    """
    angles = positions.double()[:, None, None] * frequencies
    return angles.cos().float(), angles.sin().float()
