"""Settings that change when a run goes on: each is told and recorded, and a leap of the learning rate is refused."""

import json

import pytest

from lcpt.config import load_config, to_yaml
from lcpt.training import schedule as schedules
from lcpt.training.config import TrainingConfig
from lcpt.training.phases import Phase, divide
from lcpt.training.same_run import changed_settings, check_not_finished_otherwise, check_rate
from lcpt.training.schedule import Schedule, learning_rate

BAD_INPUT = 2
SETTINGS = ["training.micro_batch=4", "checkpoint.every_steps=2"]


def schedule(lr=3e-3, max_steps=8, warmup_steps=2, **settings):
    return TrainingConfig(lr=lr, max_steps=max_steps, warmup_steps=warmup_steps, **settings)


def check_no_jump(done, *trainings):
    whole = dict(number=0, first_step=1, tokens_before=0, config=None, has_schedule=False)
    old, new = (Schedule(each, [Phase(last_step=each.max_steps, **whole)]) for each in trainings)
    schedules.check_no_jump(done, old, new)


SMOOTH = {
    "nothing changed, in warm-up": (1, schedule(warmup_steps=4), schedule(warmup_steps=4)),
    "nothing changed, in decay": (5, schedule(), schedule()),
    "a little more": (5, schedule(), schedule(lr=4.2e-3)),
    "far less": (5, schedule(), schedule(lr=3e-5)),
    "at the last rate": (8, schedule(), schedule(max_steps=12, lr=1.1e-3)),
    "a warm-up from the last rate": (8, schedule(), schedule(max_steps=200, warmup_steps=90)),
    "constant, stopped early": (50, schedule(max_steps=100, schedule="wsd"), schedule(max_steps=900, schedule="wsd")),
    "one more step": (80, schedule(max_steps=80), schedule(max_steps=81)),
}
JUMPS = {
    "cosine 8 to 12": (8, schedule(), schedule(max_steps=12)),
    "wsd, decayed": (100, schedule(max_steps=100, schedule="wsd"), schedule(max_steps=900, schedule="wsd")),
    "wsd, in its decay": (95, schedule(max_steps=100, schedule="wsd"), schedule(max_steps=900, schedule="wsd")),
    "cosine, near its end": (90, schedule(max_steps=100), schedule(max_steps=200)),
    "twice the rate": (50, schedule(max_steps=100), schedule(max_steps=100, lr=6e-3)),
    "a shorter warm-up": (5, schedule(max_steps=200, warmup_steps=100), schedule(max_steps=200, warmup_steps=6)),
    "from zero": (8, schedule(final_lr_fraction=0.0), schedule(max_steps=12, final_lr_fraction=0.0)),
    "another schedule": (7, schedule(), schedule(schedule="wsd", max_steps=100)),
}


@pytest.mark.parametrize("done, old, new", SMOOTH.values(), ids=SMOOTH)
def test_a_rate_that_goes_on_is_accepted(done, old, new):
    check_no_jump(done, old, new)


@pytest.mark.parametrize("done, old, new", JUMPS.values(), ids=JUMPS)
def test_a_jump_is_refused_with_both_rates(done, old, new):
    with pytest.raises(ValueError, match="would jump") as caught:
        check_no_jump(done, old, new)
    line = str(caught.value)
    last, now = learning_rate(done - 1, old), learning_rate(done, new)
    assert f"from {last:.3g} at step {done} to {now:.3g} at step {done + 1}" in line
    assert "training.allow_lr_jump=true" in line and "training.init_from" in line
    if last:
        new.lr = float(line.split("training.lr=")[1].split()[0])  # the remedy that it names
        check_no_jump(done, old, new)


def test_a_cosine_that_is_extended():
    """Cosine of 8 steps, the first two of them warm-up; then 12."""
    with pytest.raises(ValueError, match="from 0.0003 at step 8 to 0.000856 at step 9"):
        check_no_jump(8, schedule(), schedule(max_steps=12))


def saved(folder, config, step):
    """What these checks read of a checkpoint."""
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "state.json").write_text(json.dumps({"step": step}))
    return folder


PHASES = "phases=[{until_step: 2}, {until_step: 5, training: {lr: 0.001, schedule: wsd, decay_fraction: 0}}, {}]"


def test_the_rate_of_a_phase_may_leap_where_it_begins_and_not_within(tiny_yaml, tmp_path):
    then, now = (load_config(tiny_yaml, ["run.dir=x", p]) for p in (PHASES, PHASES.replace("0.001", "0.1")))
    check_rate(saved(tmp_path / "2", then, 2), now, divide(now))
    inside = saved(tmp_path / "4", then, 4)
    check_rate(inside, then, divide(then))
    with pytest.raises(ValueError, match="phase 2, .* from 0.001 at step 4 to 0.1 at step 5: training.lr=0.001 goes"):
        check_rate(inside, now, divide(now))


