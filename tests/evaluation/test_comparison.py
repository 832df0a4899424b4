"""Figures and warnings of run folders written by hand."""

import numpy as np
import pytest

from lcpt.data import DataError
from lcpt.evaluation.compared_runs import group_by_setting, read_run
from lcpt.evaluation.comparison import compare, loss_over

EVALUATION = {
    "loss": 3.5,
    "bits_per_byte": 2.5,
    "fingerprint": "f" * 64,
    "window": 64,
    "stride": 64,
    "carry_state": False,
    "loss_by_position": [
        {"start": 0, "end": 48, "tokens": 10, "loss": 4.0},
        {"start": 48, "end": 56, "tokens": 3, "loss": 3.0},
        {"start": 56, "end": 64, "tokens": 1, "loss": 2.0},
    ],
}
RECALL = {
    "accuracy": 0.75,
    "fingerprint": "0" * 64,
    "context": 64,
    "recall_by_distance": [{"start": 0, "end": 64, "answers": 4, "accuracy": 0.75, "loss": 1.0}],
}


def test_figures_by_hand(make_run):
    report = compare([read_run(make_run("one", evaluation=EVALUATION, recall=RECALL))])
    [row], [run] = report["rows"], report["runs"]
    assert report["schema_version"] == 1 and report["warnings"] == []
    embedding, norms = 10 * 16, 16 + 2 * 2 * 16 + 2 * 2 * 2 * 8  # of the output, of blocks, of heads' queries and keys
    matrices = 2 * (16 * 48 + 16 * 16 + 3 * 16 * 40)
    assert run["parameters"] == embedding + norms + matrices
    assert run["tokens"] == 4000
    assert run["loss"] == pytest.approx(2.5)  # of the last two of 40 steps
    assert (run["valid_loss"], run["valid_bits_per_byte"]) == (2.5, 1.25)
    assert (run["evaluation_loss"], run["evaluation_bits_per_byte"], run["recall"]) == (3.5, 2.5, 0.75)
    assert run["loss_last_quarter"] == pytest.approx((3 * 3.0 + 1 * 2.0) / 4)
    assert run["step_milliseconds"] == 20_500 and run["tokens_per_second"] == pytest.approx(100 / 20.5)
    assert run["state_bytes"] == 2 * 4 * 2 * 64 * 16
    assert row["name"] == "one" and row["kinds"] == "softmax" and row["seeds"] == [0]
    assert row["loss"] == {"mean": run["loss"], "spread": None}


@pytest.mark.parametrize("rare, loss", [({"tokens": 2, "loss": 1.0, "by_distance": []}, 1.0), (None, None)])
def test_loss_on_repeated_bigrams(make_run, rare, loss):
    """None where an evaluation of old, or of one document, does not have it."""
    parts = {"tokens": 4, "loss": 2.0, "by_distance": [], "rare": rare, "other_tokens": 10, "other_loss": 3.0}
    runs = [
        make_run("new", evaluation=EVALUATION | {"repeated_bigrams": parts}),
        make_run("old", evaluation=EVALUATION),
        make_run("none"),
    ]
    names = ("loss_repeated_bigrams", "loss_rare_bigrams", "loss_other_tokens")
    found = [tuple(run[name] for name in names) for run in compare([read_run(run) for run in runs])["runs"]]
    assert found == [(2.0, loss, 3.0), (None,) * 3, (None,) * 3]


def test_a_run_with_phases_is_counted_as_it_ended(make_run):
    """The last of four steps has ten times the tokens of the others, in twice the context."""
    folder = make_run("phased", steps=4, data__context=32)
    with open(folder / "config.yaml", "a") as file:
        file.write("phases: [{data: {}, training: {}}, {data: {context: 64}, training: {}}]\n")
    text = (folder / "metrics.jsonl").read_text().replace('"tokens": 400', '"tokens": 1300')
    (folder / "metrics.jsonl").write_text(text)
    whole = read_run(make_run("whole"))
    report = compare([read_run(folder), whole])
    phased, other = report["runs"]
    assert phased["tokens_per_second"] == pytest.approx(2 / (1 / 100 + 2 / 100))  # of 100, 50, 33 and 250 a second
    assert phased["state_bytes"] == other["state_bytes"]
    assert not any("contexts" in warning for warning in report["warnings"])


def test_seeds_are_one_row(make_run):
    runs = [make_run(f"poly-{seed}", loss=loss, run__seed=seed) for seed, loss in ((0, 2.0), (1, 3.0), (2, 4.0))]
    other = make_run("other", training__lr=1.0)
    rows = compare([read_run(run) for run in [*runs, other]])["rows"]
    assert [(row["name"], row["seeds"]) for row in rows] == [("poly", [0, 1, 2]), ("other", [0])]
    assert rows[0]["valid_loss"] == {"mean": 3.5, "spread": 1.0} and rows[0]["recall"] == {"mean": None, "spread": None}


def test_every_setting_has_a_name_of_its_own(make_run, tmp_path):
    (tmp_path / "there").mkdir()
    runs = [make_run("one"), make_run("there/one", model__rope_base=5.0)]
    assert list(group_by_setting(map(read_run, runs))) == ["one", str(runs[1])]


def test_kinds_are_those_of_the_layers(make_run):
    """A pattern longer than the model does not count in full."""
    mixed = make_run("mixed", model__attention={"kind": "softmax", "pattern": ["polysketch", "softmax"]})
    cut = make_run("cut", model__attention={"kind": "softmax", "pattern": ["polysketch", "polysketch", "softmax"]})
    rows = compare([read_run(mixed), read_run(cut)])["rows"]
    assert [row["kinds"] for row in rows] == ["1 polysketch, 1 softmax", "polysketch"]


