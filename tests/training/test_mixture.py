"""Runs on a mixture: the same losses however the work is divided and where it stops, and what its rows tell."""

import pytest

from lcpt.checkpoint import find_checkpoint, read_state
from lcpt.data import DataConfig, SourceConfig, open_text

STEPS = 6


@pytest.fixture(scope="module")
def settings(train_folder, make_corpus):
    """Half of the tokens are of a small folder, which a run uses more than once."""
    other = make_corpus(seed=3, tokenizer=train_folder / "tokenizer.model", sentences=2)
    sources = [SourceConfig(str(train_folder), 0.45), SourceConfig(str(other), 0.55, 10)]
    listed = ", ".join(
        f"{{path: {s.path}, weight: {s.weight}, max_repeats: {s.max_repeats or 'null'}}}" for s in sources
    )
    overrides = ["data.path=null", f"data.sources=[{listed}]", f"training.max_steps={STEPS}"]
    return open_text(DataConfig(None, sources=sources)), overrides


@pytest.fixture(scope="module")
def whole(train_ranks, settings):
    return train_ranks(1, *settings[1], "training.micro_batch=8")


def test_rows_count_what_each_source_gave(whole, settings):
    mixture, _ = settings
    for row in whole.rows:
        drawn = mixture.drawn(8 * row["step"], 32)
        assert row["source_tokens"] == {path: each.tokens for path, each in drawn.items()}
        assert row["source_epochs"] == {path: each.epochs for path, each in drawn.items()}
        assert sum(row["source_tokens"].values()) == row["tokens"]
    assert max(row["source_epochs"].values()) > 1  # the last: the small folder began again
    assert read_state(find_checkpoint(whole.dir))["data fingerprint"] == mixture.fingerprint


def test_tensorboard_draws_each_source(whole, settings):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole.dir / "tensorboard"))
    events.Reload()
    for name in ("source_tokens", "source_epochs"):
        for path in whole.config.data.sources:
            found = [event.value for event in events.Scalars(f"data/{name}/{path.path}")]
            assert found == pytest.approx([row[name][path.path] for row in whole.rows])


@pytest.mark.parametrize("world, micro_batch, stop, other_world", [(2, 1, 1, 4), (4, 2, 3, 1), (1, 4, 5, 2)])
def test_ranks_micro_batches_and_resume_change_nothing(
    train_ranks, settings, whole, world, micro_batch, stop, other_world
):
    first = train_ranks(world, *settings[1], f"training.micro_batch={micro_batch}", f"training.stop_after_steps={stop}")
    again = train_ranks(other_world, *settings[1], "training.micro_batch=2", dir=first.dir)
    assert [row["step"] for row in again.rows] == list(range(1, STEPS + 1))
    for row, expected in zip(again.rows, whole.rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        for name in ("source_tokens", "source_epochs"):
            assert row[name] == expected[name]


def test_other_weights_refuse_to_go_on(train_ranks, settings, whole, capfd):
    swapped = settings[1][1].replace("0.45", "0.5").replace("0.55", "0.5")
    again = ["data.path=null", swapped, "training.max_steps=9", "training.allow_lr_jump=true"]
    rows = train_ranks(1, *again, "training.micro_batch=8", dir=whole.dir, code=2).rows
    assert len(rows) == STEPS
    [line] = [line for line in capfd.readouterr().err.splitlines() if "other data than data.sources" in line]
    first, second = (source.path for source in whole.config.data.sources)
    assert f"than data.sources {first} 0.5, {second} 0.5 (" in line
    assert f"with data.sources {first} 0.45, {second} 0.55;" in line
