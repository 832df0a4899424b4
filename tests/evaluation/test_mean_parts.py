"""Averages of report parts over runs and seeds."""

from lcpt.evaluation.compared_runs import group_by_setting, read_run
from lcpt.evaluation.mean_parts import mean_lines, mean_parts


def part(start, loss, interval=None):
    return {"start": start, "loss": loss, "interval": interval}


def test_numbers_and_intervals_are_averaged_over_the_parts_that_all_have():
    mean = mean_parts(
        [[part(0, 1.0, [0.0, 2.0]), part(4, 5.0)], [part(4, 7.0, [6.0, 8.0]), part(0, 3.0, [2.0, 6.0])]], ("start",)
    )
    assert mean == [part(0, 2.0, [1.0, 4.0]), part(4, 6.0, None)]
    assert mean_parts([[part(0, 1.0), part(4, 1.0)], [part(0, 3.0)]], ("start",)) == [part(0, 2.0)]
    assert mean_parts([], ("start",)) == []


def test_runs_of_a_seed_are_averaged_before_seeds(make_run):
    runs = [
        make_run(f"a-{n}", run__seed=seed, environment={"parts": [part(0, loss)]})
        for n, (seed, loss) in enumerate([(0, 1.0), (0, 3.0), (1, 5.0)])
    ]
    runs += [make_run("a-4", run__seed=2), make_run("none", training__lr=1.0)]
    settings = group_by_setting(map(read_run, runs))
    lines = mean_lines(settings, lambda run: run.environment.get("parts"), ("start",))
    assert lines == [("a", [part(0, 3.5)])]
