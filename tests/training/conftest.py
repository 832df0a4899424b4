"""Runs of the real loop on forked ranks."""

import importlib
import json
import os
from types import SimpleNamespace

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="session")
def train_ranks(run_ranks, tiny_yaml, tmp_path_factory):
    """train_ranks(world, *overrides, dir=None) -> what the run of `world` ranks left: config, dir, rows of metrics."""
    for module in ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.utils.tensorboard"):
        importlib.import_module(module)  # seconds each: once, before the forks

    from lcpt.config import load_config, to_yaml
    from lcpt.parallel import groups
    from lcpt.training.loop import train

    def run(world, *overrides, dir=None):
        folder = dir or tmp_path_factory.mktemp("run") / "run"
        config = load_config(tiny_yaml, [f"run.dir={folder}", *overrides])

        def rank():
            groups.join()
            train(config, to_yaml(config))
            groups.leave()

        run_ranks(rank, world)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return SimpleNamespace(config=config, dir=folder, rows=rows)

    return run
