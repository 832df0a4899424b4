"""These tests start Triton kernels: on a GPU, or in Triton's interpreter in a process with TRITON_INTERPRET=1, which
tests/kernels/test_triton.py begins. In any other process they are not collected."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
KERNELS = {
    "block_state_kernel",
    "block_forward_kernel",
    "backward_delta_kernel",
    "block_backward_dq_kernel",
    "block_backward_dv_kernel",
    "block_backward_dk_kernel",
}
INTERVAL_KERNELS = {
    "interval_forward_kernel",
    "query_statistics_kernel",
    "interval_backward_dq_kernel",
    "interval_backward_dkv_kernel",
}

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=INTERPRETED)
def numbers(monkeypatch):
    from tests.kernels.triton.interpreter import hasten, mend_bfloat16

    mend_bfloat16(monkeypatch)
    hasten(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance(poisoned):
    """Memory that nobody wrote holds NaN."""


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles a block, and steps a tile, in sequences that an interpreter gets through."""
    from lcpt_kernels.triton.common import launch_configs

    for others in ("DIFFERENT", "FP32"):
        monkeypatch.setattr(launch_configs, others, {})
    for kernel in (
        "block_forward",
        "block_forward_gated",
        "block_backward_dq",
        "block_backward_dq_gated",
        "block_backward_dv",
        "block_backward_dv_gated",
        "block_backward_dv_summaries",
        "block_backward_dk",
        "block_backward_dk_gated",
        "interval_forward",
        "interval_backward_dq",
        "interval_backward_dkv",
    ):
        monkeypatch.setitem(launch_configs.TABLE, kernel, {64: (32, 16, 4, 1)})
    for kernel in ("block_state", "block_state_gated"):
        monkeypatch.setitem(launch_configs.TABLE, kernel, {64: (16, 4, 1)})


@pytest.fixture
def started(monkeypatch):
    """The names of the kernels that were started, in turn."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    names = []
    for kind in (InterpretedFunction, JITFunction):

        def run(self, *args, original=kind.run, **kwargs):
            names.append(self.fn.__name__)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "run", run)
    return names


@pytest.fixture
def agree(started):
    """agree(inputs, tolerance, attention=squared_attention, **options): backend "triton" against the float64
    definition, for float64 inputs rounded to `dtype`; and every kernel of forward and backward was started."""
    from lcpt_kernels import lowrank_attention, sparse_attention, squared_attention

    from tests.kernels.conftest import relative_error, results

    def check(inputs, tolerance=1e-5, attention=squared_attention, do=None, dtype=torch.float32, **options):
        inputs = {name: x.to(DEVICE).to(dtype) for name, x in inputs.items()}
        if do is None:
            queries = next(inputs[name] for name in ("a", "phi_q", "q") if name in inputs)
            do = torch.randn(*queries.shape[:3], inputs["v"].shape[3], dtype=torch.float64)
        do = do.to(DEVICE).to(dtype)
        found = results(attention, inputs, do, options | {"backend": "triton"})
        exact = {name: x.double() for name, x in inputs.items()}
        expected = results(attention, exact, do.double(), options | {"backend": "reference"})
        for name, x in inputs.items():
            assert found[name].dtype == x.dtype and found[name].shape == x.shape, name
        assert found["o"].dtype == dtype
        errors = {name: relative_error(found[name], expected[name]) for name in expected}
        assert all(error < tolerance for error in errors.values()), errors  # also false for NaN
        kernels = INTERVAL_KERNELS if attention in (sparse_attention, lowrank_attention) else KERNELS
        assert kernels <= set(started), started

    return check
