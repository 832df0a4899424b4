"""A dry start says how a start would go on any number of ranks, and changes nothing. Faults: test_setup_errors."""

import fcntl
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from lcpt.checkpoint import find_checkpoint
from lcpt.config import load_config
from lcpt.data import Corpus
from lcpt.data.order import n_windows
from lcpt.parallel import groups
from lcpt.training.checks import micro_batches
from lcpt.training.dry_start import dry_start

CONFIGS = Path(__file__).parents[2] / "configs"
SETTINGS = ["training.max_steps=6", "training.micro_batch=1", "checkpoint.every_steps=2"]


@pytest.fixture(scope="module")
def stopped(train_ranks):
    return train_ranks(1, *SETTINGS, "training.stop_after_steps=4").dir


@pytest.fixture
def rehearse(tiny_yaml, stopped, tmp_path):
    """rehearse(*overrides, ranks=1) -> what dry_start says of a copy of the stopped run, which stays as it is."""
    run = shutil.copytree(stopped, tmp_path / "run")

    def rehearse(*overrides, ranks=1):
        before = snapshot(tmp_path)
        try:
            return dry_start(load_config(tiny_yaml, [f"run.dir={run}", *SETTINGS, *overrides]), ranks)
        finally:
            assert snapshot(tmp_path) == before

    return rehearse


def snapshot(folder):
    paths = sorted(folder.rglob("*"))
    return [(path, path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in paths]


def test_how_a_start_would_go(rehearse, tmp_path):
    assert rehearse(f"run.dir={tmp_path}/new", ranks=2).startswith("a start on 2 ranks would begin;")
    assert "would go on from step-00000004; micro-batches a rank and step: 1;" in rehearse(ranks=8)
    assert "complete at step 4" in rehearse("training.stop_after_steps=4")


def test_epochs_of_each_source_are_told(rehearse, train_folder, valid_folder, tmp_path):
    new = f"run.dir={tmp_path}/new"
    share = 6 * 8 / n_windows(Corpus(train_folder).tokens, 32)
    assert rehearse(new).endswith(f"; epochs in the whole run: {share:.3g} of {train_folder}")
    listed = f"data.sources=[{{path: {train_folder}, weight: 0.25}}, {{path: {valid_folder}, weight: 0.75}}]"
    others = 36 / n_windows(Corpus(valid_folder).tokens, 32)
    said = rehearse(new, "data.path=null", listed)
    assert said.endswith(f": {share / 4:.3g} of {train_folder}, {others:.3g} of {valid_folder}")
    assert "epochs" not in rehearse(new, "data.path=synthetic:mqar")


def test_changed_settings_are_told(rehearse, capfd):
    rehearse("training.weight_decay=0.2")
    assert "training.weight_decay 0.1 -> 0.2" in capfd.readouterr().err


def test_a_damaged_checkpoint_is_told_and_left(rehearse, tmp_path, capfd):
    (find_checkpoint(tmp_path / "run") / "state.json").unlink()
    assert "go on from step-00000002" in rehearse()
    assert "step-00000004/state.json is missing" in capfd.readouterr().err


def test_a_jump_of_the_rate_is_refused(rehearse):
    with pytest.raises(groups.SetupError, match="would jump"):
        rehearse("training.lr=0.1")
    assert "go on" in rehearse("training.lr=0.1", "training.allow_lr_jump=true")


def test_a_crash_loop_is_told(rehearse, tmp_path):
    """And not counted: the real start refuses it once."""
    crash = {"started": 1, "ended": 2, "from_step": 4, "world_size": 1, "end": "lightning"}
    (tmp_path / "run/starts.json").write_text(json.dumps([crash] * 3))
    for _ in range(2):
        assert "lightning" in rehearse()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_device_that_is_not_there_is_refused(rehearse, monkeypatch):
    with pytest.raises(groups.SetupError, match="training.device is cuda, but this machine has no working GPU"):
        rehearse("training.device=cuda")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(groups.SetupError, match="SLURM gave this job GPUs"):
        rehearse()


def test_a_folder_that_cannot_be_written_is_refused(rehearse, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(groups.SetupError, match="cannot be written to"):
        rehearse(f"run.dir={tmp_path}/new")


def test_another_job_is_seen_at_once(start_job, at_place, tiny_yaml):
    job = start_job(1, *SETTINGS, sabotage=at_place("the data of step 3", lambda: time.sleep(30)))
    job.wait_for(lambda: (job.dir / "metrics.jsonl").exists() and len(job.rows) == 2)
    began, config = time.monotonic(), load_config(tiny_yaml, [f"run.dir={job.dir}", *SETTINGS])
    with pytest.raises(groups.SetupError, match="another job trains in"):
        dry_start(config, 1)
    assert time.monotonic() - began < 10
    job.kill()
    assert "would" in dry_start(config, 1)
    folder = os.open(job.dir, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is left to the next job
    os.close(folder)


def test_the_main_config_names_the_ranks_that_work():
    """16 sequences of 32,768 tokens: four machines of eight GPUs are too many."""
    config = load_config(CONFIGS / "gpt2-small-32k.yaml")
    with pytest.raises(ValueError, match="among 32 ranks .* they do among 1, 2, 4 or 8 ranks$"):
        micro_batches(config.sequences, config.training.micro_batch, 32)
    with pytest.raises(ValueError, match="1, 2, 4 or 8 ranks, or with training.micro_batch=1$"):
        micro_batches(config.sequences, config.training.micro_batch, 16)
    assert micro_batches(config.sequences, 1, 16) == 1


@pytest.mark.parametrize("sequences, micro_batch, world", [(24, 5, 2), (7, 1, 5), (720720, 2, 17), (1, 1, 2)])
def test_the_ranks_that_are_named_work(sequences, micro_batch, world):
    with pytest.raises(ValueError, match="do not divide") as caught:
        micro_batches(sequences, micro_batch, world)
    numbers = str(caught.value).rpartition(";")[2].replace("or", ",").replace("ranks", "").split(",")
    named = [int(number.split()[-1]) for number in numbers]
    assert named == sorted(set(named)) and 1 <= len(named) <= 8
    for number in named:
        micro_batches(sequences, *((number, 1) if sequences % micro_batch else (micro_batch, number)))
