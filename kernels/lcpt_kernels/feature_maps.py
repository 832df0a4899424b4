"""Feature maps φ: R^d -> R^m, applied to queries or keys row by row. All but `affine` have φ ≥ 0, so that φ(q)·φ(k)
is a weight.

Every function takes x [B, T, H, d], floating point, of any strides and any T, and matrices [Hw, d, m] of Hw key-value
heads, H a multiple of Hw, which are cast to x's dtype. It returns φ(x) [B, T, H, m] in x's dtype: on a GPU in one
kernel, where d and m are at most 128. `feature_map` takes any map by name; the others are its maps of the papers.
"""

from __future__ import annotations

from torch import Tensor

from lcpt_kernels import dispatch
from lcpt_kernels.arguments import check_backend, check_sizes, require
from lcpt_kernels.autocast import under_autocast
from lcpt_kernels.constants import TINY
from lcpt_kernels.feature_map_definitions import FEATURE_MAPS, FeatureMap, matrix_shapes, per_head

__all__ = [
    "FEATURE_MAPS",
    "FeatureMap",
    "TINY",
    "affine",
    "aoglu",
    "elu1",
    "favor",
    "feature_map",
    "hedgehog",
    "matrix_shapes",
    "oglu",
    "per_head",
    "relu",
    "softplus",
]


def feature_map(name: str, x: Tensor, *matrices: Tensor, backend: str = "auto", **options: bool) -> Tensor:
    """Apply the feature map `name` of FEATURE_MAPS.

    Args:
        name: a name in FEATURE_MAPS.
        x: [B, T, H, d], floating point, any strides.
        *matrices: in the order of the map's entry, of Hw key-value heads: W and G [Hw, d, m], b [Hw, m],
            A [Hw, d, r], B [Hw, r, m]. They are cast to x's dtype; a fixed W is fp32 and gets no gradient.
        backend: "torch", "triton" (for a GPU) or "auto".
        **options: those of the map's entry, each False by default.

    Returns:
        φ(x) [B, T, H, m] in x's dtype; [B, T, H, 2 m] where the map has two halves.

    Raises:
        ValueError: a name or a shape that does not fit; it names what is wrong.

    Example:
        >>> import torch
        >>> feature_map("softplus", torch.zeros(1, 3, 4, 8), torch.zeros(2, 8, 5)).shape
        torch.Size([1, 3, 4, 5])
    """
    require(name in FEATURE_MAPS, f"feature map {name!r} is none of {', '.join(FEATURE_MAPS)}")
    return _apply(x, *matrices, name=name, backend=backend, **options)


