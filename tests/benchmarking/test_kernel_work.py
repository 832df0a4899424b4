"""The counts against the kernels themselves, in Triton's interpreter, and against what polysketch states."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from lcpt.attention import AttentionConfig
from lcpt.benchmarking.roofline import Gpu, Size, Step, backward, forward, seconds, softmax_cost, squared_cost


def in_the_interpreter(*arguments) -> dict:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    program = Path(__file__).with_name("count_products.py")
    command = [sys.executable, program, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "tokens, head_dim, sketch, block_size, local_blocks",
    [
        (83, 32, 24, 48, 1),  # every piece of the last block has a token: one without is left at once
        (40, 16, 8, 16, 2),
    ],
)
def test_products_and_bytes_are_those_of_the_kernels(tokens, head_dim, sketch, block_size, local_blocks):
    pytest.importorskip("triton")
    size = Size(
        tokens=tokens,
        head_dim=head_dim,
        sketch=sketch,
        block_size=block_size,
        local_blocks=local_blocks,
        dtype=torch.float32,
    )
    found = in_the_interpreter(tokens, head_dim, sketch, block_size, local_blocks)
    for mode, kernels in (("forward", forward(size)), ("forward_backward", forward(size) + backward(size))):
        flops, n_bytes = defaultdict(float), defaultdict(float)
        for step in kernels:
            flops[step.kernel] += step.flops
            n_bytes[step.kernel] += step.bytes
        assert [flops, n_bytes] == found[mode]


def test_long_contexts_agree_with_what_polysketch_states():
    """The state's products are the same; local ones are whole blocks there, and tiles up to the diagonal here."""
    config = AttentionConfig("polysketch")
    attention = config.attention_of_layer(0)(128, 2, 2, config)
    context, c = 256 * 400, 256
    stated, _ = attention.attend_flops(context)
    state = 2 * 2 * attention.head_dim * attention.features()
    local = stated / 2 - 2 * attention.map_flops() - state
    kernels = {step.kernel: step.flops / context for step in forward(Size(tokens=context))}
    normaliser = 2 * attention.size**2
    sums = 2 * 16 * attention.features()  # for the denominator
    assert kernels["block_state"] == (state / 2 + sums) * 399 / 400  # all but the last block
    exact = kernels["block_forward"] - state / 2 - normaliser
    assert local == 2 * 2 * attention.head_dim * c
    assert exact == local * (c + 128) / 2 / c  # 128 rows a tile: a half of the block, and of a tile


def test_cost_is_linear_and_softmax_counted_as_usual():
    once, twice = (squared_cost(12, Size(tokens=n), "forward_backward") for n in (2**14, 2**15))
    assert twice == pytest.approx((2 * once[0], 2 * once[1]), rel=2e-3)  # the last block's keys reach no state
    assert softmax_cost(12, 64, 2**14, "forward")[0] == 12 * 4 * 64 * 2**28 / 2
    assert softmax_cost(12, 64, 2**14, "forward_backward")[0] == 3.5 * softmax_cost(12, 64, 2**14, "forward")[0]


def test_a_kernel_takes_the_longer_of_products_and_bytes():
    gpu = Gpu(flops=100.0, bytes=10.0, launch=1.0)
    assert seconds([Step("products", 50.0, 1.0), Step("bytes", 0.0, 30.0)], 2, gpu, 0.5) == 2 + 1 + 6 + 1
