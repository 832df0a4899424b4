"""Runs of the real loop on forked ranks."""

import importlib
import json
import os
from types import SimpleNamespace

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="session")
def train_ranks(run_ranks, tiny_yaml, tmp_path_factory):
    """train_ranks(world, *overrides, dir=None, code=0) -> what the run of `world` ranks, which must end with that exit
    code, left: config, dir, rows of metrics."""
    for module in ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.utils.tensorboard"):
        importlib.import_module(module)  # seconds each: once, before the forks

    from lcpt.config import load_config, to_yaml
    from lcpt.training import job

    def run(world, *overrides, dir=None, code=0, timeout=60):
        folder = dir or tmp_path_factory.mktemp("run") / "run"
        config = load_config(tiny_yaml, [f"run.dir={folder}", *overrides])
        codes = run_ranks(lambda: job.run(config, to_yaml(config)), world, timeout)
        assert codes == [code] * world
        metrics = folder / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        return SimpleNamespace(config=config, dir=folder, rows=rows)

    return run
