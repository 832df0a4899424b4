"""The command line as users have it."""

import os
import socket
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def environment():
    """This process's, without what a launcher sets, and with the programs of this Python first on PATH."""
    without = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "DS_ACCELERATOR")
    found = {name: value for name, value in os.environ.items() if name not in without}
    found.setdefault("PYTHONPATH", f"{ROOT}:{ROOT}/kernels")
    return found | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{found['PATH']}"}


@pytest.fixture
def launcher():
    """deepspeed on 2 ranks, at a port that no other job has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return "deepspeed", "--num_accelerators", 2, "--master_port", probe.getsockname()[1]


@pytest.fixture(scope="session")
def script():
    return str(ROOT / "launch/pretrain.py")
