"""A branch has its trunk's weights, moments and place in the data, and a schedule of its own."""

import json

import pytest

from lcpt.checkpoint import find_checkpoint, read_state

CONSTANT = ["training.schedule=wsd", "training.decay_fraction=0", "training.warmup_steps=0", "training.micro_batch=8"]


@pytest.fixture(scope="module")
def trunk(train_ranks):
    settings = ["training.max_steps=8", "checkpoint.every_steps=1", "checkpoint.keep_last=100"]
    return train_ranks(1, *CONSTANT, *settings)


@pytest.fixture
def at_step_3(trunk):
    return f"training.branch_from={trunk.dir}/checkpoints/step-00000003"


@pytest.mark.parametrize("world, stage", [(1, 1), (2, 3)])
def test_a_branch_with_the_trunks_settings_is_the_trunk(train_ranks, trunk, at_step_3, world, stage):
    """Losses and gradient norms, which depend on weights, moments, their number of updates, and batches."""
    settings = ["training.max_steps=5", "training.micro_batch=4", f"parallel.zero_stage={stage}"]
    branch = train_ranks(world, *CONSTANT, *settings, at_step_3)
    for row, expected in zip(branch.rows, trunk.rows[3:], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert row["source_tokens"] == expected["source_tokens"] and row["step"] == expected["step"] - 3
    assert [row["tokens"] for row in branch.rows] == [256 * n for n in range(1, 6)]
    assert read_state(find_checkpoint(branch.dir))["adam_step"] == 8


def test_it_anneals_on_a_schedule_of_its_own_and_goes_on_where_it_stopped(train_ranks, trunk, at_step_3):
    annealed = [
        at_step_3,
        "training.max_steps=4",
        "training.schedule=wsd",
        "training.decay_fraction=1",
        "training.final_lr_fraction=0",
        "training.warmup_steps=1",
        "training.micro_batch=8",
    ]
    whole = train_ranks(1, *annealed)
    rates = [row["learning_rate"] / 0.003 for row in whole.rows]
    assert rates == pytest.approx([1, 2 / 3, 1 / 3, 0])
    stopped = train_ranks(1, *annealed, "training.stop_after_steps=2")
    assert json.loads((stopped.dir / "branched_from.json").read_text())["step"].endswith("step-00000003")
    again = train_ranks(1, *annealed, dir=stopped.dir)
    assert [row["loss"] for row in again.rows] == [row["loss"] for row in whole.rows]
    recorded = [json.loads(line) for line in (trunk.dir / "branches.jsonl").read_text().splitlines()]
    assert {str(whole.dir), str(stopped.dir)} <= {each["run"] for each in recorded}
    assert {each["step"] for each in recorded} == {"step-00000003"}


def test_a_branch_goes_to_a_longer_context_and_another_rope_base(train_ranks, at_step_3, trunk, capfd):
    """In another order of windows: the folder goes on with its next epoch."""
    longer = train_ranks(1, at_step_3, "data.context=64", "model.rope_base=50000", "training.max_steps=3")
    assert "model.rope_base 10000.0 -> 50000.0\n" in capfd.readouterr().err
    [path] = longer.rows[0]["source_epochs"]
    assert longer.rows[0]["source_epochs"][path] > 1 > trunk.rows[2]["source_epochs"][path]


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["model.d_ff=8"], ["model.d_ff None, this is 8", "init_from"]),
        (["model.attention.gate=data"], ["model.attention.gate none, this is data"]),
        (["run.seed=4"], ["run.seed 0, this is 4"]),
        (["data.path={foreign}"], ["another tokenizer", "{foreign}", "--tokenizer"]),
        (["training.branch_from={nowhere}"], ["training.branch_from: {nowhere}", "no run folder"]),
        (["data.path=synthetic:mqar"], ["synthetic:mqar are of a task and of text"]),
    ],
    ids=["width", "gate", "seed", "tokenizer", "nowhere", "task"],
)
def test_what_cannot_branch_is_refused(train_ranks, make_corpus, tmp_path, trunk, capfd, overrides, parts):
    places = {"foreign": make_corpus(seed=9), "nowhere": tmp_path / "nowhere"}
    filled = [text.format(**places) for text in overrides]
    run = train_ranks(1, f"training.branch_from={trunk.dir}", *filled, dir=tmp_path / "run", code=2)
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert all(part.format(**places) in line for part in ("", *parts))
    assert not run.dir.exists()


def test_weights_alone_or_all_of_it(tiny_yaml):
    from lcpt.config import ConfigError, load_config

    with pytest.raises(ConfigError, match=r"init_from and training.branch_from are both set"):
        load_config(tiny_yaml, ["run.dir=r", "training.init_from=a", "training.branch_from=b"])
