"""The notebook of docs/, executed without Jupyter: its code cells run in order, and say what stands below them."""

import json
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot

NOTEBOOK = Path(__file__).parents[2] / "docs/first-steps.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


@pytest.fixture
def plain_folder(tmp_path, monkeypatch):
    """The notebook writes into the folder in which it runs; pictures go nowhere."""
    monkeypatch.chdir(tmp_path)
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    yield
    pyplot.close("all")
    matplotlib.use(backend)


@pytest.mark.usefixtures("plain_folder")
def test_the_cells_run_and_those_that_are_exact_say_the_same_again(capsys):
    namespace = {"__name__": "__main__"}
    for cell in CODE:
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, {cell['id']}", "exec"), namespace)
        said = capsys.readouterr().out
        if "exact" in cell["metadata"].get("tags", []):
            assert said == printed(cell), cell["id"]
    assert 0.91 < namespace["figures"]["bits_per_byte"] < 1.6  # some 4.4 before training


def test_every_cell_that_prints_or_draws_shows_it():
    silent = [cell["id"] for cell in CODE if not cell["outputs"]]
    assert silent == []


def printed(cell: dict) -> str:
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])
