"""Every ZeRO stage trains every form of the model alike: weights that are gathered and let go meet recomputation."""

import pytest

OPTIONS = [
    "training.max_steps=3",
    "model.norm=rms_norm",
    "model.feed_forward=swiglu",
    "model.bias=true",
    "model.tie_embeddings=false",
    "model.positions=learned",
    "model.max_positions=4096",
    "model.attention.bias=true",
    "model.attention.qk_norm=rms_norm",
    "model.attention.head_dim=12",
]


@pytest.fixture(scope="module")
def alone(train_ranks):
    """Rows of one rank without ZeRO."""
    return train_ranks(1, *OPTIONS, "parallel.zero_stage=0", "training.micro_batch=2").rows


@pytest.mark.parametrize("stage, checkpointing", [(1, "selective"), (2, "true"), (3, "selective"), (3, "true")])
def test_losses_and_gradient_norms_are_the_same(train_ranks, alone, stage, checkpointing):
    rows = train_ranks(
        2, *OPTIONS, f"parallel.zero_stage={stage}", f"model.activation_checkpointing={checkpointing}"
    ).rows
    assert len(rows) == len(alone) == 3
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in alone], rel=1e-5)


def test_a_run_may_go_on_with_another_checkpointing(train_ranks, alone, tmp_path):
    options = [*OPTIONS, "parallel.zero_stage=1", "checkpoint.every_steps=1"]
    train_ranks(1, *options, "training.stop_after_steps=2", dir=tmp_path / "run")
    rows = train_ranks(1, *options, "model.activation_checkpointing=selective", dir=tmp_path / "run").rows
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone], rel=1e-5)
