import json
from pathlib import Path

import pytest

REPORT = Path(__file__).parents[2] / "benchmarks/results/kernel-report.json"
RIVALS = ("350/300", "430/400", "550/450")


@pytest.fixture
def roofline(call_program):
    return lambda *arguments: call_program("benchmarks/roofline.py", *arguments)


def test_a_model_says_that_it_is_one(roofline, tmp_path):
    code, out, _ = roofline("--report", REPORT, "--output", tmp_path / "model.json")
    report = json.loads((tmp_path / "model.json").read_text())
    assert code == 0 and out.startswith("model, nothing measured")
    assert report["device"] == "model of an H200" and report["assumed"]["issued"] < 1
    rows = {(row["method"].split(" ")[0], row["context"], row["mode"]): row for row in report["rows"]}
    assert len(report["rows"]) == 5 * 2 * 4 and rows["squared", 8192, "forward"]["batch"] == 8
    for row in report["rows"]:
        assert row["device"] == "model" and "model" in row["method"] and "milliseconds" not in row
        taken, flash = row["model_milliseconds"], row["flash_milliseconds"]
        assert 0 < taken["issue"] < taken["likely"] and 0 < taken["roof"] < taken["likely"]
        assert taken["likely"] == pytest.approx(sum(x["likely_milliseconds"] for x in row["kernels"]))
        assert [row["model_speedup"][name] for name in RIVALS] == pytest.approx(
            [flash[name] / taken["likely"] for name in RIVALS]
        )
    flash = [rows["squared", 65536, mode]["flash_milliseconds"]["350/300"] for mode in ("forward", "forward_backward")]
    forward = 12 * 2 * 64 * 65536**2 / 350e12
    assert flash == pytest.approx([1e3 * forward, 1e3 * (forward + 12 * 5 * 64 * 65536**2 / 300e12)])


def test_bad_input_is_one_line(roofline, tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"rows": []}')
    output = ("--output", tmp_path / "m.json")
    for arguments, named in (
        (["--report", other, *output], "other.json"),
        (["--report", tmp_path / "none.json", *output], "none.json"),
        (["--report", REPORT, "--output", "/proc/none/m.json"], "/proc/none"),
    ):
        code, _, err = roofline(*arguments)
        assert code == 2 and err.startswith("error: ") and named in err and err.count("\n") == 1
