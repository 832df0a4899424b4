"""Runs on packed documents: the same losses however the work is divided and where it stops, and no other packing on
resume."""

import pytest

from lcpt.data import open_text

STEPS = 4


@pytest.fixture(scope="module")
def settings(make_corpus, train_folder):
    """Documents of about one and a half contexts, which leave tails."""
    folder = make_corpus(seed=4, tokenizer=train_folder / "tokenizer.model", sentences=3)
    return [f"data.path={folder}", "data.packing=best_fit", "data.context=64", f"training.max_steps={STEPS}"]


@pytest.fixture(scope="module")
def whole(train_ranks, settings):
    return train_ranks(1, *settings, "training.micro_batch=4")


def test_rows_tell_the_padding(whole):
    source = open_text(whole.config.data)
    in_epoch = source.samples_in_epoch(64)
    for row in whole.rows:
        numbers = range(4 * (row["step"] - 1), 4 * row["step"])
        padding = sum(source.sample(number, whole.config.run.seed, 64).padding for number in numbers)
        assert row["padding_fraction"] == padding / 256
        assert list(row["source_epochs"].values()) == [4 * row["step"] / in_epoch]
    assert any(row["padding_fraction"] > 0 for row in whole.rows)


@pytest.mark.parametrize("world, micro_batch, stop, other_world", [(2, 1, 1, 1), (1, 1, 3, 2)])
def test_ranks_micro_batches_and_resume_change_nothing(
    train_ranks, settings, whole, world, micro_batch, stop, other_world
):
    first = train_ranks(world, *settings, f"training.micro_batch={micro_batch}", f"training.stop_after_steps={stop}")
    again = train_ranks(other_world, *settings, "training.micro_batch=2", dir=first.dir)
    assert [row["step"] for row in again.rows] == list(range(1, STEPS + 1))
    for row, expected in zip(again.rows, whole.rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert row["padding_fraction"] == expected["padding_fraction"]


def test_a_run_keeps_its_packing(train_ranks, settings, capfd):
    run = train_ranks(1, *settings, "training.stop_after_steps=1")
    train_ranks(1, *settings, "data.packing=contiguous", dir=run.dir, code=2)
    assert "data.packing best_fit, this is contiguous" in capfd.readouterr().err


def test_a_foreign_vocabulary_is_refused(train_ranks, settings, capfd):
    train_ranks(1, *settings, "model.vocab_size=329", code=2)
    assert "set model.vocab_size=330" in capfd.readouterr().err
