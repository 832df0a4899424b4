"""A run that stops and goes on: on the same ranks bit by bit, on others to rounding."""

import itertools
import json
import os
import shutil
import signal

import pytest

from lcpt.checkpoint import find_checkpoint, read_manifest, read_tensors
from lcpt.utils.hashing import self_sha256

STEPS, STOP = 7, 4
SETTINGS = [f"training.max_steps={STEPS}", "checkpoint.every_steps=2", "training.valid_every_steps=3"]


@pytest.fixture(scope="module")
def settings(valid_folder):
    return [*SETTINGS, f"data.valid_path={valid_folder}"]


@pytest.fixture(scope="module")
def whole(train_ranks, settings):
    """Run without interruption on 2 ranks."""
    return train_ranks(2, *settings)


@pytest.fixture(scope="module")
def stopped(train_ranks, settings):
    """stopped(world, stage) -> a run folder of so many ranks, at that ZeRO stage, that ended after step 4."""
    runs = {}

    def run(world, stage):
        if (world, stage) not in runs:
            stop = f"parallel.zero_stage={stage}", f"training.stop_after_steps={STOP}"
            runs[world, stage] = train_ranks(world, *settings, *stop)
        return runs[world, stage].dir

    return run


@pytest.fixture
def copy(tmp_path):
    return lambda folder: shutil.copytree(folder, tmp_path / "run")


def weights(folder):
    step = find_checkpoint(folder)
    return read_tensors(step, read_manifest(step))


def test_a_resumed_run_has_the_same_rows_and_weights_bit_for_bit(train_ranks, numbers, settings, whole, stopped, copy):
    folder = copy(stopped(2, 1))
    before = (folder / "metrics.jsonl").read_bytes()
    again = train_ranks(2, *settings, dir=folder)
    assert numbers(again.rows) == numbers(whole.rows)
    assert (folder / "metrics.jsonl").read_bytes().startswith(before)
    for name, tensor in weights(whole.dir).items():
        assert tensor.equal(weights(folder)[name]), name


EVERY_TIME = {
    (2, 1, 1, 1),
    (2, 1, 4, 2),
    (2, 2, 1, 3),
    (2, 3, 2, 1),
    (2, 3, 4, 3),
    (4, 3, 2, 0),
    (1, 0, 2, 3),
    (4, 0, 1, 2),
    (1, 2, 4, 1),
}
PAIRS = [
    pytest.param(*pair, marks=() if pair in EVERY_TIME else pytest.mark.slow)
    for pair in itertools.product((1, 2, 4), (0, 1, 2, 3), (1, 2, 4), (0, 1, 2, 3))
]


@pytest.mark.parametrize("world, stage, other_world, other_stage", PAIRS)
def test_other_ranks_and_stages_continue_to_rounding(
    train_ranks, settings, whole, stopped, copy, record, world, stage, other_world, other_stage
):
    source = stopped(world, stage)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    again = train_ranks(other_world, *settings, f"parallel.zero_stage={other_stage}", dir=copy(source))
    assert [row["step"] for row in again.rows] == list(range(1, STEPS + 1))
    differences = [
        abs(row[name] / expected[name] - 1)
        for row, expected in zip(again.rows, whole.rows, strict=True)
        for name in {"loss", "grad_norm", "valid_loss"} & expected.keys()
    ]
    record(
        "resume-matrix",
        {
            "world": world,
            "zero_stage": stage,
            "other_world": other_world,
            "other_zero_stage": other_stage,
            "largest_relative_difference": max(differences),
        },
    )
    assert max(differences) < 1e-5
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_same_ranks_bit_by_bit_at_every_stage(train_ranks, numbers, settings, stopped, copy, tmp_path, stage):
    stage_is = f"parallel.zero_stage={stage}"
    expected = train_ranks(2, *settings, stage_is, dir=tmp_path / "whole")
    again = train_ranks(2, *settings, stage_is, dir=copy(stopped(2, stage)))
    assert numbers(again.rows) == numbers(expected.rows)


@pytest.mark.parametrize("stage", [1, 3])
def test_an_offloaded_optimizer_resumes_bit_for_bit(train_ranks, numbers, settings, whole, tmp_path, stage):
    offload = [*settings, "parallel.offload_optimizer=true", f"parallel.zero_stage={stage}"]
    expected = train_ranks(2, *offload, dir=tmp_path / "whole")
    train_ranks(2, *offload, f"training.stop_after_steps={STOP}", dir=tmp_path / "run")
    assert numbers(train_ranks(2, *offload, dir=tmp_path / "run").rows) == numbers(expected.rows)


@pytest.mark.parametrize(
    "stage, offload, other_world, other_stage",
    [  # DeepSpeed has an optimizer for each
        (1, False, 1, 3),
        pytest.param(2, False, 4, 1, marks=pytest.mark.slow),
        (3, False, 1, 2),
        pytest.param(1, True, 4, 3, marks=pytest.mark.slow),
    ],
)
def test_bf16_goes_on_from_its_fp32_weights(
    train_ranks, numbers, settings, copy, tmp_path, stage, offload, other_world, other_stage
):
    """Bit by bit; on other ranks and at another stage to the rounding of other micro-batches."""
    anywhere = [*settings, "training.precision=bf16"]
    bf16 = [*anywhere, f"parallel.zero_stage={stage}", f"parallel.offload_optimizer={offload}"]
    whole = train_ranks(2, *bf16, dir=tmp_path / "whole")
    stopped = train_ranks(2, *bf16, f"training.stop_after_steps={STOP}", dir=tmp_path / "stopped").dir
    elsewhere = train_ranks(other_world, *anywhere, f"parallel.zero_stage={other_stage}", dir=copy(stopped))
    assert [row["loss"] for row in elsewhere.rows] == pytest.approx([row["loss"] for row in whole.rows], rel=2e-3)
    assert numbers(train_ranks(2, *bf16, dir=stopped).rows) == numbers(whole.rows)


