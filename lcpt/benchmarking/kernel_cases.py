"""List the sizes and settings at which the kernels are compared with their definitions on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RAGGED = 4096 + 77  # tokens: no multiple of anything
FASTMAX = (1.0, 1.0, 0.5)
MARKS = {"kept": ("keep",), "hashed": ("bucket",), "both": ("keep", "bucket")}
BUCKETS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Describes one call of an attention function."""

    attention: str = "squared"
    dtype: str = "bf16"
    head_dim: int = 64
    sketch: int = 32  # width of a and b, or how many features
    summaries: int = 32  # of a block, in the attentions that have them
    local_blocks: int = 1
    gated: bool = False
    exact: bool = True  # with q and k
    coefficients: tuple[float, float, float] = (0.0, 0.0, 1.0)
    tokens: int = RAGGED
    batch: int = 1
    heads: int = 12
    key_heads: int = 12
    block_size: int = 256
    lengths: tuple[int, ...] = ()  # of packed documents
    pieces: tuple[int, ...] = ()  # where the sequence is cut: states go from one piece to the next
    local: str = "softmax"  # of flurka
    marks: str = "both"  # of sparse: kept, hashed, both
    window: int | None = None  # of softmax

    @property
    def whole_blocks(self) -> int:
        return sum(length // self.block_size for length in self.lengths or (self.tokens,))

    @property
    def name(self) -> str:
        """The settings that differ from the defaults."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        parts = [f"{key}={value}" for key, (value, default) in values.items() if value != default]
        return " ".join(parts).replace(", ", ",") or "plain"


def cases() -> list[Case]:
    """List first the headline, 64k tokens in sequences of 8k, 32k and 64k; then others that a model runs."""
    shapes = [(16, 1), (32, 1), (32, 2), (64, 2)]
    plain = Case()
    headline = [Case(tokens=8192, batch=8), Case(tokens=32768, batch=2), Case(tokens=65536)]
    squared = [
        *(
            replace(plain, dtype=dtype, head_dim=dim, sketch=sketch, local_blocks=local)
            for dtype in DTYPES
            for dim in (64, 128)
            for sketch, local in shapes
        ),
        Case(gated=True),
        Case(gated=True, local_blocks=2),
        Case(gated=True, head_dim=128),
        Case(dtype="fp16", gated=True),
        Case(dtype="fp32", gated=True),
        Case(dtype="fp32", gated=True, local_blocks=2, sketch=16),
        *(Case(dtype=dtype, sketch=64, exact=False, coefficients=FASTMAX) for dtype in DTYPES),
        Case(sketch=64, exact=False, coefficients=FASTMAX, gated=True),
        Case(dtype="fp32", sketch=64, exact=False, coefficients=(1.0, 1.0, 0.0)),
        Case(key_heads=4),
        Case(heads=4, key_heads=1, gated=True),
        Case(dtype="fp32", key_heads=4, head_dim=128, batch=2),
        Case(tokens=4096, batch=4),
        Case(head_dim=256),
        Case(sketch=128, heads=4, key_heads=4),
        Case(lengths=(1, 2000, 256, 1916)),
        Case(dtype="fp32", lengths=(700, 0, 3000, 473), gated=True, local_blocks=2),
        Case(pieces=(1000, 1300)),
        Case(dtype="fp32", pieces=(256, 3001), gated=True, local_blocks=2),
        Case(dtype="fp32", pieces=(2500,), exact=False, sketch=64, coefficients=FASTMAX),
        Case(tokens=65536 + 77, gated=True, heads=4, key_heads=2),
    ]
    feature = Case(attention="feature", sketch=64)
    flurka = Case(attention="flurka", sketch=64, local_blocks=2)
    sparse, lowrank = Case(attention="sparse"), Case(attention="lowrank", local_blocks=2)
    softmax = Case(attention="softmax", lengths=(1, 2000, 256, 1916, 0, 0))
    return [
        *headline,
        *squared,
        *(replace(feature, dtype=dtype) for dtype in DTYPES),
        replace(feature, sketch=16, gated=True),
        replace(feature, sketch=256, head_dim=128),
        replace(feature, key_heads=4, lengths=(1, 2000, 256, 1916)),
        *(replace(flurka, dtype=dtype) for dtype in DTYPES),
        replace(flurka, gated=True, key_heads=4),
        replace(flurka, local="linear", head_dim=128),
        replace(flurka, dtype="fp32", lengths=(700, 0, 3000, 473)),
        *(replace(sparse, dtype=dtype, marks=marks) for dtype, marks in zip(DTYPES, MARKS, strict=True)),
        replace(sparse, marks="hashed", head_dim=128, key_heads=4),
        replace(sparse, lengths=(1, 2000, 256, 1916)),
        lowrank,
        replace(lowrank, dtype="fp32", key_heads=4, lengths=(700, 0, 3000, 473)),
        *(replace(softmax, dtype=dtype) for dtype in DTYPES),
        replace(softmax, key_heads=4, head_dim=128, window=256),
    ]


def smaller(case: Case) -> Case:
    """Shrink a case to seconds of Triton's interpreter, which is right in fp32 alone."""
    size, tokens = 8, 27
    lengths = (1, 18, 0, 8) if case.lengths else ()
    pieces = (9, 19) if case.pieces else ()
    heads = 2 if case.heads != case.key_heads else 1
    return replace(
        case,
        dtype="fp32",
        head_dim=16,
        sketch=min(case.sketch, 16),
        summaries=2,
        tokens=tokens,
        batch=1,
        heads=heads,
        key_heads=1,
        block_size=size,
        window=case.window and 5,
        lengths=lengths,
        pieces=pieces,
    )


def inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Draw random inputs with gradients in the case's dtype, a gate in fp32."""
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int, width: int, rows: int = case.tokens) -> Tensor:
        return torch.randn(case.batch, rows, heads, width, generator=generator, device=device)

    made = INPUTS[case.attention](case, random)
    made = {name: x.to(DTYPES[case.dtype]) for name, x in made.items()}
    if case.gated:
        made["log_gate"] = -torch.rand(made["v"].shape[:3], generator=generator, device=device) / case.block_size
    return {name: x.requires_grad_() for name, x in made.items()}


