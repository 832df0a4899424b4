from matplotlib import pyplot

from lcpt.benchmarking import cost_plots
from lcpt.utils.figures import Heading

HEADING = Heading("What it shows", "a device")


def test_cells_stand_where_their_names_are(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(cost_plots, "save", lambda figure, output: drawn.append(figure))
    cost_plots.cells(
        HEADING, "x", "y", ["a", "b"], {"low": {"b": (2.0, "two")}, "high": {"a": (4.0, "four")}}, tmp_path / "c.png"
    )
    (axes,) = drawn[0].axes
    found = {text.get_text(): text.get_position() for text in axes.texts if text.get_text() != "–"}
    assert found == {"two": (1, 0), "four": (0, 1)} and len(axes.texts) == 4
    assert [label.get_text() for label in axes.get_yticklabels()] == ["low", "high"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    pyplot.close(drawn[0])


def test_schemes_have_colours_and_ranks_have_dashes(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(cost_plots, "save", lambda figure, output: drawn.append(figure))
    tokens = [256, 512]
    lines = [(name, ranks, tokens, [1e6, 2e6], [0.001, 0.003]) for ranks in (2, 4) for name in ("one", "other")]
    cost_plots.over_slices(HEADING, lines, tmp_path / "slices.png")
    for axes, values in zip(drawn[0].axes, ([1.0, 2.0], [1.0, 3.0]), strict=True):  # MB, ms
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] == [(tokens, values)] * 4
        one, other, *again = [line.get_color() for line in axes.lines]
        assert one != other and again == [one, other]
        assert [line.get_linestyle() for line in axes.lines] == ["-", "-", "--", "--"]
    names = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert names == ["one", "other", "2 ranks", "4 ranks"]
    pyplot.close(drawn[0])
