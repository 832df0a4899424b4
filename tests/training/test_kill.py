"""Killed at any moment, by any signal, on any rank: the next start ends as an uninterrupted run does, bit by bit.

The whole matrix is slow (pytest -m "slow or not slow"); a part of it runs every time.
"""

import pytest

from lcpt.checkpoint import find_checkpoint, newest_checkpoint, read_manifest, read_tensors

STEPS = 7
MOMENTS = {
    "start": "set_up",
    "middle of a step": "micro-batch 2 of step 4",
    "before the update": "the update of step 5",
    "validation": "batch 0 of validation",
    "while a checkpoint is written": "write_piece",
    "before it is sealed": "commit_checkpoint",
    "after it is sealed": "remove_old",
    "after the last step": "finish",
}
WHO = {"rank 0": [0], "rank 1": [1], "all": [0, 1]}
EVERY_TIME = {
    ("start", "all", "KILL"),
    ("middle of a step", "rank 0", "KILL"),
    ("middle of a step", "rank 1", "KILL"),
    ("before the update", "all", "KILL"),
    ("validation", "rank 1", "KILL"),
    ("while a checkpoint is written", "rank 0", "KILL"),
    ("while a checkpoint is written", "rank 1", "KILL"),
    ("before it is sealed", "rank 0", "KILL"),
    ("after it is sealed", "rank 0", "KILL"),
    ("after the last step", "all", "KILL"),
    ("while a checkpoint is written", "rank 1", "TERM"),
    ("after the last step", "all", "TERM"),
}
CASES = [
    pytest.param(
        moment,
        who,
        name,
        marks=() if (moment, who, name) in EVERY_TIME else pytest.mark.slow,
        id=f"{moment}, {who}, {name}",
    )
    for moment in MOMENTS
    for who in WHO
    for name in ("KILL", "TERM", "INT", "USR1")
    if not (moment.endswith("sealed") and who != "rank 0")  # only rank 0 seals
]


@pytest.fixture(scope="module")
def settings(valid_folder):
    return [
        f"training.max_steps={STEPS}",
        "training.micro_batch=2",
        "training.valid_every_steps=3",
        "checkpoint.every_steps=2",
        f"data.valid_path={valid_folder}",
    ]


@pytest.fixture(scope="module")
def whole(train_ranks, settings):
    return train_ranks(2, *settings)


def at(moment, ranks, action, at_place):
    """A sabotage: action() when one of the ranks comes to that moment for the first time."""
    place = MOMENTS[moment]
    modules = {
        "set_up": "loop",
        "finish": "loop",
        "write_piece": "saving",
        "commit_checkpoint": "saving",
        "remove_old": "saving",
    }

    def install(number):
        import importlib

        if number not in ranks:
            return
        if place not in modules:
            at_place(place, action)(number)
            return
        module, calls = importlib.import_module(f"lcpt.training.{modules[place]}"), []
        original = getattr(module, place)

        def hit(*arguments, **named):
            calls.append(1)
            if len(calls) == (2 if modules[place] == "saving" else 1):  # the save of step 4: step 2's is whole
                action()
            return original(*arguments, **named)

        setattr(module, place, hit)

    return install


@pytest.mark.parametrize("moment, who, signal_name", CASES)
def test_a_run_killed_at_any_moment_continues_bit_for_bit(
    start_job, at_place, send, numbers, settings, whole, record, moment, who, signal_name
):
    job = start_job(2, *settings, sabotage=at(moment, WHO[who], send(signal_name), at_place))
    codes = job.wait(60)
    if signal_name == "KILL":
        assert all(code == -9 for rank, code in enumerate(codes) if rank in WHO[who]) and 0 not in codes, job.text
    else:
        assert codes in ([75, 75], [0, 0]), job.text
    for step in (job.dir / "checkpoints").glob("step-*"):
        read_manifest(step)  # whatever carries a step's name is whole
    saved, complaints = newest_checkpoint(job.dir / "checkpoints")
    assert complaints == {}
    again = start_job(2, *settings)
    assert again.wait() == [0, 0], again.text
    equal = numbers(again.rows) == numbers(whole.rows) and same_tensors(job.dir, whole.dir)
    record(
        "kill-matrix",
        {
            "moment": moment,
            "who": who,
            "signal": signal_name,
            "exit_codes": codes,
            "seconds_to_end": job.seconds,
            "continued_from": saved.name if saved else None,
            "survived": True,
            "bit_equal": equal,
        },
    )
    assert equal
    events(job.dir)


def same_tensors(run, other):
    a, b = find_checkpoint(run), find_checkpoint(other)
    return all(
        tensor.equal(whole[name])
        for group in ("weights", "exp_avg", "exp_avg_sq")
        for whole in [read_tensors(b, read_manifest(b), group)]
        for name, tensor in read_tensors(a, read_manifest(a), group).items()
    )


def events(run):
    """TensorBoard has each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss/train")] == list(range(1, STEPS + 1))