def squared_inputs(case: Case, random: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Draw a and b as unit vectors, so that 1 + s stays positive."""
    made = {
        "a": normalize(random(case.heads, case.sketch), dim=-1),
        "b": normalize(random(case.key_heads, case.sketch), dim=-1),
        "v": random(case.key_heads, case.head_dim),
    }
    return made | (query_and_key(case, random) if case.exact else {})


def feature_inputs(case: Case, random: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Draw features that are not negative."""
    return {
        "phi_q": random(case.heads, case.sketch).abs(),
        "phi_k": random(case.key_heads, case.sketch).abs(),
        "v": random(case.key_heads, case.head_dim),
    }


def flurka_inputs(case: Case, random: Callable[..., Tensor]) -> dict[str, Tensor]:
    rows = case.whole_blocks * case.summaries
    made = query_and_key(case, random) | {"v": random(case.key_heads, case.head_dim)}
    if case.local == "linear":
        made = {name: x if name == "v" else x.abs() for name, x in made.items()}
    return made | {
        "phi_q": random(case.heads, case.sketch).abs(),
        "phi_summary": random(case.key_heads, case.sketch, rows).abs(),
        "v_summary": random(case.key_heads, case.head_dim, rows),
    }


def sparse_inputs(case: Case, random: Callable[..., Tensor]) -> dict[str, Tensor]:
    return query_and_key(case, random) | {"v": random(case.key_heads, case.head_dim)}


def lowrank_inputs(case: Case, random: Callable[..., Tensor]) -> dict[str, Tensor]:
    rows = case.whole_blocks * case.summaries
    return sparse_inputs(case, random) | {
        "q_far": random(case.heads, case.head_dim),
        "k_summary": random(case.key_heads, case.head_dim, rows),
        "v_summary": random(case.key_heads, case.head_dim, rows),
    }


def query_and_key(case: Case, random: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {"q": random(case.heads, case.head_dim), "k": random(case.key_heads, case.head_dim)}


INPUTS = {
    "squared": squared_inputs,
    "feature": feature_inputs,
    "flurka": flurka_inputs,
    "sparse": sparse_inputs,
    "lowrank": lowrank_inputs,
    "softmax": sparse_inputs,
}


def options(case: Case, device: torch.device) -> dict:
    """Build the arguments beside the inputs."""
    blocks = {"block_size": case.block_size, "local_blocks": case.local_blocks}
    scale = case.head_dim**-0.5
    given: dict[str, dict[str, Any]] = {
        # Local weights have about the same total as those of the state.
        "squared": {"coefficients": case.coefficients, "scale": scale if case.exact else 1.0, "offset": 0.01, **blocks},
        "feature": {"offset": 0.01, **blocks},
        "flurka": {"local": case.local, "scale": scale, "offset": 0.01, **blocks},
        "sparse": marks(case, device) if case.attention == "sparse" else {},
        "lowrank": {"summaries": case.summaries, **blocks},
        "softmax": {"window": case.window},
    }
    chosen = given[case.attention]
    if case.lengths:
        chosen["cu_seqlens"] = torch.tensor([0, *case.lengths], device=device).cumsum(0)
    return chosen


def marks(case: Case, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(1)

    def random(values: int) -> Tensor:
        size = case.batch, case.tokens, case.heads
        return torch.randint(values, size, generator=generator, device=device)

    made = {"keep": lambda: random(2).bool(), "bucket": lambda: random(BUCKETS)}
    return {f"{side}_{mark}": made[mark]() for side in "qk" for mark in MARKS[case.marks]}
