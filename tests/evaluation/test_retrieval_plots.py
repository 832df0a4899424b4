import pytest
from matplotlib import pyplot

from lcpt.evaluation import retrieval_plots
from lcpt.utils.figures import Heading

HEADING = Heading("What it shows", "a device")


def test_retrieval_is_a_map_of_contexts_and_depths(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(retrieval_plots, "save", lambda figure, output: drawn.append(figure))
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
    retrieval_plots.retrieval(HEADING, rows, tmp_path / "retrieval.png")
    right, other, gained, _ = drawn[0].axes
    assert right.get_title(loc="left") == "copy\nright (chance 10%)"
    assert other.get_title(loc="left") == "other\nright (chance 10%)"
    assert right.images[0].get_array().tolist() == [[0, 0], [1, 1]]
    assert gained.images[0].get_array().tolist() == [[3, 3], [pytest.approx(-1.04), 3]]
    assert [text.get_text() for text in right.texts] == ["0%", "0%", "100%", "100%"]
    assert [text.get_text() for text in gained.texts] == ["+3.00", "+3.00", "-1.04", "+3.00"]
    assert [label.get_text() for label in gained.get_xticklabels()] == ["512", "1,024"]
    assert [label.get_text() for label in gained.get_yticklabels()] == ["0%", "100%"]
    pyplot.close(drawn[0])
