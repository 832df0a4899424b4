"""The kernels in Triton's interpreter. Whether Triton interprets is settled when a kernel is defined, so a process of
its own collects tests/kernels/triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # cores are shared


def test_kernels_in_the_interpreter():
    folder = Path(__file__).parent / "triton"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(folder)],
        cwd=folder.parents[2],
        env=os.environ | ONE_THREAD | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10_000:]
