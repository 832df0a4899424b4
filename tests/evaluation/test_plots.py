import json

import pytest
from matplotlib import pyplot

from lcpt.evaluation import plots
from lcpt.evaluation.plots import cells, loss_by_position, loss_curve, over_slices, recall_by_distance

PNG = b"\x89PNG\r\n"


def test_both_pictures_are_drawn(tmp_path):
    rows = [{"tokens": 10, "loss": 3.0}, {"tokens": 20, "loss": 2.0, "valid_loss": 2.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    bins = [{"start": 0, "end": 4, "tokens": 4, "loss": 3.0}, {"start": 4, "end": 8, "tokens": 4, "loss": 2.0}]
    loss_by_position({"loss": 2.5, "loss_by_position": bins}, tmp_path / "position.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert (tmp_path / "position.png").read_bytes().startswith(PNG)


def test_each_validation_set_is_a_line(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, output: drawn.append(figure))
    rows = [
        {"step": 0, "tokens": 0, "valid_loss": 5.0, "valid_loss/books": 5.0, "valid_loss/code": 6.0},
        {"step": 1, "tokens": 10, "loss": 3.0},
        {"step": 2, "tokens": 20, "loss": 2.0, "valid_loss": 2.5, "valid_loss/books": 2.5, "valid_loss/code": 4.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn[0].axes[0].lines}
    assert lines == {
        "training": ([10, 20], [3.0, 2.0]),
        "validation: books": ([0, 20], [5.0, 2.5]),
        "validation: code": ([0, 20], [6.0, 4.0]),
    }
    pyplot.close(drawn[0])


def test_recall_is_drawn_over_distances_with_the_level_of_chance(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, output: drawn.append(figure))
    near, far = {"start": 0, "end": 16, "accuracy": 1.0}, {"start": 16, "end": 64, "accuracy": 0.25}
    recall_by_distance([("one", [near, far]), ("other", [far])], 0.125, tmp_path / "recall.png")
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log"
    assert [patch.get_data().values.tolist() for patch in axes.patches] == [[1.0, 0.25], [0.25]]
    assert list(axes.patches[0].get_data().edges) == [8, 16, 64]  # a logarithm has no 0
    assert axes.lines[0].get_ydata()[0] == pytest.approx(0.125)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "other", "chance, 12.5 %"]
    pyplot.close(drawn[0])


def test_cells_stand_where_their_names_are(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, output: drawn.append(figure))
    cells("title", "x", "y", ["a", "b"], {"low": {"b": (2.0, "two")}, "high": {"a": (4.0, "four")}}, tmp_path / "c.png")
    (axes,) = drawn[0].axes
    found = {text.get_text(): text.get_position() for text in axes.texts if text.get_text() != "–"}
    assert found == {"two": (1, 0), "four": (0, 1)} and len(axes.texts) == 4
    assert [label.get_text() for label in axes.get_yticklabels()] == ["low", "high"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    pyplot.close(drawn[0])


def test_schemes_have_colours_and_ranks_have_dashes(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, output: drawn.append(figure))
    tokens = [256, 512]
    lines = [(name, ranks, tokens, [1e6, 2e6], [0.001, 0.003]) for ranks in (2, 4) for name in ("one", "other")]
    over_slices("title", lines, tmp_path / "slices.png")
    for axes, values in zip(drawn[0].axes, ([1.0, 2.0], [1.0, 3.0]), strict=True):  # MB, ms
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] == [(tokens, values)] * 4
        assert [line.get_color() for line in axes.lines] == ["C0", "C1", "C0", "C1"]
        assert [line.get_linestyle() for line in axes.lines] == ["-", "-", "--", "--"]
    names = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert names == ["one", "other", "2 ranks", "4 ranks"]
    pyplot.close(drawn[0])


def test_retrieval_is_a_map_of_contexts_and_depths(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, output: drawn.append(figure))
    rows = [
        {
            "task": task,
            "context": context,
            "depth": depth,
            "chance": 0.1,
            "accuracy": depth,
            "nats": 2,
            "nats_without": 5,
        }
        for task in ("copy", "other")
        for context in (512, 1024)
        for depth in (0.0, 1.0)
    ]
    rows[1]["nats"] = 6.04  # copy, 512 tokens, depth 1
    plots.retrieval(rows, tmp_path / "retrieval.png")
    right, other, gained, _ = drawn[0].axes
    assert right.get_title(loc="left") == "copy\nright (chance 10%)"
    assert other.get_title(loc="left") == "other\nright (chance 10%)"
    assert right.images[0].get_array().tolist() == [[0, 0], [1, 1]]
    assert gained.images[0].get_array().tolist() == [[3, 3], [pytest.approx(-1.04), 3]]
    assert [text.get_text() for text in right.texts] == ["0%", "0%", "100%", "100%"]
    assert [text.get_text() for text in gained.texts] == ["+3.00", "+3.00", "-1.04", "+3.00"]
    assert [label.get_text() for label in gained.get_xticklabels()] == ["512", "1,024"]
    assert [label.get_text() for label in gained.get_yticklabels()] == ["0.00", "1.00"]
    pyplot.close(drawn[0])