def test_rates_that_count_tokens_are_compared_as_such(tiny_yaml, tmp_path):
    """The last of six steps has most of the tokens: the cosine is almost as high before it as after the warm-up."""
    grown = "phases=[{until_step: 5}, {training: {global_batch_tokens: 25600}}]"
    then, now = (
        load_config(tiny_yaml, ["run.dir=x", grown, "training.schedule_counts=tokens", lr])
        for lr in ("training.lr=0.003", "training.lr=0.006")
    )
    with pytest.raises(ValueError, match="from 0.003 at step 4 to 0.00599 at step 5"):
        check_rate(saved(tmp_path / "4", then, 4), now, divide(now))


def test_other_phases_of_a_finished_run_are_refused(tiny_yaml, tmp_path):
    then, *now = (
        load_config(tiny_yaml, ["run.dir=x", p])
        for p in (PHASES, PHASES.replace("{}", "{training: {lr: 0.01}}"), PHASES.replace("lr:", "micro_batch: 2, lr:"))
    )
    step = saved(tmp_path / "6", then, 6)
    other, divided = (changed_settings(step, config) for config in now)
    assert other == {"phases[2].training.lr": (None, 0.01)}
    with pytest.raises(ValueError, match="phases.2..training.lr None, this is 0.01"):
        check_not_finished_otherwise(step, other)
    assert divided == {"phases[1].training.micro_batch": (None, 2)}
    check_not_finished_otherwise(step, divided)


@pytest.fixture(scope="module")
def stopped(train_ranks):
    return train_ranks(1, *SETTINGS, "training.stop_after_steps=4").dir


@pytest.fixture
def copy(tmp_path):
    import shutil

    return lambda folder: shutil.copytree(folder, tmp_path / "run")


def test_changed_settings_are_told_and_recorded(start_job, stopped, copy):
    changes = {
        "training.lr": [0.003, 0.0035],
        "training.betas": [[0.9, 0.95], [0.9, 0.99]],
        "training.weight_decay": [0.1, 0.2],
        "training.precision": ["fp32", "bf16"],
        "training.schedule": ["cosine", "wsd"],
        "training.stop_after_steps": [4, None],
        "parallel.zero_stage": [1, 2],
    }
    now = [f"{name}={'null' if value is None else value}" for name, (_, value) in changes.items()]
    job = start_job(2, *SETTINGS, *now, "training.allow_lr_jump=true", dir=copy(stopped))
    assert job.wait() == [0, 0], job.text
    changes["training.allow_lr_jump"] = [False, True]
    told = [line for line in job.text.splitlines() if " -> " in line]
    assert set(told) == {
        "training.lr 0.003 -> 0.0035",
        "training.betas [0.9, 0.95] -> [0.9, 0.99]",
        "training.weight_decay 0.1 -> 0.2",
        "training.precision fp32 -> bf16",
        "training.schedule cosine -> wsd",
        "training.stop_after_steps 4 -> null",
        "parallel.zero_stage 1 -> 2",
        "training.allow_lr_jump false -> true",
    }
    assert len(told) == len(changes)  # one rank speaks
    first, second = json.loads((job.dir / "starts.json").read_text())
    assert first["changes"] == {} and second["changes"] == changes
    again = start_job(1, *SETTINGS, *now, "training.allow_lr_jump=true", dir=job.dir)  # complete now
    assert again.wait() == [0] and " -> " not in again.text, again.text


def test_extending_a_run_at_a_far_higher_rate_needs_a_word(start_job, train_ranks, tmp_path):
    run = train_ranks(1, *SETTINGS, dir=tmp_path / "run").dir
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    longer = [*SETTINGS, "training.max_steps=12"]
    refused = start_job(2, *longer, dir=run)
    assert refused.wait() == [BAD_INPUT, BAD_INPUT], refused.text
    [line] = [line for line in refused.text.splitlines() if line.startswith("error: ")]
    assert "from 0.0003 at step 6 to 0.00" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    job = start_job(2, *longer, "training.allow_lr_jump=true", dir=run)
    assert job.wait() == [0, 0] and len(job.rows) == 12, job.text


def test_settings_that_came_and_went_are_told(stopped, tiny_yaml, tmp_path):
    """A key that a checkpoint lacks meant its default; one that is gone had a value."""
    from lcpt.checkpoint import find_checkpoint
    from lcpt.config import load_config
    from lcpt.training.same_run import changed_settings

    text = (find_checkpoint(stopped) / "config.yaml").read_text()
    assert "  device: auto\n" in text and "  grad_clip: 1.0\n" in text
    text = text.replace("  device: auto\n", "").replace("  grad_clip: 1.0\n", "  of_old: 5\n")
    (tmp_path / "config.yaml").write_text(text)
    now = load_config(tiny_yaml, ["run.dir=moved", *SETTINGS, "training.stop_after_steps=4"])
    assert changed_settings(tmp_path, now) == {"training.of_old": (5, None)}
    now.training.device, now.training.grad_clip = "cpu", 2.0
    assert changed_settings(tmp_path, now) == {
        "training.of_old": (5, None),
        "training.device": ("auto", "cpu"),
        "training.grad_clip": (1.0, 2.0),
    }
