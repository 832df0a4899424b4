"""Activation checkpointing with offload under every stage of ZeRO: gathered weights meet recomputation twice over."""

import pytest

OPTIONS = ["training.max_steps=3", "model.feed_forward=swiglu", "model.bias=true"]


@pytest.fixture(scope="module")
def checkpointed(train_ranks):
    """Rows of one rank that computes blocks again, and keeps their inputs where they are."""
    return train_ranks(1, *OPTIONS, "parallel.zero_stage=0", "model.activation_checkpointing=true").rows


@pytest.mark.parametrize("stage, precision", [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_losses_are_those_of_full_checkpointing(train_ranks, checkpointed, monkeypatch, stage, precision):
    """Two ranks of 4 sequences, 128 tokens, in pieces of 40; in bf16 against the same run without offload."""
    monkeypatch.setattr("lcpt.model.feed_forward.PIECE", 40)  # ranks are forked
    options = [*OPTIONS, f"parallel.zero_stage={stage}", f"training.precision={precision}", "training.micro_batch=4"]
    rows = train_ranks(2, *options, "model.activation_checkpointing=offload").rows
    expected, tolerance = checkpointed, 1e-5
    if precision == "bf16":
        expected, tolerance = train_ranks(2, *options, "model.activation_checkpointing=true").rows, 3e-3
    assert len(rows) == len(expected) == 3
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in expected], rel=tolerance)
