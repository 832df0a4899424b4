import json

import pytest
from matplotlib import pyplot

from lcpt.evaluation import loss_plots
from lcpt.utils.figures import Heading

PNG = b"\x89PNG\r\n"
HEADING = Heading("What it shows", "a run", "a device")


def test_both_pictures_are_drawn(tmp_path):
    rows = [{"tokens": 10, "loss": 3.0}, {"tokens": 20, "loss": 2.0, "valid_loss": 2.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss_plots.loss_curve(HEADING, tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    bins = [{"start": 0, "end": 4, "tokens": 4, "loss": 3.0}, {"start": 4, "end": 8, "tokens": 4, "loss": 2.0}]
    loss_plots.loss_by_position(
        HEADING, {"loss": 2.5, "loss_by_position": bins, "documents_scored": 2}, tmp_path / "position.png"
    )
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert (tmp_path / "position.png").read_bytes().startswith(PNG)


def test_each_validation_set_is_a_line(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(loss_plots, "save", lambda figure, output: drawn.append(figure))
    rows = [
        {"step": 0, "tokens": 0, "valid_loss": 5.0, "valid_loss/books": 5.0, "valid_loss/code": 6.0},
        {"step": 1, "tokens": 10, "loss": 3.0},
        {"step": 2, "tokens": 20, "loss": 2.0, "valid_loss": 2.5, "valid_loss/books": 2.5, "valid_loss/code": 4.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss_plots.loss_curve(HEADING, tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn[0].axes[0].lines}
    assert lines == {
        "training": ([10, 20], [3.0, 2.0]),
        "validation: books": ([0, 20], [5.0, 2.5]),
        "validation: code": ([0, 20], [6.0, 4.0]),
    }
    pyplot.close(drawn[0])


def test_recall_is_drawn_over_distances_with_the_level_of_chance(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(loss_plots, "save", lambda figure, output: drawn.append(figure))
    near, far = {"start": 0, "end": 16, "accuracy": 1.0}, {"start": 16, "end": 64, "accuracy": 0.25}
    loss_plots.recall_by_distance(HEADING, [("one", [near, far]), ("other", [far])], 0.125, tmp_path / "recall.png")
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log"
    assert [patch.get_data().values.tolist() for patch in axes.patches] == [[1.0, 0.25], [0.25]]
    assert list(axes.patches[0].get_data().edges) == [8, 16, 64]  # a logarithm has no 0
    assert axes.lines[0].get_ydata()[0] == pytest.approx(0.125)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "other", "chance, 12.5 %"]
    pyplot.close(drawn[0])


def test_an_axis_of_losses_does_not_enlarge_noise(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(loss_plots, "save", lambda figure, output: drawn.append(figure))
    near = [{"start": 0, "end": 16, "loss": 5.30}, {"start": 16, "end": 64, "loss": 5.31}]
    loss_plots.loss_by_distance(HEADING, [("one", near)], "x", "y", tmp_path / "loss.png")
    low, high = drawn[0].axes[0].get_ylim()
    assert high - low > 0.5 and low < 5.30 and high > 5.31
    pyplot.close(drawn[0])


@pytest.mark.parametrize("documents, said", [(2, "2 documents: no interval"), (10, "95 % over 10 documents")])
def test_intervals_of_few_documents_are_left_out(tmp_path, monkeypatch, documents, said):
    drawn = []
    monkeypatch.setattr(loss_plots, "save", lambda figure, output: drawn.append(figure))
    bins = [{"start": 0, "end": 4, "loss": 3.0, "interval": [-9.0, 15.0]}]
    report = {"loss": 3.0, "loss_by_position": bins, "documents_scored": documents}
    loss_plots.loss_by_position(HEADING, report, tmp_path / "loss.png")
    (axes,) = drawn[0].axes
    assert axes.get_legend().get_texts()[-1].get_text() == said
    assert (axes.get_ylim()[1] > 15) == (documents >= 10)
    pyplot.close(drawn[0])
