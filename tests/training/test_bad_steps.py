"""NaN, Inf and leaping losses: skipped by all ranks alike, and too many of them end the run."""

import json
import math

import pytest
import torch

from lcpt.checkpoint import read_manifest, read_state, read_tensors
from lcpt.training.bad_steps import BadSteps, BadStepsConfig

GIVE_UP, PREEMPTED = 3, 75
SETTINGS = ["training.micro_batch=4", "checkpoint.every_steps=1", "checkpoint.keep_last=100"]


def steady(config=None, steps=64, state=None):
    """Losses of 3.9 and 4.1 in turn: mean 4, standard deviation 0.1."""
    judge = BadSteps(config or BadStepsConfig(), state)
    for step in range(steps):
        judge.record(3.9 + 0.2 * (step % 2), None)
    return judge


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_skipped(loss):
    assert str(loss) in BadSteps(BadStepsConfig()).skip_reason(loss, 1.0)
    assert str(loss) in BadSteps(BadStepsConfig(sigmas=0)).skip_reason(loss, 1.0)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_skipped(norm):
    assert f"norm is {norm}" in BadSteps(BadStepsConfig(sigmas=0)).skip_reason(4.0, norm)


def test_a_leap_is_measured_in_standard_deviations():
    judge = steady()  # 8 sigmas: 4.8
    assert judge.skip_reason(4.79, 1.0) is None and "mean of 4.000" in judge.skip_reason(4.81, 1.0)
    assert judge.skip_reason(0.0, 1.0) is None  # downwards is welcome
    assert steady(BadStepsConfig(sigmas=0)).skip_reason(1e9, 1.0) is None
    assert steady(steps=31).skip_reason(1e9, 1.0) is None and steady(steps=32).skip_reason(1e9, 1.0)


def test_a_small_leap_of_a_very_steady_loss_is_none():
    judge = BadSteps(BadStepsConfig())
    for _ in range(64):
        judge.record(4.0, None)
    assert judge.skip_reason(4.2, 1.0) is None and judge.skip_reason(4.3, 1.0)


def test_bad_losses_do_not_raise_the_mean():
    judge = steady()
    for _ in range(5):
        judge.record(1e6, "it leaps")
    assert judge.skip_reason(4.81, 1.0)


def test_only_recent_losses_count():
    judge = BadSteps(BadStepsConfig())
    for _ in range(128):
        judge.record(50.0, None)
    for _ in range(128):
        judge.record(4.0, None)
    assert judge.skip_reason(5.0, 1.0)


def test_bad_steps_are_counted_over_the_last_100():
    judge = BadSteps(BadStepsConfig(allowed=2))
    for _ in range(2):
        judge.record(math.nan, "nan")
    assert not judge.are_too_many
    for _ in range(98):
        judge.record(4.0, None)
    assert judge.count == 2
    judge.record(math.nan, "nan")  # the first of them is forgotten by now
    assert judge.count == 2 and not judge.are_too_many
    judge.record(math.nan, "nan")
    assert judge.count == 2 and not judge.are_too_many
    judge.record(math.nan, "nan")
    assert judge.count == 3 and judge.are_too_many


def test_steps_without_a_label_are_not_what_is_usual():
    """Their loss is 0: text after them would be a leap."""
    judge = BadSteps(BadStepsConfig())
    for _ in range(64):
        judge.record(None, None)
    assert judge.skip_reason(4.0, 1.0) is None and judge.state()["losses"] == [] and judge.count == 0


def test_the_state_is_everything():
    judge = steady()
    judge.record(math.nan, "nan")
    again = BadSteps(BadStepsConfig(), json.loads(json.dumps(judge.state())))
    assert (
        again.state() == judge.state()
        and again.count == 1
        and again.skip_reason(4.81, 1.0) == judge.skip_reason(4.81, 1.0)
    )


def spoil(factor, rank=None, steps=()):
    """A sabotage: in these steps (one micro-batch each), the loss of that rank or of all is multiplied."""

    def install(number):
        from lcpt.model import GPT

        forward, calls = GPT.forward, iter(range(1, 10**9))

        def spoiled(self, tokens, labels=None, cu_seqlens=None, part=None):
            nats, count = forward(self, tokens, labels, cu_seqlens, part)
            return nats * (factor if next(calls) in steps else 1.0), count

        if rank in (None, number):
            GPT.forward = spoiled

    return install


