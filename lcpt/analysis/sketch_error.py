"""Measure how far a sketch is from the polynomial that it approximates: by theory, by experiment, on real heads."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from lcpt.attention.base import Projected
from lcpt.attention.polynomial import power_scale
from lcpt.attention.polysketch import DEGREE, Polysketch
from lcpt.attention.sketch import DRAW, RandomSketch

SIZES = (8, 16, 32, 64, 128)
SHIFTS = (0.0, 1.0)
COSINES = (0.0, 0.3, 0.6, 1.0)
PAIRS, DRAWS = 4096, 32  # pairs of q and k, and draws of the sketch, that an experiment averages over


def errors(head_dim: int, sketch_size: int, seed: int = 0) -> list[dict]:
    """Run an experiment for each random sketch, shift (none, and polysketch's default), size and cosine. q and k are
    LayerNormed Gaussian vectors whose cosine is the given one on average; 0: unrelated tokens."""
    rows = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for cosine in COSINES:
            q, k = pairs(head_dim, cosine, PAIRS)
            for kind, shift in itertools.product(DRAW, SHIFTS):
                for size in sorted({*SIZES, sketch_size}):
                    found = experiment(q, k, size, kind, DRAWS, shift)
                    rows.append({"sketch": kind, "shift": shift, "size": size, "cosine": cosine, **found})
    return rows


def pairs(head_dim: int, cosine: float, count: int) -> tuple[Tensor, Tensor]:
    """Draw q and k, fp32 [count, head_dim]: LayerNormed, |q|² = |k|² = head_dim."""
    q, other = torch.randn(2, count, head_dim)
    k = cosine * q + (1 - cosine**2) ** 0.5 * other
    return F.layer_norm(q, (head_dim,)), F.layer_norm(k, (head_dim,))


def sketched(x: Tensor, shift: float) -> Tensor:
    """Compute the vectors x' that RandomSketch sketches, [..., d] -> [..., d + 1]: q'·k' = scale·q·k + shift."""
    scale = power_scale(DEGREE, shift, x.shape[-1])
    return F.pad(scale**0.5 * x, (0, 1), value=shift**0.5)


def variance(q: Tensor, k: Tensor, size: int, kind: str, shift: float = 0.0) -> Tensor:
    """Compute Var S(q)·S(k) over the draw of the sketch, exactly: q, k [..., d] -> [...].

    With the vectors x' that are sketched, S(q)·S(k) is the mean of r products X_i Y_i, X_i = (g_i·q')(g_i·k') and Y_i
    alike of the second matrix, each of mean q'·k'. They are uncorrelated, so that Var = (E[X²]² − (q'·k')⁴) / r, where
    by fourth moments

        E[X²] = |q'|²|k'|² + 2 (q'·k')²                        of Gaussian g (Isserlis)
        E[X²] = |q'|²|k'|² + 2 (q'·k')² − 2 Σ_i q'_i² k'_i²    of g with random signs, an SRHT's columns

    Columns of an SRHT share their signs; its products are uncorrelated still, because given the signs a Hadamard
    matrix's columns average to q'·k' exactly. For LayerNormed vectors of cosine c, Gaussian g and no shift it is
    ((1 + 2 c²)² − c⁴) / r: √(8/r) of a perfect match, and of unrelated ones, where E[c⁴] ≈ 3/d², d/√(3 r).
    """
    q, k = sketched(q, shift), sketched(k, shift)
    squares = q.square(), k.square()
    match = (q * k).sum(-1)
    second = squares[0].sum(-1) * squares[1].sum(-1) + 2 * match.square()
    if kind == "srht":
        second = second - 2 * (squares[0] * squares[1]).sum(-1)
    return (second.square() - match**4) / size


def experiment(q: Tensor, k: Tensor, size: int, kind: str, draws: int, shift: float = 0.0) -> dict:
    """Measure the relative RMSE of S(q)·S(k) against (scale·q·k + shift)² over pairs q, k [n, d] and draws, beside its
    theory; and "weight_ratio": E[(S(q)·S(k))²] / E[(scale·q·k + shift)⁴], by how much too heavy the far weights are:
    1 + RMSE² in theory.

    standard_error is that of relative_rmse, from how far the draws differ.
    """
    scale = power_scale(DEGREE, shift, q.shape[-1])
    exact = (scale * (q * k).sum(-1) + shift).square()
    power = exact.square().mean()
    sketches = (RandomSketch(q.shape[-1], size, kind, scale, shift) for _ in range(draws))
    found = torch.stack([(sketch(q) * sketch(k)).sum(-1) for sketch in sketches])  # [draws, n]
    of_draw = (found - exact).square().mean(-1) / power
    rmse, theory = of_draw.mean().sqrt(), (variance(q, k, size, kind, shift).mean() / power).sqrt()
    return {
        "relative_rmse": rmse.item(),
        "standard_error": (of_draw.std() / draws**0.5 / (2 * rmse)).item(),
        "theory": theory.item(),
        "weight_ratio": (found.square().mean() / power).item(),
        "weight_ratio_theory": (1 + theory.square()).item(),
    }


@torch.no_grad()
def errors_of_layer(layer: Polysketch, p: Projected) -> list[dict | None]:
    """Compare, for each head of one sequence, p [1, T, ...], the far weights e^γ (S(q)·S(k))² of the layer with
    (scale·q·k + shift)⁴, over the pairs of earlier blocks. None where all of T tokens are local.

    relative_error: of the weights, in the Frobenius norm; best_scale_error: the least that any common factor, such as
    γ, could make it. row_mass_error: of each query's sum of weights, the denominator, in the Euclidean norm;
    row_mass_ratio: the median of those sums over the exact ones.
    """
    T, group = p.q.shape[1], p.q.shape[2] // p.k.shape[2]
    block = torch.arange(T, device=p.q.device) // layer.block_size
    far = block[None, :] <= block[:, None] - layer.local_blocks  # [T, T]
    if not far.any():
        return [None] * layer.n_heads
    a, b = layer.sketch(p.q)[0], layer.sketch(p.k)[0]  # [T, H, r]
    rows: list[dict | None] = []
    for head in range(layer.n_heads):
        q, k = p.q[0, :, head].double(), p.k[0, :, head // group].double()
        exact = (layer.scale * (q @ k.T) + layer.shift) ** DEGREE * far
        sketched = layer.gamma[head].exp() * (a[:, head].double() @ b[:, head // group].double().T).square() * far
        mass, sketched_mass = exact.sum(-1), sketched.sum(-1)
        cosine = (exact * sketched).sum() / (exact.norm() * sketched.norm())
        asking = far.any(-1)
        rows.append(
            {
                "relative_error": ((sketched - exact).norm() / exact.norm()).item(),
                "best_scale_error": (1 - cosine.square()).clamp(min=0).sqrt().item(),
                "row_mass_error": ((sketched_mass - mass).norm() / mass.norm()).item(),
                "row_mass_ratio": (sketched_mass[asking] / mass[asking]).median().item(),
            }
        )
    return rows
