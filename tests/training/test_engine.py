import pytest

from lcpt.training.checks import micro_batches
from lcpt.training.config import TrainingConfig
from lcpt.training.engine import ParallelConfig, deepspeed_config


def test_micro_batches_must_divide_evenly():
    assert micro_batches(24, 3, 2) == 4
    for sequences, micro_batch, world in ((24, 5, 2), (24, 3, 5), (1, 1, 2)):
        with pytest.raises(ValueError, match=f"{sequences} .* {world} .* {micro_batch}"):
            micro_batches(sequences, micro_batch, world)


@pytest.mark.parametrize("stage", [-1, 4])
def test_other_zero_stages_are_refused(stage):
    with pytest.raises(ValueError, match=f"zero_stage is {stage}"):
        ParallelConfig(stage)


@pytest.mark.parametrize(
    "given, key",
    [
        ({"gradient_clipping": 1.0}, "training.grad_clip"),
        ({"bf16": {"enabled": True}}, "training.precision"),
        ({"zero_optimization": {"stage": 3}}, "parallel.zero_stage"),
    ],
)
def test_what_lcpt_derives_is_not_passed_to_deepspeed(given, key):
    with pytest.raises(ValueError, match=f"is derived from {key}; set that"):
        ParallelConfig(deepspeed=given)


def test_anything_else_is():
    given = {"zero_optimization": {"reduce_bucket_size": 1000}, "comms_logger": {"enabled": True}}
    derived = deepspeed_config(TrainingConfig(), ParallelConfig(2, deepspeed=given), 3)
    assert derived["zero_optimization"] == {"stage": 2, "compute_grad_norm": False, "reduce_bucket_size": 1000}
    assert derived["comms_logger"] == {"enabled": True} and derived["gradient_accumulation_steps"] == 3


def test_deepspeed_refuses_what_it_does_not_know(start_job):
    job = start_job(1, "parallel.deepspeed.zero_optimization.reduce_bucket_siz=1000", "training.micro_batch=8")
    assert job.wait() == [2], job.text
    assert "reduce_bucket_siz" in job.text and "Traceback" not in job.text
