"""Tile sizes, warps, stages and register caps of every kernel, from a table: there is no search at run time.

Constants of the tiles:

    BM, BN      queries and keys of a program, or of a step of its loop
    BT          tokens
    BH          heads
    BR          summaries of a block
    BV          logits of a row
    BC          columns of a row
    DT          coordinates of x
    STEPS       steps of a program
    PROGRAMS    programs in all
    STATE_PARTS, LOCAL_PARTS    programs of a query of one token
    BF          rows of a state
    NETWORKS    networks of a sketch that a program holds

A column of TABLE is for tensors up to its width. FP32 has the entries for fp32, DIFFERENT those of targets other than
sm_90. Nothing depends on the number of tokens.

The sizes were chosen by compiling (`report/`), with Triton 3.6.0 (that of PyTorch 2.11) first, and 3.7.1: no spills, no
serialised wgmma, no hazards, two blocks per multiprocessor where they fit. They have not been timed on a GPU. A loop
that computes the left operand of a wgmma has one stage: in a pipelined loop, ptxas before 13.3 may overwrite that
operand too early (`report/sass.py`). That of block_state has more, since it waits for its products in each step. Two
blocks of 8 warps fit if each thread has at most 128 registers; 3.6.0 needs the cap.

On sm_100 nothing is pipelined. Triton 3.6.0 and 3.7.1 pipeline products wrongly there if two of them share an
accumulator (issue 10821; pooling, sketch and feature-map backward are similar), or if one reads an accumulator that is
scaled in each step (pull request 10993; block_state with a gate). Both need two stages or more.
"""

from __future__ import annotations

from functools import cache

import torch

from lcpt_kernels.log import log_once

NAMES = {
    "block_state": ("BT",),
    "block_state_pairs": ("BT",),
    "block_state_gated": ("BT",),
    "block_forward": ("BM", "BN"),
    "block_forward_gated": ("BM", "BN"),
    "block_backward_dq": ("BM", "BN"),
    "block_backward_dq_gated": ("BM", "BN"),
    "block_backward_dv": ("BM", "BN"),
    "block_backward_dv_gated": ("BM", "BN"),
    "block_backward_dv_summaries": ("BM", "BN"),
    "block_backward_dk": ("BM", "BN"),
    "block_backward_dk_gated": ("BM", "BN"),
    "decode_parts": ("STATE_PARTS", "LOCAL_PARTS", "BF", "BN"),
    "decode_output": (),
    "interval_forward": ("BM", "BN"),
    "interval_backward_dq": ("BM", "BN"),
    "interval_backward_dkv": ("BM", "BN"),
    "norm_rotary_forward": ("BT",),
    "norm_rotary_backward": ("BT",),
    "shifted_norm_rotary_backward": ("BH", "PROGRAMS"),
    "pooling_forward": ("BR", "BT"),
    "pooling_backward": ("BR", "BT"),
    "learned_sketch_forward": ("BT", "PROGRAMS"),
    "learned_sketch_backward": ("BT", "NETWORKS", "PROGRAMS"),
    "feature_map_forward": ("BT", "STEPS"),
    "feature_map_backward": ("BT", "STEPS", "DT"),
    "feature_map_backward_linear": ("BT", "STEPS", "DT"),
    "cross_entropy": ("BV",),
    "gated_activation_forward": ("BC",),
    "gated_activation_backward": ("BC",),
    "add_norm_forward": ("BT",),
    "add_norm_backward": ("BT", "PROGRAMS"),
}
Columns = dict[int, tuple[int, ...]]  # the width of tensors up to which an entry holds -> sizes, in the order of NAMES

