"""Asked to leave, all ranks save after the same step and go; the same command continues as if nothing had been."""

import json
import signal

import pytest

from lcpt.checkpoint import read_state

STEPS = 6
PREEMPTED = 75


@pytest.fixture(scope="module")
def settings(valid_folder):
    return [
        f"training.max_steps={STEPS}",
        "training.valid_every_steps=3",
        f"data.valid_path={valid_folder}",
        "training.micro_batch=2",
    ]


@pytest.fixture(scope="module")
def whole(train_ranks, settings):
    return train_ranks(2, *settings)


def continues(start_job, settings, whole, numbers):
    job = start_job(2, *settings)
    assert job.wait() == [0, 0], job.text
    assert numbers(job.rows) == numbers(whole.rows)
    assert not (job.dir / "preempted.json").exists()


@pytest.mark.parametrize("signal_name", ["TERM", "USR1", "INT", "HUP"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_in_a_step_saves_after_it(start_job, at_place, send, settings, whole, numbers, signal_name, rank):
    job = start_job(2, *settings, sabotage=at_place("micro-batch 1 of step 2", send(signal_name), rank))
    assert job.wait() == [PREEMPTED, PREEMPTED], job.text
    assert [path.name for path in (job.dir / "checkpoints").glob("step-*")] == ["step-00000002"]
    marker = json.loads((job.dir / "preempted.json").read_text())
    assert marker["step"] == 2 and marker["asked_by"] == (f"SIG{signal_name}" if rank == 0 else "another rank's signal")
    assert "the same command continues it" in job.text and "Traceback" not in job.text
    assert not (job.dir / "summary.json").exists()
    continues(start_job, settings, whole, numbers)


def test_a_signal_in_validation_repeats_it_at_the_next_start(start_job, at_place, send, settings, whole, numbers):
    """It is broken off; the next start makes it anew before it goes on."""
    job = start_job(2, *settings, sabotage=at_place("batch 0 of validation", send("TERM"), 1))
    assert job.wait() == [PREEMPTED, PREEMPTED], job.text
    assert [row["step"] for row in job.rows] == [1, 2]
    assert read_state(job.dir / "checkpoints/step-00000003")["unvalidated"]["step"] == 3
    continues(start_job, settings, whole, numbers)
    assert "unvalidated" not in read_state(job.dir / "checkpoints/step-00000006")


def test_a_repeated_validation_has_one_row_even_if_killed_after_it(start_job, at_place, send, settings, whole, numbers):
    """Its row is there by then, and the checkpoint still wants it: it comes to stand there once."""
    job = start_job(2, *settings, sabotage=at_place("batch 0 of validation", send("TERM"), 1))
    assert job.wait() == [PREEMPTED, PREEMPTED], job.text

    def die_while_saving(number):
        import lcpt.training.saving as module

        module.commit_checkpoint = lambda *arguments: send("KILL")()

    killed = start_job(2, *settings, sabotage=die_while_saving)
    assert killed.wait()[0] == -9 and [row["step"] for row in killed.rows][:3] == [1, 2, 3], killed.text
    continues(start_job, settings, whole, numbers)


def test_a_signal_in_the_last_validation_leaves_the_run_to_complete(
    start_job, at_place, send, settings, whole, numbers
):
    def sabotage(number):
        at_place("the update of step 6", lambda: at_place("batch 0", send("USR1"))(number))(number)

    job = start_job(2, *settings, sabotage=sabotage)
    assert job.wait() == [PREEMPTED, PREEMPTED], job.text
    assert len(job.rows) == STEPS - 1
    continues(start_job, settings, whole, numbers)
    again = start_job(2, *settings)
    assert again.wait() == [0, 0] and "complete at step 6" in again.text


def test_a_signal_in_the_last_step_changes_nothing(start_job, at_place, send, settings, whole):
    """Where no validation is left to break off, the run is finished anyway."""
    job = start_job(2, *settings, "data.valid_path=null", sabotage=at_place("the data of step 6", send("TERM")))
    assert job.wait() == [0, 0], job.text
    assert [row["loss"] for row in job.rows] == [row["loss"] for row in whole.rows]
    assert (job.dir / "summary.json").exists() and not (job.dir / "preempted.json").exists()


def test_a_signal_before_the_first_step_waits_for_its_end(start_job, settings, whole, numbers, send):
    """It is kept until the end of the first one."""

    def sabotage(number):
        import lcpt.training.loop as module

        set_up = module.set_up
        module.set_up = lambda *arguments: (number == 0 and send("TERM")(), set_up(*arguments))[1]

    job = start_job(2, *settings, sabotage=sabotage)
    assert job.wait() == [PREEMPTED, PREEMPTED], job.text
    continues(start_job, settings, whole, numbers)


def test_under_nohup_a_hangup_is_ignored(start_job, at_place, send, settings):
    def sabotage(number):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        at_place("the data of step 2", send("HUP"))(number)

    job = start_job(1, *settings, sabotage=sabotage)
    assert job.wait() == [0], job.text


def test_a_second_ctrl_c_ends_at_once(start_job, at_place, send, settings):
    def twice():
        send("INT")()
        send("INT")()

    job = start_job(1, *settings, sabotage=at_place("the data of step 2", twice))
    assert job.wait() == [130] and not (job.dir / "preempted.json").exists()