def spoil_gradient(factor, step):
    """A sabotage: the loss is as it should be, one parameter's gradient is not; on rank 1 alone."""

    def install(number):
        import lcpt.training.loop as module

        build = module.build_engine

        def built(model, *arguments):
            calls = iter(range(1, 10**9))
            model.norm.weight.register_hook(lambda g: g * (factor if next(calls) == step else 1.0))
            return build(model, *arguments)

        if number == 1:
            module.build_engine = built

    return install


def weights(run, step):
    folder = run / f"checkpoints/step-{step:08d}"
    return read_tensors(folder, read_manifest(folder))


NAN, INF = spoil(math.nan, 1, [3]), spoil(math.inf, 0, [3])
NAN_GRADIENT, INF_GRADIENT = spoil_gradient(math.nan, 3), spoil_gradient(math.inf, 3)


@pytest.mark.parametrize(
    "stage, precision, sabotage",
    [
        pytest.param(0, "fp32", NAN_GRADIENT, id="0 nan gradient"),
        pytest.param(1, "fp32", NAN, id="1 nan"),
        pytest.param(1, "fp32", INF_GRADIENT, id="1 inf gradient"),
        pytest.param(1, "bf16", INF, id="1 bf16 inf"),
        pytest.param(2, "bf16", INF_GRADIENT, id="2 bf16 inf gradient"),
        pytest.param(3, "bf16", NAN_GRADIENT, id="3 bf16 nan gradient"),
        pytest.param(3, "bf16", INF, id="3 bf16 inf"),
    ],
)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(start_job, at_place, send, stage, precision, sabotage):
    settings = [*SETTINGS, "training.max_steps=4", f"parallel.zero_stage={stage}", f"training.precision={precision}"]

    def spoil_and_leave(number):  # asked to leave, it also saves after a bad step
        sabotage(number)
        at_place("micro-batch 1 of step 3", send("TERM"))(number)

    job = start_job(2, *settings, sabotage=spoil_and_leave)
    assert job.wait() == [PREEMPTED, PREEMPTED], job.text
    assert start_job(2, *settings).wait() == [0, 0]
    before, after, end = (weights(job.dir, step) for step in (2, 3, 4))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(not torch.equal(end[name], tensor) for name, tensor in before.items())
    assert all(tensor.isfinite().all() for tensor in end.values())
    assert [read_state(job.dir / f"checkpoints/step-{s:08d}")["adam_step"] for s in (2, 3, 4)] == [2, 2, 3]
    row = json.loads((job.dir / "metrics.jsonl").read_text().splitlines()[2], parse_constant=pytest.fail)
    assert row["loss"] is None or row["grad_norm"] is None  # and no NaN, which is no JSON
    [note] = [json.loads(line) for line in (job.dir / "skipped.jsonl").read_text().splitlines()]
    assert note["step"] == 3 and note["documents"] and "step 3 is skipped" in job.text


def test_a_leap_is_skipped(start_job):
    settings = [
        "training.micro_batch=8",
        "training.max_steps=40",
        "training.warmup_steps=30",
        "training.lr=1e-4",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=100",
    ]
    job = start_job(1, *settings, "training.stop_after_steps=38", sabotage=spoil(10.0, 0, [38]))
    assert job.wait() == [0], job.text
    assert start_job(1, *settings).wait() == [0]
    assert [json.loads(line)["step"] for line in (job.dir / "skipped.jsonl").read_text().splitlines()] == [38]
    before, after, end = (weights(job.dir, step) for step in (37, 38, 39))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(not torch.equal(end[name], tensor) for name, tensor in before.items())


def test_too_many_end_the_run_with_the_documents(start_job, train_folder):
    from lcpt.data import Corpus

    job = start_job(
        2, *SETTINGS, "training.max_steps=50", "training.bad_steps.allowed=2", sabotage=spoil(math.nan, 1, [2, 4, 6])
    )
    assert job.wait() == [GIVE_UP, GIVE_UP], job.text
    assert [row["step"] for row in job.rows] == [1, 2, 3, 4, 5, 6]
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert "3 of the last 100 steps were bad, now step 6: its loss is nan" in line and "allowed" in line
    corpus = Corpus(train_folder)
    assert any(corpus.document(n)[0] in line for n in range(len(corpus)))
    assert "Traceback" not in job.text