def elu1(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute φ(x) = elu(x) + 1 (Transformers are RNNs, arXiv 2006.16236).

    Args:
        x: [B, T, H, d], floating point.
        backend: "torch", "triton" or "auto".

    Returns:
        φ(x) [B, T, H, d] in x's dtype.

    Example:
        >>> import torch
        >>> elu1(torch.tensor([1.0, 0.0, -1e9]).view(1, 1, 1, 3)).flatten()
        tensor([2., 1., 0.])
    """
    return _apply(x, name="elu1", backend=backend)


def affine(x: Tensor, W: Tensor, b: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute x W + b: a linear sketch, whose products are squared to be weights.

    Args:
        x: [B, T, H, d], floating point.
        W: [Hw, d, m].
        b: [Hw, m].
        backend: "torch", "triton" or "auto".

    Returns:
        [B, T, H, m] in x's dtype. A column of W that is zero makes b's element a constant of every row.

    Example:
        >>> import torch
        >>> affine(torch.ones(1, 1, 1, 2), -torch.eye(2)[None], torch.tensor([[0.0, 3.0]])).flatten()
        tensor([-1.,  2.])
    """
    return _apply(x, W, b, name="affine", backend=backend)


def relu(x: Tensor, W: Tensor, b: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute φ(x) = relu(x W + b) + 10⁻⁶ (T2R, arXiv 2103.13076).

    Args:
        x: [B, T, H, d], floating point.
        W: [Hw, d, m].
        b: [Hw, m].
        backend: "torch", "triton" or "auto".

    Returns:
        φ(x) [B, T, H, m] in x's dtype.

    Example:
        >>> import torch
        >>> relu(torch.ones(1, 1, 1, 2), torch.eye(2)[None], torch.tensor([[0.0, 1.0]])).flatten()
        tensor([1.0000, 2.0000])
    """
    return _apply(x, W, b, name="relu", backend=backend)


def favor(x: Tensor, W: Tensor, *, subtract_peak: bool = False, backend: str = "auto") -> Tensor:
    """Compute φ(x) = (exp(x' W − |x'|²/2) + 10⁻⁶) / √m with x' = x / d^¼ (FAVOR+, arXiv 2009.14794).

    E[φ(q)·φ(k)] = exp(q·k/√d) where the columns of W are Gaussian. Exponents are fp32.

    Args:
        x: [B, T, H, d], floating point.
        W: [Hw, d, m], fp32; a constant without a gradient.
        subtract_peak: subtract each row's largest exponent from the row, as a constant to the gradient. This is for
            queries, whose factors cancel against the denominator.
        backend: "torch", "triton" or "auto".

    Returns:
        φ(x) [B, T, H, m] in x's dtype.

    Example:
        >>> import torch
        >>> favor(torch.zeros(1, 1, 1, 2), torch.randn(1, 2, 4)).flatten()
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    return _apply(x, W, name="favor", backend=backend, subtract_peak=subtract_peak)


def hedgehog(x: Tensor, W: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute φ(x) = [softmax(x W), softmax(−x W)] (Hedgehog, arXiv 2402.04347).

    Args:
        x: [B, T, H, d], floating point.
        W: [Hw, d, m].
        backend: "torch", "triton" or "auto".

    Returns:
        φ(x) [B, T, H, 2 m] in x's dtype.

    Example:
        >>> import torch
        >>> hedgehog(torch.zeros(1, 1, 1, 2), torch.eye(2)[None]).flatten()
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    return _apply(x, W, name="hedgehog", backend=backend)


def softplus(x: Tensor, W: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute φ(x) = softplus(x W), a feed-forward kernel (arXiv 2211.04076).

    Args:
        x: [B, T, H, d], floating point.
        W: [Hw, d, m].
        backend: "torch", "triton" or "auto".

    Returns:
        φ(x) [B, T, H, m] in x's dtype.

    Example:
        >>> import torch
        >>> softplus(torch.zeros(1, 1, 1, 2), torch.eye(2)[None]).flatten()
        tensor([0.6931, 0.6931])
    """
    return _apply(x, W, name="softplus", backend=backend)


def oglu(x: Tensor, W: Tensor, G: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute φ(x) = softplus(x W) ∘ σ(x G), a gated feed-forward kernel (arXiv 2211.04076).

    Args:
        x: [B, T, H, d], floating point.
        W, G: [Hw, d, m].
        backend: "torch", "triton" or "auto".

    Returns:
        φ(x) [B, T, H, m] in x's dtype.

    Example:
        >>> import torch
        >>> oglu(torch.zeros(1, 1, 1, 2), torch.eye(2)[None], torch.eye(2)[None]).flatten()
        tensor([0.3466, 0.3466])
    """
    return _apply(x, W, G, name="oglu", backend=backend)


def aoglu(x: Tensor, W: Tensor, A: Tensor, B: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute φ(x) = softplus(x W) ∘ σ((x A) B), whose gate has low rank (arXiv 2211.04076).

    Args:
        x: [B, T, H, d], floating point.
        W: [Hw, d, m].
        A: [Hw, d, r].
        B: [Hw, r, m].
        backend: "torch", "triton" or "auto".

    Returns:
        φ(x) [B, T, H, m] in x's dtype.

    Example:
        >>> import torch
        >>> W, A, B = torch.eye(2)[None], torch.ones(1, 2, 1), torch.ones(1, 1, 2)
        >>> aoglu(torch.zeros(1, 1, 1, 2), W, A, B).flatten()
        tensor([0.3466, 0.3466])
    """
    return _apply(x, W, A, B, name="aoglu", backend=backend)


@under_autocast
def _apply(x: Tensor, *matrices: Tensor, name: str, backend: str, **options: bool) -> Tensor:
    entry = FEATURE_MAPS[name]
    check_backend(backend, ("auto", "torch", "triton"))
    _check(name, entry, x, matrices, options)
    if entry.fixed:
        matrices = (matrices[0].detach(), *matrices[1:])
    given = dict(zip(entry.matrices, matrices, strict=True))
    width = entry.width(x.shape[3], given["W"].shape[2] if "W" in given else 0)
    if dispatch.rows(name, backend, x, width):
        from lcpt_kernels.triton.fused import feature_maps as kernels

        if "A" in given:
            given["G"] = given.pop("A").to(x.dtype) @ given.pop("B").to(x.dtype)
        W, G, b = map(given.get, "WGb")
        return kernels.feature_map(name, x, W, G, b, options.get("subtract_peak", False))
    return entry.formula(x, *matrices, **options)


def _check(name: str, entry: FeatureMap, x: Tensor, matrices: tuple[Tensor, ...], options: dict[str, bool]) -> None:
    require(x.ndim == 4, f"x has {x.ndim} dimensions {tuple(x.shape)}; [B, T, H, d] needs 4")
    check_sizes("x", x)
    require(
        len(matrices) == len(entry.matrices),
        f"{name} takes {len(entry.matrices)} matrices ({', '.join(entry.matrices)}), not {len(matrices)}",
    )
    unknown = [option for option in options if option not in entry.options]
    require(not unknown, f"{name} has no option {', '.join(unknown)}")
    heads, d = x.shape[2:]
    given = dict(zip(entry.matrices, matrices, strict=True))
    for letter in ("W", "A"):  # their last size is free
        w = given.get(letter)
        if w is not None:
            fits = w.ndim == 3 and w.shape[1] == d
            require(fits, f"{letter} is {list(w.shape)}; x is {d} wide: [Hw, {d}, {'m' if letter == 'W' else 'r'}]")
            check_sizes(letter, w)
            require(heads % len(w) == 0, f"{heads} heads are no multiple of {len(w)}, those of {letter}")
    if not given:
        return
    rank = given["A"].shape[2] if "A" in given else 1
    for letter, shape in matrix_shapes(entry.matrices, len(given["W"]), d, given["W"].shape[2], rank).items():
        w = given[letter]
        require(w.shape == shape, f"{letter} is {list(w.shape)}; it must be {list(shape)}")
