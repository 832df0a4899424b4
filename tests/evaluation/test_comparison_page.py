"""The page and the pictures of a comparison: complete, self-contained, and safe whatever runs are called."""

import base64
import re
from html.parser import HTMLParser

import pytest
from matplotlib import pyplot

from lcpt.evaluation import loss_plots, retrieval_plots
from lcpt.evaluation.compared_runs import group_by_setting, read_run
from lcpt.evaluation.comparison import compare
from lcpt.evaluation.comparison_page import page
from lcpt.evaluation.comparison_pictures import draw

EVIL = '<script>alert("$x_1$")&'
VOID = {"meta", "img"}


def documents(more):
    return [{"id": f"d{n}", "tokens": 100, "bytes": 300, "nats": 400.0 + more + n} for n in range(12)]


def evaluation(more):
    bins = [(0, 1, None), (1, 16, [3.5, 4.5]), (16, 48, [3.0, 4.0]), (48, 64, [3.25, 3.75])]
    contexts = [(32, 0.0, None), (64, 0.25, [0.125, 0.5])]
    return {
        "checkpoint": f"runs/{EVIL}",
        "loss": (4800 + 66 + 12 * more) / 1200,
        "bits_per_byte": 2.0,
        "fingerprint": "f" * 64,
        "window": 64,
        "stride": 64,
        "carry_state": False,
        "precision": "bf16",
        "loss_by_position": [
            {"start": start, "end": end, "tokens": 9, "loss": 4.0 + more, "interval": interval, "unigram": 7.0}
            for start, end, interval in bins
        ],
        "context_gain": {
            "contexts": [
                {"context": n, "loss": 4.0 - gain, "interval": [3.0, 5.0], "gain": gain, "gain_interval": interval}
                for n, gain, interval in contexts
            ]
        },
    }


def retrieval(accuracy):
    cell = {"context": 64, "samples": 4, "accuracy": accuracy, "chance": 0.125, "nats": 1.0, "nats_without": 2.0}
    rows = [cell | {"task": EVIL, "depth": depth} for depth in (0.0, 0.5)] + [cell | {"task": "copy", "depth": None}]
    summary = [
        cell | {"task": EVIL, "interval": [accuracy - 0.25, accuracy]},
        cell | {"task": "copy", "interval": None},
    ]
    return {"fingerprint": "a", "rows": rows, "summary": summary}


@pytest.fixture
def runs(make_run):
    environment = {"command": ["pretrain.py", EVIL], "device": "cpu", "versions": {"torch": "2.13"}}
    made = []
    for number, name in enumerate((EVIL, "_other")):
        for seed in (0, 1):
            changes = {"documents": documents(number), "evaluation": evaluation(number), "environment": environment}
            if seed == 0:
                changes["retrieval"] = retrieval(0.5 + 0.25 * number)
            made.append(make_run(f"{name}-{seed}", run__seed=seed, training__lr=float(number), **changes))
    return [read_run(folder) for folder in made]


class Reader(HTMLParser):
    """Collects tags with their attributes, and holds that they nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_stands_alone(runs, tmp_path):
    settings = group_by_setting(runs)
    pictures = draw(settings, tmp_path)
    text = page(compare(runs), settings, pictures)
    found = Reader(text)
    assert {tag for tag, _ in found.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "section", "h1", "h2", "h3", "p", "div", "table", "thead"),
        *("tbody", "tr", "th", "td", "img", "dl", "dt", "dd"),
    }
    sources = [attributes["src"] for tag, attributes in found.tags if tag == "img"]
    files = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    assert files == [picture.file.read_bytes() for picture in pictures] and len(files) == 6
    assert not re.search(r"url\(|@import|https?:|href|onload", text)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.tags
    cells = {data.strip() for data in found.texts}
    assert {f"{EVIL} (2 seeds)", "bf16", "4.0000", "3.7500 (+0.2500: 0.1250 to 0.5000)", "75.0 (50.0 to 75.0)"} <= cells
    assert {"+0.0048", "pretrain.py '<script>alert(\"$x_1$\")&'", "0.00049", "12.5"} <= cells


def test_a_page_of_runs_that_nobody_evaluated(make_run, tmp_path):
    runs = [read_run(make_run("one"))]
    settings = group_by_setting(runs)
    text = page(compare(runs), settings, draw(settings, tmp_path))
    assert "Paired differences" not in text and "Retrieval" not in text and "Context gain" not in text
    assert len([tag for tag, _ in Reader(text).tags if tag == "img"]) == 2


def test_warnings_and_refusals_are_on_the_page(make_run, tmp_path):
    runs = [
        read_run(make_run("a", documents=documents(0), evaluation=evaluation(0))),
        read_run(make_run("b", training__lr=1.0, documents=documents(0), evaluation=evaluation(0) | {"window": 32})),
    ]
    settings = group_by_setting(runs)
    text = page(compare(runs), settings, [])
    assert '<p class="warning">b minus a: different window: 32 of b, 64 of a</p>' in text
    assert '<p class="warning">different scoring in evaluation.json: window 64' in text


def test_pictures_show_a_line_or_panel_a_setting(runs, tmp_path, monkeypatch):
    drawn = {}
    for module in (loss_plots, retrieval_plots):
        monkeypatch.setattr(module, "save", lambda figure, output: drawn.setdefault(output.name, figure))
    draw(group_by_setting(runs), tmp_path)
    above, below = drawn["loss_by_position.png"].axes
    assert above.patches[0].get_data().values.tolist() == [7.0] * 4
    assert [line.get_data().values.tolist() for line in below.patches] == [[4.0] * 4, [5.0] * 4]
    assert len({line.get_edgecolor() for line in below.patches}) == 2
    assert above.get_ylim()[1] - above.get_ylim()[0] == pytest.approx((below.get_ylim()[1] - below.get_ylim()[0]) / 3)
    loss, gain = drawn["context_gain.png"].axes
    assert [line[0].get_ydata().tolist() for line in loss.containers] == [[4.0, 3.75]] * 2
    assert [line[0].get_ydata().tolist() for line in gain.containers] == [[0.0, 0.25]] * 2
    [name] = [name for name in drawn if name.startswith("retrieval_0")]
    assert re.fullmatch(r"retrieval_0_[\w-]+\.png", name)
    first, second, _ = drawn[name].axes
    assert [ax.images[0].get_array().tolist() for ax in (first, second)] == [[[0.5]] * 2, [[0.75]] * 2]
    assert [label.get_text() for label in first.get_yticklabels()] == ["0%", "50%"]
    [legend] = [ax.get_legend() for ax in drawn["loss_over_tokens.png"].axes]
    assert len(legend.get_texts()) == 2  # a name that begins with _ would hide its line
    for figure in drawn.values():
        pyplot.close(figure)