def test_broken_weights_do_not_push_out_good_checkpoints(start_job):
    """An update that breaks the weights makes every later loss NaN: nothing of that is saved, and the line says so."""
    settings = ["training.micro_batch=8", "training.max_steps=60", "checkpoint.every_steps=2", "checkpoint.keep_last=2"]
    job = start_job(1, *settings, "training.bad_steps.allowed=5", sabotage=spoil(math.nan, 0, range(7, 100)))
    assert job.wait() == [GIVE_UP], job.text
    assert sorted(path.name for path in (job.dir / "checkpoints").glob("step-*")) == ["step-00000004", "step-00000006"]
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert "every step since 7 was bad" in line and "of step 6 and later" in line and "training.lr" in line


def test_bad_steps_are_counted_over_restarts(start_job):
    settings = ["training.max_steps=50", "training.bad_steps.allowed=2", "training.micro_batch=8"]
    job = start_job(1, *settings, "training.stop_after_steps=4", sabotage=spoil(math.nan, 0, [2, 3]))
    assert job.wait() == [0], job.text
    job = start_job(1, *settings, sabotage=spoil(math.nan, 0, [1]))
    assert job.wait() == [GIVE_UP], job.text


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_run_that_ends_with_broken_weights_is_not_finished(start_job, valid_folder, steps_before):
    """At lr 1e30 every loss after the first update is NaN: fewer steps than training.bad_steps allows."""
    settings = ["training.micro_batch=4", "checkpoint.every_steps=2", f"data.valid_path={valid_folder}"]
    if steps_before:
        assert start_job(2, *settings, f"training.stop_after_steps={steps_before}").wait() == [0, 0]
    job = start_job(2, *settings, "training.lr=1e30", "training.allow_lr_jump=true")
    assert job.wait() == [GIVE_UP, GIVE_UP], job.text
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert "ends at step 6 with loss nan and valid_loss nan" in line and "training.lr" in line and "start again" in line
    assert job.rows[-1]["step"] == 6 and job.rows[-1]["loss"] is job.rows[-1]["valid_loss"] is None
    saved = [path.name for path in (job.dir / "checkpoints").glob("step-*")]
    assert saved == ([f"step-{steps_before:08d}"] if steps_before else [])
    assert not (job.dir / "summary.json").exists()
    mended = start_job(2, *settings)
    assert mended.wait() == [0, 0] and mended.rows[-1]["valid_loss"] < 10, mended.text


@pytest.fixture(scope="module")
def passes(valid_folder):
    """The forward passes of a validation, one of which comes before the first step."""
    from lcpt.data import Corpus
    from lcpt.training.validation import Validation

    return len(Validation(Corpus(valid_folder), 256, 32, 8).batches)


def test_a_validation_alone_that_is_not_finite_ends_the_run_with_3(start_job, valid_folder, passes):
    """The last update broke the weights: the loss before it was as it should be."""
    settings = ["training.micro_batch=8", f"data.valid_path={valid_folder}", "checkpoint.every_steps=1"]
    forward_passes = range(passes + 7, 100)  # those of the validation after step 6
    job = start_job(1, *settings, "training.valid_every_steps=100", sabotage=spoil(math.nan, 0, forward_passes))
    assert job.wait() == [GIVE_UP], job.text
    assert "with valid_loss nan" in job.text and job.rows[-1]["loss"] > 0
    assert (job.dir / "checkpoints/latest").read_text() == "step-00000005\n"


def test_a_step_whose_validation_is_not_finite_is_not_saved(start_job, valid_folder, passes):
    settings = ["training.micro_batch=8", f"data.valid_path={valid_folder}", "checkpoint.every_steps=1"]
    job = start_job(1, *settings, sabotage=spoil(math.nan, 0, [passes + 5]))  # the validation after step 4
    assert job.wait() == [0], job.text
    assert job.rows[3]["valid_loss"] is None and job.rows[5]["valid_loss"] > 0
    assert not (job.dir / "checkpoints/step-00000004").exists()
    assert (job.dir / "checkpoints/step-00000005").exists()


def test_a_leap_in_the_last_step_is_skipped_and_the_run_finished(start_job):
    settings = ["training.micro_batch=8", "training.max_steps=40", "training.warmup_steps=30", "training.lr=1e-4"]
    job = start_job(1, *settings, sabotage=spoil(10.0, 0, [40]))
    assert job.wait() == [0] and "step 40 is skipped" in job.text, job.text
