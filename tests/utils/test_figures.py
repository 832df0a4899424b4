import pytest
from matplotlib import pyplot

from lcpt.utils.figures import Heading, limits, log_y, loss_limits, name_beside, new_figure, powers_of_two, save


@pytest.fixture
def picture():
    figure, axes = new_figure(Heading("Loss of $5 models", "runs/demo", None, "cpu, fp32"), "tokens", "loss")
    yield figure, axes
    pyplot.close(figure)


def test_a_picture_says_what_it_shows_and_where_its_figures_come_from(picture, tmp_path):
    figure, axes = picture
    assert figure.get_suptitle() == r"Loss of \$5 models"
    assert figure.get_supxlabel() == "runs/demo · cpu, fp32"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", "loss")
    save(figure, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert not pyplot.fignum_exists(figure.number)


def test_names_have_a_colour_each_and_none_hides_from_the_legend(picture):
    _, axes = picture
    colours = name_beside(axes, ["one", "_two", "one"])
    assert list(colours) == ["one", "_two"] and colours["one"] != colours["_two"]
    assert [text.get_text().strip("\u200b") for text in axes.get_legend().get_texts()] == ["one", "_two"]


@pytest.mark.parametrize(
    "losses", [[5.3, 5.475], [2.0, 2.0], [5.0, float("nan"), 5.1], [8.5, 2.0]], ids=["noise", "equal", "gap", "wide"]
)
def test_a_loss_axis_shows_all_values_and_does_not_enlarge_noise(losses):
    low, high = loss_limits(losses)
    assert low < min(losses) and high > max(x for x in losses if x == x)
    assert high - low >= 0.0999 * max(x for x in losses if x == x)


def test_limits_have_a_margin_and_a_height_where_all_values_are_one():
    assert limits([0.0, 10.0]) == pytest.approx((-0.5, 10.5))
    low, high = limits([3.0])
    assert low < 3 < high
    assert limits([]) == pytest.approx((-0.05, 1.05))


@pytest.mark.parametrize("values", [[3.1, 3.9], [20.0, 20.0], [0.012, 45.0], [1e-3, 5e6]])
def test_a_logarithmic_axis_has_two_labels_at_least(picture, values):
    figure, axes = picture
    axes.plot([512, 1024], values)
    powers_of_two(axes)
    log_y(axes)
    figure.canvas.draw()
    low, high = axes.get_ylim()
    assert low <= min(values) and high >= max(values)
    shown = [
        label.get_text()
        for at, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
        if low <= at <= high
    ]
    assert 2 <= len([text for text in shown if text]) <= 12
    assert [label.get_text() for label in axes.get_xticklabels() if label.get_text() in ("512", "1,024")]