TABLE: dict[str, Columns] = {  # tiles, then warps, stages and, where registers are capped on sm_90, maxnreg
    # A step's rows are loaded while the step before is computed: one long step ahead, or two short ones. A step of
    # pairs is a whole block, which takes a quarter fewer instructions than two halves.
    "block_state": {64: (128, 4, 3), 128: (64, 4, 2), 256: (32, 8, 3)},
    "block_state_pairs": {64: (256, 4, 2), 128: (64, 4, 3), 256: (32, 8, 3)},
    "block_state_gated": {64: (128, 4, 2), 128: (64, 8, 3), 256: (32, 8, 3)},
    "block_forward_gated": {64: (128, 32, 8, 2, 128), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    "block_forward": {64: (128, 64, 8, 2, 128), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    "block_backward_dq_gated": {64: (128, 32, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
    "block_backward_dq": {64: (128, 32, 8, 2, 128), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
    "block_backward_dv": {64: (64, 128, 8, 1, 128), 128: (32, 128, 8, 1), 256: (32, 64, 8, 1)},
    "block_backward_dv_gated": {64: (32, 128, 8, 1, 128), 128: (32, 128, 8, 1), 256: (32, 64, 8, 1)},
    "block_backward_dv_summaries": {64: (32, 64, 8, 1), 128: (32, 128, 8, 1), 256: (32, 64, 8, 1)},
    "block_backward_dk": {64: (32, 128, 8, 1, 128), 128: (32, 128, 8, 1), 256: (16, 128, 8, 1)},
    "block_backward_dk_gated": {64: (32, 128, 8, 1), 128: (32, 128, 8, 1), 256: (16, 128, 8, 1)},
    # Each program reads some 20 KB for the product kind, r = 32; with 12 heads they are a program a multiprocessor.
    "decode_parts": {64: (8, 4, 32, 64, 4, 1), 128: (8, 8, 32, 32, 4, 1), 256: (8, 8, 16, 16, 4, 1)},
    "decode_output": {2**62: (1, 1)},
    # One stage more, because the positions of rows are loaded before the rows. 128 queries read half as many bytes of
    # keys and values from L2 as 64 do.
    "interval_forward": {64: (128, 64, 8, 3, 128), 128: (64, 64, 4, 3), 256: (64, 32, 8, 3)},
    "interval_backward_dq": {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 8, 3)},
    "interval_backward_dkv": {64: (32, 64, 4, 3, 168), 128: (32, 64, 4, 3), 256: (32, 32, 8, 3)},
    "norm_rotary_forward": {64: (32, 4, 1), 128: (16, 4, 1)},
    "norm_rotary_backward": {64: (32, 4, 1), 128: (16, 4, 1)},
    # A program is one warp, and PROGRAMS are as many as an H200 runs at once.
    "shifted_norm_rotary_backward": {64: (4, 2112, 1, 1), 128: (2, 2112, 1, 1)},
    "pooling_forward": {64: (32, 32, 8, 2), 128: (32, 32, 8, 2)},
    "pooling_backward": {64: (32, 64, 4, 1), 128: (32, 32, 8, 2)},
    # By the elements of one network, padded. PROGRAMS are as many as an H200 runs at once.
    "learned_sketch_forward": {6144: (64, 660, 4, 2), 2**62: (128, 264, 8, 2)},
    "learned_sketch_backward": {6144: (64, 2, 264, 4, 1), 12288: (64, 1, 66, 8, 1), 2**62: (32, 1, 66, 8, 1)},
    # By x's columns or those of both matrices.
    "feature_map_forward": {128: (64, 8, 4, 2), 256: (64, 8, 8, 2)},
    "feature_map_backward": {128: (32, 32, 64, 4, 2), 256: (32, 32, 64, 8, 2)},
    # Of a linear map both operands of dW are as they were loaded; pipelined, ptxas would serialise wgmma (C7515).
    "feature_map_backward_linear": {128: (64, 16, 64, 4, 1)},
    # By the vocabulary. A thread loads 16 bytes at a time; at 32 warps a row's second reading comes from L1.
    "cross_entropy": {1024: (1024, 4, 1), 8192: (4096, 16, 1), 2**62: (8192, 32, 1)},
    "gated_activation_forward": {512: (512, 2, 1), 2**62: (1024, 4, 1)},
    "gated_activation_backward": {512: (512, 2, 1), 2**62: (1024, 4, 1)},
    # A thread holds 32 numbers of a tensor, in backward 16 of each of five. PROGRAMS are as many as an H200 runs.
    "add_norm_forward": {256: (16, 4, 1), 1024: (4, 4, 1), 2048: (2, 4, 1), 4096: (1, 4, 1), 8192: (1, 8, 1)},
    "add_norm_backward": {
        256: (8, 528, 4, 1),
        1024: (2, 528, 4, 1),
        2048: (1, 528, 4, 1),
        4096: (1, 264, 8, 1),
        8192: (1, 132, 16, 1),
    },
}
FP32: dict[str, Columns] = {
    "block_state": {256: (32, 8, 1)},
    "block_state_pairs": {256: (32, 8, 1)},
    "block_state_gated": {256: (32, 8, 1)},
    "block_forward": {256: (32, 32, 4, 1)},
    "block_forward_gated": {256: (32, 32, 4, 1)},
    "block_backward_dq": {256: (32, 32, 8, 1)},
    "block_backward_dq_gated": {256: (32, 32, 8, 1)},
    "block_backward_dv": {256: (32, 32, 8, 1)},
    "block_backward_dv_gated": {256: (32, 32, 8, 1)},
    "block_backward_dv_summaries": {256: (32, 32, 8, 1)},
    "block_backward_dk": {256: (32, 32, 4, 1)},
    "block_backward_dk_gated": {256: (32, 32, 4, 1)},
    "interval_forward": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1)},
    "interval_backward_dq": {64: (32, 16, 8, 1), 128: (16, 16, 8, 1)},
    "interval_backward_dkv": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1)},
    "pooling_forward": {128: (32, 32, 8, 1)},
    "pooling_backward": {128: (16, 16, 8, 1)},
    "learned_sketch_forward": {2**62: (16, 132, 8, 1)},
    "learned_sketch_backward": {2**62: (16, 1, 66, 8, 1)},
    "feature_map_forward": {128: (16, 32, 8, 1), 256: (16, 32, 16, 1)},
    "feature_map_backward": {128: (16, 64, 64, 8, 1), 256: (16, 64, 128, 16, 1)},
    "feature_map_backward_linear": {128: (16, 64, 64, 8, 1)},
    "cross_entropy": {1024: (512, 4, 1), 8192: (2048, 16, 1), 2**62: (4096, 32, 1)},
}
DIFFERENT: dict[str, dict[str, Columns]] = {
    "sm_80": {
        "block_state": {64: (64, 4, 3)},
        "block_state_pairs": {64: (64, 4, 3)},
        "block_state_gated": {64: (64, 4, 3)},
        "block_forward": {128: (64, 32, 8, 2)},
        "block_forward_gated": {128: (64, 32, 8, 2)},
        "block_backward_dq": {64: (64, 32, 4, 2), 128: (64, 32, 8, 1)},
        "block_backward_dv": {128: (32, 64, 8, 2)},
        "block_backward_dv_gated": {128: (32, 64, 8, 2)},
        "block_backward_dv_summaries": {128: (32, 64, 8, 2)},
        "block_backward_dk": {128: (32, 64, 8, 2)},
        "block_backward_dk_gated": {128: (32, 64, 8, 2)},
        "interval_forward": {64: (64, 64, 4, 3), 128: (64, 32, 4, 3)},
        "interval_backward_dq": {128: (64, 32, 4, 3)},
        "interval_backward_dkv": {128: (32, 64, 8, 3)},
        "pooling_backward": {64: (32, 32, 4, 2)},
        "learned_sketch_forward": {2**62: (32, 264, 4, 2)},
        "learned_sketch_backward": {6144: (32, 1, 132, 4, 2), 12288: (16, 1, 66, 8, 1)},
    },
    "sm_100": {
        "block_state_gated": {64: (64, 4, 3)},
        "block_backward_dq": {128: (64, 32, 8, 1)},
        "block_backward_dq_gated": {128: (64, 32, 8, 1)},
        "block_backward_dv": {64: (32, 64, 8, 1)},
        "interval_backward_dq": {128: (64, 32, 4, 3)},
        "learned_sketch_backward": {6144: (64, 2, 264, 4, 2)},
        "feature_map_backward": {64: (32, 32, 64, 4, 2), 128: (32, 32, 32, 8, 2)},
    },
    "gfx942": {
        "block_state": {64: (64, 4, 2)},
        "block_state_pairs": {64: (64, 4, 2)},
        "block_state_gated": {64: (64, 4, 3)},
        "block_forward": {128: (128, 32, 8, 2)},
        "block_forward_gated": {128: (128, 32, 8, 2)},
        "block_backward_dq": {64: (64, 32, 4, 1), 128: (64, 32, 4, 1)},
        "block_backward_dq_gated": {64: (64, 32, 4, 1), 128: (64, 32, 4, 1)},
        "block_backward_dv": {64: (32, 64, 4, 1), 128: (32, 64, 8, 1)},
        "block_backward_dv_gated": {64: (32, 64, 4, 1), 128: (32, 64, 8, 1)},
        "block_backward_dv_summaries": {64: (32, 64, 4, 1), 128: (32, 64, 8, 1)},
        "block_backward_dk": {64: (32, 64, 4, 1), 128: (32, 64, 8, 1)},
        "block_backward_dk_gated": {64: (32, 64, 4, 1), 128: (32, 64, 8, 1)},
        "interval_backward_dq": {128: (64, 32, 4, 3)},
        "interval_backward_dkv": {128: (32, 64, 4, 1)},
        "pooling_forward": {64: (32, 32, 4, 2), 128: (32, 32, 4, 2)},
        "pooling_backward": {128: (32, 32, 4, 1)},
        "learned_sketch_forward": {2**62: (64, 264, 4, 1)},
        "learned_sketch_backward": {12288: (32, 1, 132, 4, 1), 2**62: (16, 1, 132, 4, 1)},
        "feature_map_backward": {128: (16, 64, 64, 4, 1), 256: (16, 64, 32, 4, 1)},
        "cross_entropy": {2**62: (8192, 16, 1)},  # warps are of 64 threads
    },
}


def tiles(kernel: str, width: int = 0, type: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Return the constants and options of `kernel` for tensors up to `width` wide."""
    columns = TABLE[kernel] | DIFFERENT.get(target(), {}).get(kernel, {})
    if type == torch.float32:
        columns = FP32.get(kernel, columns)
    sizes = columns[min((column for column in columns if column >= width), default=max(columns))]
    found = dict(zip((*NAMES[kernel], "num_warps", "num_stages", "maxnreg"), sizes, strict=False))
    if target() != "sm_90":
        found.pop("maxnreg", None)
    if target() == "sm_100":
        found["num_stages"] = 1
    return found


@cache
def target() -> str:
    """Return the target of the current device; sm_90 without a GPU."""
    if not torch.cuda.is_available():
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability()
    if major > 9:
        log_once("Triton kernels run without software pipelining on Blackwell: no GPU has shown that it is right there")
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")
