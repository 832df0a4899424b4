"""What a run says of itself beside its loss: speed, norms by layer, a trace, and where metrics go."""

import gzip
import json
import sys
import types

import pytest
import torch

from lcpt.model.cost import model_cost
from lcpt.training.metric_sinks import WandB, tags
from lcpt.training.profiling import ProfileConfig, Profiler
from lcpt.training.telemetry import Telemetry, speed
from lcpt.training.throughput import Throughput
from lcpt.utils.gpus import peak_flops


def test_throughput_counts_what_is_trained_and_not_what_is_computed_again(train_ranks):
    run = train_ranks(2, "training.micro_batch=4", "training.max_steps=3", "model.activation_checkpointing=true")
    cost = model_cost(run.config.model, 32)
    assert cost.flops_trained < cost.flops_step
    for row in run.rows:
        assert row["tflops_per_second"] == pytest.approx(row["tokens_per_second"] * cost.flops_trained / 2 / 1e12)


def test_mfu_is_a_part_of_the_peak():
    from lcpt.model import ModelConfig

    speed = Throughput(config := ModelConfig(n_layers=1, d_model=32, n_heads=2, vocab_size=64), 32, torch.device("cpu"))
    assert speed.of(1e6)["mfu"] is None
    speed._peak = peak_flops("NVIDIA H100 80GB HBM3")
    assert speed.of(1e6)["mfu"] == pytest.approx(1e6 * model_cost(config, 32).flops_trained / 989e12)


def test_gpus_have_the_peak_of_their_form():
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("a GPU of next year") is None


@pytest.mark.parametrize("world, stage, precision", [(1, 0, "fp32"), (2, 1, "bf16"), (2, 2, "fp32"), (2, 3, "bf16")])
def test_norms_of_layers_add_up(train_ranks, world, stage, precision):
    settings = [f"parallel.zero_stage={stage}", f"training.precision={precision}", "training.micro_batch=2"]
    run = train_ranks(world, *settings, "training.max_steps=4", "training.norms_every_steps=2")
    assert ["gradient_norms" in row for row in run.rows] == [False, True, False, True]
    for row in run.rows[1::2]:
        assert (
            row["gradient_norms"].keys() == {"embedding", "blocks.0", "blocks.1", "norm"} == row["weight_norms"].keys()
        )
        assert sum(x**2 for x in row["gradient_norms"].values()) ** 0.5 == pytest.approx(row["grad_norm"], rel=1e-4)
        assert row["weight_norms"]["norm"] == pytest.approx(32**0.5, rel=0.05)  # of ones


def test_a_trace_holds_the_steps_that_were_asked_for(train_ranks):
    overrides = ["training.profile.start=2", "training.profile.steps=2", "training.micro_batch=4"]
    run = train_ranks(2, *overrides)
    [trace] = (run.dir / "profile").iterdir()
    assert trace.name == "steps-2-3.json.gz"
    names = [event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert names.count("aten::embedding") == 2  # a micro-batch a step
    assert any("_fused_adamw" in str(name) for name in names)


def test_a_trace_ends_with_the_run(train_ranks):
    run = train_ranks(1, "training.profile.start=5", "training.profile.steps=100", "training.micro_batch=8")
    assert [path.name for path in (run.dir / "profile").iterdir()] == ["steps-5-6.json.gz"]


def test_wandb_gets_every_row(monkeypatch, tmp_path):
    logged = []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    given = {}
    stand_in = types.SimpleNamespace(init=lambda **settings: given.update(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    sink = WandB("books", tmp_path / "first", "run: {seed: 3}")
    sink.log({"step": 7, "loss": 4.0, "gradient_norms": {"blocks.0": 0.5}, "mfu": None})
    assert logged == [(7, {"loss/train": 4.0, "gradient_norms/blocks.0": 0.5})]
    sink.text(8, "samples/books", "It was", " dark")
    assert logged[1:] == [(8, {"samples/books": "It was dark"})]
    assert given["project"] == "books" and given["id"] == "first" and given["config"] == {"run": {"seed": 3}}


def test_wandb_is_needed_only_where_it_is_used(start_job):
    job = start_job(1, "run.wandb_project=books", "training.micro_batch=8", sabotage=without_wandb)
    assert job.wait() == [2], job.text
    assert "pip install wandb" in job.text and "Traceback" not in job.text


def without_wandb(number):
    sys.modules["wandb"] = None


def test_a_metric_without_a_group_is_still_drawn():
    assert tags({"step": 1, "something": 2.0}) == {"other/something": 2.0}


def test_the_progress_line_has_units_that_a_person_reads():
    row = {"tokens_per_second": 123456.7, "tflops_per_second": 412.3, "mfu": 0.417, "peak_memory_bytes": 2**35}
    assert speed(row) == "123,457 tokens a second, 412 TFLOP/s a rank (MFU 41.7%), 32.0 GiB"
    assert ", 0.4 GFLOP/s a rank, " in speed(row | {"tflops_per_second": 0.0004, "mfu": None})


def test_a_sink_that_fails_keeps_no_checkpoint_from_being_saved(tmp_path, capsys):
    def fail(*_):
        raise OSError("no room")

    good: list[dict] = []
    bad_sink = types.SimpleNamespace(log=lambda row: None, flush=fail, close=fail)
    sinks = [bad_sink, types.SimpleNamespace(log=good.append, flush=lambda: None, close=lambda: None)]
    telemetry = Telemetry(tmp_path, 200, 200, 0, sinks)
    row = {"step": 1, "tokens": 8, "loss": 4.0, "learning_rate": 0.1, "mfu": None, "tflops_per_second": 1.0}
    row |= {"tokens_per_second": 1.0, "peak_memory_bytes": 1}
    telemetry.step(row)
    assert telemetry.flush() is None and len(sinks) == 1
    telemetry.step(row | {"step": 2})
    telemetry.close()
    assert [each["step"] for each in good] == [1, 2] and "curves end here: no room" in capsys.readouterr().err


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "profile").write_text("a file where a folder should be")
    profiler = Profiler(tmp_path, ProfileConfig(start=1, steps=1))
    profiler.before(1)
    assert profiler.after(1, last=False).startswith("warning: the trace of steps 1 to 1 cannot be written")
    assert profiler.after(2, last=True) is None
