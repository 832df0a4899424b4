"""Several validation sets in one run, and the validation before its first step."""

from types import SimpleNamespace

import pytest
import torch

from lcpt.data import Corpus
from lcpt.training.validation import Validation, validate
from lcpt.training.watchdog import STARTUP_TIMEOUT_S

MEASURES = ("valid_loss", "valid_bits_per_byte", "valid_tokens_scored", "valid_bytes_scored")
PREEMPTED = 75
SETTINGS = ["training.max_steps=4", "training.micro_batch=2", "training.valid_every_steps=3"]


@pytest.fixture(scope="module")
def code_folder(make_corpus, train_folder):
    return make_corpus(seed=7, tokenizer=train_folder / "tokenizer.model", sentences=20)


@pytest.fixture(scope="module")
def settings(valid_folder, code_folder):
    return [*SETTINGS, f"data.valid={{books: {valid_folder}, code: {code_folder}}}"]


@pytest.fixture(scope="module")
def whole(train_ranks, settings):
    return train_ranks(2, *settings)


@pytest.fixture(scope="module")
def events():
    """events(run) -> tag -> [(step, value)] of its TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(run):
        events = EventAccumulator(str(run.dir / "tensorboard"))
        events.Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    return read


def test_each_set_has_its_curve_and_the_plain_one_is_the_first(whole, train_ranks, valid_folder, code_folder, events):
    alone = {
        name: train_ranks(1, *SETTINGS, f"data.valid_path={folder}")
        for name, folder in (("books", valid_folder), ("code", code_folder))
    }
    named = {f"{key}/{name}" for key in MEASURES for name in alone}
    validated = [whole.before, *(row for row in whole.rows if "valid_loss" in row)]
    assert [row["step"] for row in validated] == [0, 3, 4]
    assert whole.before.keys() == {"step", "tokens", *MEASURES, *named}
    for row in validated:
        for key in MEASURES:
            assert row[key] == row[f"{key}/books"]
            for name, run in alone.items():
                other = next(r for r in [run.before, *run.rows] if r["step"] == row["step"])
                assert row[f"{key}/{name}"] == pytest.approx(other[key], rel=1e-5)
                assert not [key for key in other if "/" in key]
        assert row["valid_loss/code"] != row["valid_loss/books"]
    drawn = events(whole)
    assert [value for _, value in drawn["loss/valid/code"]] == pytest.approx([r["valid_loss/code"] for r in validated])
    assert [step for step, _ in drawn["loss/valid"]] == [0, 3, 4]
    assert not [tag for tag in drawn if tag.startswith("other/")]


@pytest.mark.parametrize("world, stage", [(2, 1), (2, 2), (2, 3), (1, 0)])
def test_validation_leaves_training_as_it_is(train_ranks, numbers, settings, world, stage):
    """Bit by bit, though a forward pass comes before the first step."""
    run, plain = (train_ranks(world, *s, f"parallel.zero_stage={stage}") for s in (settings, SETTINGS))
    assert run.before["valid_loss/code"] > 0 and not plain.before
    trained = [{key: value for key, value in row.items() if not key.startswith("valid")} for row in numbers(run.rows)]
    assert trained == numbers(plain.rows)


@pytest.mark.parametrize("place", ["batch 0 of the first validation on code", "batch 0 of validation on code"])
def test_asked_to_leave_in_the_second_set(start_job, at_place, send, settings, whole, numbers, place):
    """The next start makes all of that validation anew; before the first step nothing is saved."""
    job = start_job(2, *settings, sabotage=at_place(place, send("TERM"), 1))
    assert job.wait() == [PREEMPTED, PREEMPTED], job.text
    saved = [path.name for path in (job.dir / "checkpoints").glob("step-*")]
    first = "first" in place
    assert saved == ([] if first else ["step-00000003"]) and len(job.rows) == (0 if first else 2)
    assert "ended the run after step 0;" in job.text if first else job.before == whole.before
    again = start_job(2, *settings)
    assert again.wait() == [0, 0], again.text
    assert numbers(again.rows) == numbers(whole.rows) and again.before == whole.before


def test_a_run_that_begins_again_has_one_step_0(start_job, at_place, send, settings, whole, numbers, events):
    """Killed before its first checkpoint."""
    job = start_job(2, *settings, sabotage=at_place("the update of step 2", send("KILL")))
    assert job.wait() == [-9, -9] and job.before == whole.before and len(job.rows) == 1
    again = start_job(2, *settings)
    assert again.wait() == [0, 0], again.text
    assert numbers(again.rows) == numbers(whole.rows) and again.before == whole.before  # which asserts that it is one
    assert [step for step, _ in events(again)["loss/valid"]] == [0, 3, 4]


def test_a_continued_run_validates_no_start(train_ranks, numbers, settings, whole, tmp_path):
    stopped = train_ranks(2, *settings, "training.stop_after_steps=2", dir=tmp_path / "run")
    text = (stopped.dir / "metrics.jsonl").read_bytes()
    run = train_ranks(2, *settings, dir=stopped.dir)
    assert (run.dir / "metrics.jsonl").read_bytes().startswith(text)
    assert numbers(run.rows) == numbers(whole.rows) and run.before == whole.before


@pytest.mark.parametrize("is_starting, known", [(True, STARTUP_TIMEOUT_S), (False, None)])
def test_the_start_is_not_over_before_the_first_step(valid_folder, code_folder, is_starting, known):
    """Every pass may take as long as the start; later only one of a shape that is new."""
    beats = []
    watch = SimpleNamespace(heartbeat=lambda *beat: beats.append(beat), is_starting=is_starting)
    sets = {name: Validation(Corpus(path), 256, 32, 2) for name, path in (("a", valid_folder), ("b", code_folder))}

    def model(inputs, labels, part):
        return torch.tensor(1.0, dtype=torch.float64), (labels >= 0).sum()

    device, preemption = torch.device("cpu"), SimpleNamespace(requested_by=None)
    row = validate(sets, model, device, watch, preemption, "the first validation")
    assert row["valid_loss/b"] > 0 and beats[0][0] == "batch 0 of the first validation on a"
    shapes = [inputs.shape for each in sets.values() for inputs, _, _ in each.batches]
    assert {limit for (_, limit), shape in zip(beats, shapes, strict=True) if shape in shapes[:1]} == {
        STARTUP_TIMEOUT_S,
        known,
    }
