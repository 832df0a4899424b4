"""What the kernels before squared attention compute and move in a layer of polysketch: LayerNorm and positions of q and
of k with its key shift, and the linear sketch of both; see `kernel_work.py`."""

from __future__ import annotations

from lcpt_kernels.triton.common import launch_configs

from lcpt.benchmarking.kernel_work import FP32_BYTES, Size, Work, padded, product, steps


def forward(size: Size, heads: int) -> list[Work]:
    return [
        norm_rotary(size, heads, "norm_rotary_forward", 2),
        norm_rotary(size, heads, "norm_rotary_forward", 2)._replace(settings=with_key_shift(size)),
        sketch(size, "feature_map_forward", 1),
        sketch(size, "feature_map_forward", 1),
    ]


def backward(size: Size, heads: int) -> list[Work]:
    """q and k have a second gradient, from attention, which PyTorch adds to that of their sketch."""
    added = Work("aten.add", 3 * size.rows("wide"), 0)
    return [
        sketch(size, "feature_map_backward", 2),
        sketch(size, "feature_map_backward", 2),
        added,
        added,
        norm_rotary(size, heads, "norm_rotary_backward", 3),
        shifted_norm_rotary_backward(size, heads),
    ]


def norm_rotary(size: Size, heads: int, kernel: str, tensors: int) -> Work:
    """Count a kernel whose programs hold tokens and loop over heads."""
    programs = size.tokens / launch_configs.tiles(kernel, size.head_dim, size.dtype)["BT"]
    return Work(
        kernel,
        tensors * size.rows("wide") + angles(size, heads),
        programs / heads,
        steps=(programs,),
        settings={"of": "heads", "head_dim": size.head_dim},
    )


def with_key_shift(size: Size) -> dict:
    return {"of": "heads", "head_dim": size.head_dim, "key_shift": True}


def shifted_norm_rotary_backward(size: Size, heads: int) -> Work:
    tiles = launch_configs.tiles("shifted_norm_rotary_backward", size.head_dim, size.dtype)
    return Work(
        "shifted_norm_rotary_backward",
        3 * size.rows("wide") + angles(size, heads),
        tiles["PROGRAMS"] / heads,
        steps=(size.tokens / tiles["BH"],),  # and one more of each program
        settings=with_key_shift(size),
    )


def angles(size: Size, heads: int) -> float:
    """Bytes of cos and sin, which heads share."""
    return size.tokens * size.head_dim * FP32_BYTES / heads


def sketch(size: Size, kernel: str, products: int) -> Work:
    s = size
    tiles = launch_configs.tiles(kernel + "_linear" * (products == 2), padded(s.head_dim), s.dtype)
    flops = steps(s.tokens, tiles["BT"]) * products * product(tiles["BT"], s.rank, s.dim)
    n_bytes = s.rows("wide", "features", *["wide"] * (products == 2))
    settings = {"of": "map", "head_dim": s.head_dim, "map": "affine", "size": s.features}
    return Work(kernel, n_bytes, s.tokens / (tiles["BT"] * tiles["STEPS"]), flops, (flops,), settings=settings)
