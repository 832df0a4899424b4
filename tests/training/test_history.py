"""Starts over a run's whole life: crash loops end, goodput is counted, two jobs keep apart."""

import json
import time

import pytest

GIVE_UP, BAD_INPUT = 3, 2
SETTINGS = ["training.max_steps=6", "training.micro_batch=8", "checkpoint.every_steps=2"]


@pytest.fixture
def crash(start_job, at_place):
    """crash(place) -> one more start of the same run, which raises there."""

    def crash(place):
        def broken():
            raise RuntimeError("out of memory")

        return start_job(1, *SETTINGS, sabotage=at_place(place, broken))

    return crash


def starts(job):
    return json.loads((job.dir / "starts.json").read_text())


def test_a_crash_loop_stops_and_says_why(start_job, crash):
    for _ in range(3):
        assert crash("the update of step 2").wait() == [1]
    refused = start_job(1, *SETTINGS)
    assert refused.wait() == [GIVE_UP], refused.text
    [line] = [line for line in refused.text.splitlines() if line.startswith("error: ")]
    assert all(part in line for part in ("3 times", "step 0", "out of memory", "start again"))
    assert [start["end"] == "refused" for start in starts(refused)] == [False, False, False, True]
    mended = start_job(1, *SETTINGS)  # by a person, who has read that line
    assert mended.wait() == [0], mended.text


def test_progress_ends_a_crash_loop(start_job, crash):
    """Crashes at 0, 0, then at 2, 2: no three from the same checkpoint."""
    for place in ("the update of step 2", "the update of step 2", "the update of step 4", "the update of step 4"):
        assert crash(place).wait() == [1]
    assert start_job(1, *SETTINGS).wait() == [0]


def test_an_orderly_end_is_no_crash(start_job, at_place, send, valid_folder):
    """Asked to leave in one and the same validation again and again: that is nobody's fault."""
    settings = [*SETTINGS, f"data.valid_path={valid_folder}", "training.valid_every_steps=3"]
    for _ in range(5):
        job = start_job(1, *settings, sabotage=at_place("batch 0 of validation", send("TERM")))
        assert job.wait() == [75], job.text
    assert [(start["from_step"], start["end"]) for start in starts(job)] == [(0, "preempted")] + [(3, "preempted")] * 4
    assert start_job(1, *settings).wait() == [0]


def test_a_killed_start_counts_as_a_crash(start_job, at_place, send):
    for _ in range(3):
        assert start_job(1, *SETTINGS, sabotage=at_place("the data of step 1", send("KILL"))).wait() == [-9]
    refused = start_job(1, *SETTINGS)
    assert refused.wait() == [GIVE_UP] and "died without a word" in refused.text


def test_goodput_over_restarts(start_job, at_place, send):
    """Steps that were lost with a kill count as held time only; the time between two starts is not held."""
    slow = at_place("the update of", lambda: time.sleep(0.2))

    def sabotage(number):
        slow(number)
        at_place("the data of step 4", send("KILL"))(number)

    first = start_job(1, *SETTINGS, sabotage=sabotage)
    assert first.wait() == [-9]
    time.sleep(2)
    job = start_job(1, *SETTINGS, sabotage=slow)
    assert job.wait() == [0], job.text
    summary, [lost, last] = json.loads((job.dir / "summary.json").read_text()), starts(job)
    assert (lost["from_step"], last["from_step"]) == (0, 2)
    assert summary["starts"] == 2 and summary["wall_seconds"] > summary["held_seconds"] + 1.5
    useful = sum(row["step_seconds"] for row in job.rows)
    held = sum(start["ended"] - start["started"] for start in (lost, last))
    assert summary["goodput"] == pytest.approx(useful / held, rel=0.05) and 0.2 < summary["goodput"] < 1
    assert lost["ended"] - lost["started"] >= 0.6  # three steps, the last one lost


def impatient(number):
    import lcpt.training.run_folder as module

    module.LOCK_SECONDS = 1.0


def test_a_job_waits_for_the_end_of_the_last_one(start_job, at_place):
    first = start_job(1, *SETTINGS, sabotage=at_place("the data of step 3", lambda: time.sleep(3)))
    first.wait_for(lambda: (first.dir / "metrics.jsonl").exists() and len(first.rows) == 2)
    second = start_job(1, "training.max_steps=9", "training.allow_lr_jump=true", *SETTINGS[1:])
    assert first.wait() == [0] and second.wait() == [0], second.text
    assert [row["step"] for row in second.rows] == list(range(1, 10))


def test_a_second_job_in_a_run_folder_is_refused(start_job, at_place):
    first = start_job(1, *SETTINGS, sabotage=at_place("the data of step 3", lambda: time.sleep(8)))
    first.wait_for(lambda: (first.dir / "metrics.jsonl").exists() and len(first.rows) == 2)
    second = start_job(2, "training.max_steps=6", "training.micro_batch=2", sabotage=impatient)
    assert second.wait() == [BAD_INPUT, BAD_INPUT]
    [line] = [line for line in second.text.splitlines() if line.startswith("error: ")]
    assert "another job trains in" in line and str(first.dir) in line
    assert first.wait() == [0], first.text
    assert [row["step"] for row in first.rows] == [1, 2, 3, 4, 5, 6]


def test_a_killed_job_frees_its_folder(start_job, at_place, send):
    assert start_job(
        2, *SETTINGS, "training.micro_batch=4", sabotage=at_place("the data of step 3", send("KILL"))
    ).wait() == [-9, -9]
    assert start_job(1, *SETTINGS).wait() == [0]


def test_a_damaged_history_is_told_and_begun_anew(start_job):
    assert start_job(1, *SETTINGS, "training.stop_after_steps=2").wait() == [0]
    job = start_job(1, *SETTINGS)
    assert job.wait() == [0]
    (job.dir / "starts.json").write_text('[{"star')
    (job.dir / "summary.json").unlink()
    again = start_job(1, "training.max_steps=8", "training.allow_lr_jump=true", *SETTINGS[1:])
    assert again.wait() == [0], again.text
    assert "starts.json is damaged" in again.text and len(starts(again)) == 1


def test_a_history_of_an_earlier_version_is_kept(tmp_path):
    from lcpt.training.history import History

    (tmp_path / "starts.json").write_text(
        '[{"started": 1, "ended": 2, "from_step": 0, "world_size": 1, "end": "finished"}]'
    )
    history = History(tmp_path)
    history.read()
    history.begin(4, None, {"training.lr": (1.0, 2.0)})
    entries = json.loads((tmp_path / "starts.json").read_text())
    assert [entry["changes"] for entry in entries] == [{}, {"training.lr": [1.0, 2.0]}]
