"""The kernels in Triton's interpreter. Whether Triton interprets is settled when a kernel is defined, so a process of
its own collects tests/kernels/triton: it runs beside all other tests (conftest.py), and here it is waited for."""

import pytest

pytest.importorskip("triton")


def test_kernels_in_the_interpreter(interpreter):
    code, output = interpreter
    assert code == 0, output[-10_000:]
