"""At what sizes and settings the kernels of squared attention are held against their definition on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RAGGED = 4096 + 77  # tokens: no multiple of anything
FASTMAX = (1.0, 1.0, 0.5)


class Case(NamedTuple):
    """One call of squared_attention."""

    dtype: str = "bf16"
    head_dim: int = 64
    sketch: int = 32
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

    @property
    def name(self) -> str:
        """What differs from the first case."""
        parts = [f"{key}={value}" for key, value in self._asdict().items() if value != self._field_defaults[key]]
        return " ".join(parts).replace(", ", ",") or "plain"


def cases() -> list[Case]:
    """First those that a model runs."""
    shapes = [(16, 1), (32, 1), (32, 2), (64, 2)]
    return [
        *(Case(dtype, dim, sketch, local) for dtype in DTYPES for dim in (64, 128) for sketch, local in shapes),
        Case(gated=True), Case(gated=True, local_blocks=2), Case(gated=True, head_dim=128), Case("fp16", gated=True),
        Case("fp32", gated=True), Case("fp32", gated=True, local_blocks=2, sketch=16),
        *(Case(dtype, sketch=64, exact=False, coefficients=FASTMAX) for dtype in DTYPES),
        Case(sketch=64, exact=False, coefficients=FASTMAX, gated=True),
        Case("fp32", sketch=64, exact=False, coefficients=(1.0, 1.0, 0.0)),
        Case(key_heads=4), Case(heads=4, key_heads=1, gated=True), Case("fp32", key_heads=4, head_dim=128, batch=2),
        Case(tokens=4096, batch=4), Case(head_dim=256), Case(sketch=128, heads=4, key_heads=4),
        Case(lengths=(1, 2000, 256, 1916)), Case("fp32", lengths=(700, 0, 3000, 473), gated=True, local_blocks=2),
        Case(pieces=(1000, 1300)), Case("fp32", pieces=(256, 3001), gated=True, local_blocks=2),
        Case("fp32", pieces=(2500,), exact=False, sketch=64, coefficients=FASTMAX),
        Case(tokens=65536), Case(tokens=65536 + 77, gated=True, heads=4, key_heads=2),
    ]


def smaller(case: Case) -> Case:
    """The same in seconds of Triton's interpreter, which is right in fp32 alone."""
    size, tokens = 8, 27
    lengths = (1, 18, 0, 8) if case.lengths else ()
    pieces = (9, 19) if case.pieces else ()
    heads = 2 if case.heads != case.key_heads else 1
    return case._replace(
        dtype="fp32", head_dim=16, sketch=min(case.sketch, 16), tokens=tokens, batch=1, heads=heads, key_heads=1,
        block_size=size, lengths=lengths, pieces=pieces)


def inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Random, with gradients, in the case's dtype, a gate in fp32 as everywhere: a and b are unit vectors, so that
    1 + s stays positive."""
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int, width: int) -> Tensor:
        return torch.randn(case.batch, case.tokens, heads, width, generator=generator, device=device)

    made = {"a": normalize(random(case.heads, case.sketch), dim=-1),
            "b": normalize(random(case.key_heads, case.sketch), dim=-1), "v": random(case.key_heads, case.head_dim)}
    if case.exact:
        made |= {"q": random(case.heads, case.head_dim), "k": random(case.key_heads, case.head_dim)}
    made = {name: x.to(DTYPES[case.dtype]) for name, x in made.items()}
    if case.gated:
        made["log_gate"] = -torch.rand(made["v"].shape[:3], generator=generator, device=device) / case.block_size
    return {name: x.requires_grad_() for name, x in made.items()}


def options(case: Case, device: torch.device) -> dict:
    """The other arguments of squared_attention: local weights about as large together as those of the state."""
    given = {
        "coefficients": case.coefficients, "block_size": case.block_size, "local_blocks": case.local_blocks,
        "scale": case.head_dim**-0.5 if case.exact else 1.0, "offset": 0.01,
    }
    if case.lengths:
        given["cu_seqlens"] = torch.tensor([0, *case.lengths], device=device).cumsum(0)
    return given