def test_a_run_killed_between_checkpoints_continues_bit_for_bit(
    train_ranks, numbers, settings, whole, tmp_path, monkeypatch
):
    from lcpt.training.telemetry import Telemetry

    step = Telemetry.step

    def die(self, row):
        if row["step"] == 6:  # behind the checkpoint of step 4, with a row half written
            if self.is_main:
                self._metrics.write(json.dumps(row)[:20])
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, row)

    monkeypatch.setattr(Telemetry, "step", die)
    with pytest.raises(RuntimeError):
        train_ranks(2, *settings, dir=tmp_path / "run")
    monkeypatch.undo()
    again = train_ranks(2, *settings, dir=tmp_path / "run")
    assert numbers(again.rows) == numbers(whole.rows)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/train")] == list(range(1, STEPS + 1))


def test_goes_back_past_a_damaged_checkpoint(train_ranks, numbers, settings, whole, stopped, copy, capfd):
    folder = copy(stopped(2, 1))
    damaged = folder / "checkpoints/step-00000004/exp_avg-00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    again = train_ranks(2, *settings, dir=folder)
    assert numbers(again.rows) == numbers(whole.rows)
    said = capfd.readouterr().err
    assert said.count("warning: ") == 1 and damaged.name in said and "going back to step-00000002" in said


def test_a_checkpoint_that_was_passed_over_does_not_count_again(train_ranks, numbers, settings, whole, stopped, copy):
    """Even if it turns out whole: the rows behind the older one are gone."""
    folder = copy(stopped(2, 1))
    file = folder / "checkpoints/step-00000004/weights-00000.safetensors"
    file.rename(folder / "hidden")
    train_ranks(2, *settings, "training.stop_after_steps=3", dir=folder)
    (folder / "hidden").rename(folder / "checkpoints/step-00000004.damaged" / file.name)
    assert numbers(train_ranks(2, *settings, dir=folder).rows) == numbers(whole.rows)


@pytest.mark.parametrize("damage", ["all", "schema"])
def test_without_a_usable_checkpoint_nothing_is_touched(start_job, settings, stopped, copy, damage):
    """Neither begun again, nor cut: a person may still have the file, or the lcpt that wrote it."""
    folder = copy(stopped(2, 1))
    for step in (folder / "checkpoints").glob("step-*"):
        if damage == "all":
            os.truncate(step / "weights-00000.safetensors", 100)
        else:
            manifest = json.loads((step / "manifest.json").read_text()) | {"schema_version": 2}
            (step / "manifest.json").write_text(json.dumps(manifest | {"sha256": self_sha256(manifest)}))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    job = start_job(2, *settings, dir=folder)
    assert job.wait() == [2, 2], job.text
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert ("move" in line and "step-00000002" in line) if damage == "all" else "take the lcpt that wrote it" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_damaged_rows_are_dropped_and_told(train_ranks, numbers, settings, whole, stopped, copy, capfd):
    folder = copy(stopped(2, 1))
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join([*lines[:2], b"\x00\xff\n", b"[1]\n", *lines[2:], b'{"step": 5']))
    assert numbers(train_ranks(2, *settings, dir=folder).rows) == numbers(whole.rows)
    assert "2 lines of" in capfd.readouterr().err


@pytest.mark.parametrize("content", ["{}", "null", "[{}]", "[3]", ""])
def test_a_damaged_history_does_not_keep_a_run_from_going_on(start_job, settings, stopped, copy, content):
    folder = copy(stopped(2, 1))
    (folder / "starts.json").write_text(content)
    job = start_job(2, *settings, dir=folder)
    assert job.wait() == [0, 0] and "Traceback" not in job.text, job.text


@pytest.mark.parametrize("gone", [["summary.json"], ["summary.json", "starts.json"], ["summary.json", "metrics.jsonl"]])
def test_a_complete_run_gets_its_summary_back(start_job, settings, whole, copy, gone):
    folder = copy(whole.dir)
    for name in gone:
        (folder / name).unlink()
    job = start_job(2, *settings, dir=folder)
    assert job.wait() == [0, 0] and (folder / "summary.json").exists(), job.text


def test_before_the_first_checkpoint_it_begins_anew(train_ranks, numbers, settings, whole, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps(whole.rows[0]) + "\n" + '{"step": 2, "lo')
    assert numbers(train_ranks(2, *settings, dir=tmp_path / "run").rows) == numbers(whole.rows)


def test_a_complete_run_stays_as_it_is(train_ranks, settings, whole, copy, capfd):
    folder = copy(whole.dir)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    train_ranks(1, *settings, dir=folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert f"complete at step {STEPS}" in capfd.readouterr().err