@pytest.mark.parametrize(
    "changes, remark",
    [
        ({"steps": 41}, "different numbers of tokens: 4,000: a; 4,100: b"),
        ({"model__vocab_size": 11}, "different vocabularies: 10: a; 11: b"),
        ({"data__path": "nowhere"}, "different training data: somewhere: a; nowhere: b"),
        ({"data__context": 32}, "different contexts"),
        ({"data__valid_path": "nowhere"}, "different validation data: elsewhere 64: a; nowhere 64: b"),
        (
            {"data__valid_path": None, "data__valid": {"books": "nowhere", "code": "elsewhere"}},
            "different validation data: elsewhere 64: a; nowhere 64: b",
        ),
        (
            {"evaluation": EVALUATION | {"fingerprint": "e" * 64}},
            f"different texts in evaluation.json: {'f' * 12}: a; {'e' * 12}",
        ),
        ({"evaluation": EVALUATION | {"stride": 32}}, "different scoring in evaluation.json"),
        ({"recall": RECALL | {"context": 32}}, "different tasks in recall.json"),
        ({"finished": False}, "b is not finished"),
    ],
)
def test_what_must_not_be_compared_is_said(make_run, changes, remark):
    runs = [make_run("a", evaluation=EVALUATION, recall=RECALL), make_run("b", run__seed=1, **changes)]
    [warning] = compare([read_run(run) for run in runs])["warnings"]
    assert remark in warning and "\n" not in warning


def test_what_was_not_measured_is_no_reason(make_run):
    runs = [make_run("a", evaluation=EVALUATION), make_run("b", run__seed=1)]
    assert compare([read_run(run) for run in runs])["warnings"] == []


def test_loss_curves_run_over_tokens_and_over_time(make_run):
    run = read_run(make_run("one", steps=100))
    tokens, loss = loss_over(run, wall_time=False)
    np.testing.assert_allclose(tokens, 100 * np.arange(2, 101))
    np.testing.assert_allclose(loss, 2.0 + 100 - np.arange(2, 101) + 0.5)  # of each step and the one before
    seconds, _ = loss_over(run, wall_time=True)
    np.testing.assert_allclose(seconds, [n * (n + 1) / 2 for n in range(2, 101)])


def test_folders_that_are_no_runs_are_named(make_run, tmp_path):
    with pytest.raises(DataError, match="absent is no run folder: it has no config.yaml"):
        read_run(tmp_path / "absent")
    run = make_run("one")
    (run / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match="one: a file of this run is damaged"):
        read_run(run)
    (run / "evaluation.json").write_text('{"accuracy": 1.0}')
    with pytest.raises(DataError, match=r"one: .*evaluation.json has no loss; write it"):
        read_run(run)
    (run / "evaluation.json").unlink()
    (run / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(DataError, match="has not made a step"):
        read_run(run)


def test_a_folder_that_is_given_twice_counts_once(make_run, tmp_path):
    folders = [make_run("one", loss=2.0, run__seed=0), make_run("other", loss=3.0, run__seed=1)]
    (tmp_path / "link").symlink_to(folders[0])
    report = compare([read_run(folder) for folder in (*folders, folders[0], tmp_path / "link")])
    [row] = report["rows"]
    assert row["seeds"] == [0, 1] and [run["run"] for run in report["runs"]] == list(map(str, folders))
    assert report["warnings"] == ["a run that was given twice counts once"]


def test_runs_of_one_seed_count_as_one(make_run):
    """Valid losses 2.5 and 4.5 of seed 0 are one, 3.5; beside that of seed 1, 5.5, the spread is that of two values."""
    losses = {"a-0": (0, 2.0), "a-0-again": (0, 4.0), "a-1": (1, 5.0)}
    report = compare([read_run(make_run(name, loss=loss, run__seed=seed)) for name, (seed, loss) in losses.items()])
    [row] = report["rows"]
    assert (row["seeds"], row["runs"], len(report["runs"])) == ([0, 1], 3, 3)
    assert row["valid_loss"] == pytest.approx({"mean": 4.5, "spread": 2**0.5})
    assert report["warnings"] == ["2 runs of a have seed 0; their mean counts as one seed"]


def test_carried_state_has_no_last_quarter_of_a_window(make_run):
    [run] = compare([read_run(make_run("a", evaluation=EVALUATION | {"carry_state": True}))])["runs"]
    assert run["loss_last_quarter"] is None and run["evaluation_loss"] == 3.5


def test_context_gain_and_retrieval_are_figures(make_run):
    gain = {"contexts": [{"context": 32, "loss": 4.0, "gain": 0.0}, {"context": 64, "loss": 3.75, "gain": 0.25}]}
    retrieval = {"fingerprint": "a", "summary": [{"accuracy": 0.5}, {"accuracy": 1.0}], "rows": []}
    runs = [
        make_run("a", evaluation=EVALUATION | {"context_gain": gain}, retrieval=retrieval),
        make_run("b", run__seed=1, evaluation=EVALUATION | {"context_gain": None}),
    ]
    found = [(run["context_gain"], run["retrieval"]) for run in compare([read_run(run) for run in runs])["runs"]]
    assert found == [(0.25, 0.75), (None, None)]
