"""The counts against the kernels themselves, in Triton's interpreter, and against what polysketch states."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from lcpt.attention import AttentionConfig
from lcpt.benchmarking import head_work, interval_work, kernel_work
from lcpt.benchmarking.interval_work import IntervalSize, intervals_of, random_marks
from lcpt.benchmarking.kernel_work import FlurkaSize, Size, Work, block_causal_cost


def in_the_interpreter(*arguments) -> dict:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("count_products.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found: dict, forward: list[Work], backward: list[Work], bytes_of_all=True) -> None:
    """found: by mode, the FLOPs and the bytes of each kernel."""
    for mode, kernels in (("forward", forward), ("forward_backward", forward + backward)):
        flops, n_bytes = defaultdict(float), defaultdict(float)
        for work in kernels:
            name = work.kernel.split(",")[0]
            flops[name] += work.flops
            n_bytes[name] += work.bytes
        assert flops == found[mode][0]
        if not bytes_of_all:  # its launches are given tensors that they do not read
            for counted in (n_bytes, found[mode][1]):
                counted.pop("block_backward_dv", None)
        assert n_bytes == found[mode][1]


@pytest.mark.parametrize(
    "tokens, head_dim, sketch, block_size, local_blocks",
    [
        (83, 32, 24, 48, 1),  # every piece of the last block has a token: one without is left at once
        (40, 16, 8, 16, 2),
    ],
)
def test_products_and_bytes_of_squared_attention(tokens, head_dim, sketch, block_size, local_blocks):
    size = Size(
        tokens=tokens,
        head_dim=head_dim,
        features=sketch,
        block_size=block_size,
        local_blocks=local_blocks,
        dtype=torch.float32,
    )
    found = in_the_interpreter("squared", tokens, head_dim, sketch, block_size, local_blocks)
    check(found, kernel_work.forward(size), kernel_work.backward(size))


def test_products_and_bytes_of_flurka():
    size = FlurkaSize(tokens=83, head_dim=32, features=16, block_size=16, summaries=8, dtype=torch.float32)
    found = in_the_interpreter("flurka", 83, 32, 16, 16, 8)
    check(found, kernel_work.forward(size), kernel_work.backward(size), bytes_of_all=False)


@pytest.mark.parametrize("buckets", [3, 0])
def test_products_and_bytes_of_sparse_attention(buckets):
    marks = random_marks(83, buckets=buckets) if buckets else random_marks(83, kept=0.5)
    intervals = intervals_of(83, marks)
    size = IntervalSize(intervals=intervals, head_dim=16, dtype=torch.float32)
    found = in_the_interpreter("sparse", 83, 16, buckets)
    for counted in (x for mode in found.values() for x in mode):  # without the building of lists
        counted.pop("visible_keys")
        counted.pop("seeing_queries", None)
    check(found, interval_work.forward(size), interval_work.backward(size))


def test_products_and_bytes_of_norms_and_sketches():
    """The bias of the sketch and its gradient, one row each, are given too. The backward pass of a linear map needs no
    x W: the compiler leaves out that third product."""
    tokens, head_dim, sketch = 83, 16, 32
    size = Size(tokens=tokens, head_dim=head_dim, features=sketch, dtype=torch.float32)
    found = in_the_interpreter("heads", tokens, head_dim, sketch)
    for mode in found.values():
        for name in mode[1].keys() & {"feature_map_forward", "feature_map_backward"}:
            mode[1][name] -= 2 * 4 * sketch * (2 if "backward" in name else 1)
    found["forward_backward"][0]["feature_map_backward"] *= 2 / 3
    backward = [work for work in head_work.backward(size, 1) if work.programs]  # the others are PyTorch's
    check(found, head_work.forward(size, 1), backward)


def test_long_contexts_agree_with_what_polysketch_states():
    """The state's products are the same; local ones are whole blocks there, and tiles up to the diagonal here."""
    config = AttentionConfig("polysketch")
    attention = config.attention_of_layer(0)(128, 2, 2, config)
    context, c = 256 * 400, 256
    stated, _ = attention.attend_flops(context)
    state = 2 * 2 * attention.head_dim * attention.features()
    local = stated / 2 - 2 * attention.map_flops() - state
    kernels = {work.kernel: work.flops / context for work in kernel_work.forward(Size(tokens=context))}
    normaliser = 2 * attention.size**2
    sums = 2 * 16 * attention.features()  # for the denominator
    assert kernels["block_state"] == (state / 2 + sums) * 399 / 400  # all but the last block
    exact = kernels["block_forward"] - state / 2 - normaliser
    assert local == 2 * 2 * attention.head_dim * c
    assert exact == local * (c + 128) / 2 / c  # 128 rows a tile: a half of the block, and of a tile


def test_cost_is_linear():
    once, twice = (block_causal_cost(12, Size(tokens=n), "forward_backward") for n in (2**14, 2**15))
    assert twice == pytest.approx((2 * once[0], 2 * once[1]), rel=2e-3)  # the last block's keys reach no state
