"""The kernels in Triton's interpreter. Whether Triton interprets is settled when a kernel is defined, so a process of
its own collects tests/kernels/triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "triton"


def test_kernels_in_the_interpreter():
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # cores are shared
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(FOLDER)],
        cwd=FOLDER.parents[2], env=os.environ | one_thread | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
