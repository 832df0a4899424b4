"""What does not fit into memory is one line: exit code 2 where a setting is at fault, at the start; later 1."""

from pathlib import Path

import pytest
import torch

from lcpt.config import load_config
from lcpt.parallel import groups
from lcpt.training.out_of_memory import count_parameters, explain, is_out_of_memory, write_snapshot

FAULT, BAD_INPUT = 1, 2


def allocate():
    torch.empty(2**55)  # a real failure of the allocator


def raise_as_a_gpu_does():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …\nmore")


def errors(job):
    return [line for line in job.text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("error", [allocate, raise_as_a_gpu_does])
@pytest.mark.parametrize("rank", [0, 1])
def test_in_the_first_step_of_one_rank_it_is_the_settings_fault(start_job, at_place, error, rank):
    job = start_job(2, "training.micro_batch=4", sabotage=at_place("micro-batch 1 of step 1", error, rank))
    assert job.wait() == [BAD_INPUT, BAD_INPUT], job.text
    [line] = errors(job)
    assert f"rank {rank} is out of memory at micro-batch 1 of step 1" in line and "start again" not in line
    assert (
        "training.micro_batch (now 4)" in line and "model.activation_checkpointing=selective, true or offload" in line
    )
    assert "Traceback" not in job.text


def test_it_does_not_count_as_a_crash(start_job, at_place):
    for _ in range(4):
        job = start_job(1, "training.micro_batch=8", sabotage=at_place("micro-batch 1 of step 1", allocate))
        assert job.wait() == [BAD_INPUT], job.text
    assert start_job(1, "training.micro_batch=4").wait() == [0]


def test_in_a_later_step_it_is_a_fault(start_job, at_place):
    job = start_job(2, "training.micro_batch=4", sabotage=at_place("micro-batch 1 of step 3", allocate, 1))
    assert job.wait() == [FAULT, FAULT] and "start again" in job.text, job.text
    assert "error: rank 1 is out of memory at micro-batch 1 of step 3" in job.text
    assert "training.micro_batch (now 4)" in job.text


def test_a_gpu_leaves_a_snapshot_of_its_memory(monkeypatch, tmp_path):
    """A stand-in for the GPU, and for PyTorch's function."""
    monkeypatch.setattr(groups, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"blocks"))
    assert write_snapshot(tmp_path) == tmp_path / "out-of-memory-rank0.pickle"
    assert (tmp_path / "out-of-memory-rank0.pickle").read_bytes() == b"blocks"


def test_a_cpu_leaves_none(tmp_path):
    assert write_snapshot(tmp_path) is None and not list(tmp_path.iterdir())


def test_while_the_model_is_built_it_is_one_line(start_job):
    def sabotage(number):
        import lcpt.training.setup as module

        module.GPT = lambda config: allocate()

    job = start_job(2, "training.micro_batch=4", sabotage=sabotage)
    assert job.wait() == [BAD_INPUT, BAD_INPUT] and len(errors(job)) == 1, job.text
    assert "at the start" in job.text and "Traceback" not in job.text


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["model.d_model=100000000"], ["parameters", "feed_forward", "GiB of memory"]),
        (["model.d_model=10000000000"], ["no memory holds this model", "overflow"]),
        (
            ["model.vocab_size=100000000000", "data.path=synthetic:mqar"],
            ["embedding", "[100000000000, 32]", "GiB of memory"],
        ),
        (["training.global_batch_tokens=35184372088832"], ["training.global_batch_tokens", "GiB of tokens", "2 ranks"]),
        (
            ["data.path=synthetic:mqar", "data.valid_path=synthetic:mqar", "training.valid_tokens=35184372088832"],
            ["training.valid_tokens", "GiB of tokens"],
        ),
    ],
    ids=lambda x: " ".join(x),
)
def test_what_never_fits_is_refused_before_it_is_built(start_job, overrides, parts):
    job = start_job(2, *overrides)
    assert job.wait() == [BAD_INPUT, BAD_INPUT], job.text
    [line] = errors(job)
    assert all(part in line for part in parts), line
    assert "Traceback" not in job.text and not job.dir.exists()


def test_parameters_are_counted_without_building_the_model(tiny_yaml):
    from lcpt.model import GPT

    model = load_config(tiny_yaml, ["run.dir=none"]).model
    count, largest = count_parameters(model)
    assert count == sum(p.numel() for p in GPT(model).parameters()) and "[330, 32]" in largest


def test_only_what_can_still_be_changed_is_named(tiny_yaml):
    config = load_config(tiny_yaml, ["run.dir=none", "model.activation_checkpointing=offload"])
    line = explain(MemoryError("no room\nmore"), config, "the start")
    assert "(no room)" in line and "data.context" in line and "\n" not in line
    assert "micro_batch" not in line and "activation_checkpointing" not in line and "zero_stage" not in line


def test_other_errors_are_none():
    assert not any(map(is_out_of_memory, (RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError())))
