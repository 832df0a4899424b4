import pytest

from lcpt.checkpoint import CheckpointConfig, remove_old, step_name


@pytest.fixture
def left(tmp_path):
    """left(steps, newest, keep_last, milestone_steps) -> the steps that are still there."""

    def left(steps, newest, **settings):
        for step in steps:
            (tmp_path / step_name(step)).mkdir()
            (tmp_path / step_name(step) / "manifest.json").write_text("{}")
        (tmp_path / "latest").write_text(step_name(newest) + "\n")
        remove_old(tmp_path, newest, CheckpointConfig(**settings))
        assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("step-")) == ["latest"]
        return sorted(int(path.name[5:]) for path in tmp_path.glob("step-*"))

    return left


def test_the_last_few_checkpoints_stay(left):
    assert left([10, 20, 30, 40, 50], 50, keep_last=2) == [40, 50]


def test_fewer_checkpoints_than_keep_last_all_stay(left):
    assert left([10, 20], 20, keep_last=3) == [10, 20]


def test_milestones_are_kept_besides(left):
    assert left([10, 20, 25, 30, 40, 50, 60], 60, keep_last=2, milestone_steps=25) == [25, 50, 60]


def test_steps_sort_as_numbers(left):
    assert left([99_999_998, 99_999_999, 100_000_000, 100_000_001], 100_000_001, keep_last=1) == [100_000_001]


def test_a_later_folder_is_no_one_to_fall_back_to(left):
    """Step 50 was damaged and the run went back past it: what it has saved since must not go for its sake."""
    assert left([20, 25, 30, 50], 30, keep_last=1) == [30, 50]


def test_what_a_user_keeps_beside_them_stays(tmp_path):
    kept = {"step-00000010-before-the-change", "step-old", step_name(30)}
    for name in (*kept, step_name(10), step_name(20)):
        (tmp_path / name).mkdir()
    remove_old(tmp_path, 30, CheckpointConfig(keep_last=1))
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("step, due", [(10, True), (15, False), (20, True), (25, True), (0, True)])
def test_a_save_is_due_at_intervals_and_milestones(step, due):
    assert CheckpointConfig(every_steps=10, milestone_steps=25).due(step) == due
    assert CheckpointConfig(every_steps=10).due(25) is False
