import json

import pytest


@pytest.fixture
def roofline(call_program):
    return lambda *arguments: call_program("benchmarks/roofline.py", *arguments)


def test_a_model_says_that_it_is_one(roofline, tmp_path):
    code, out, _ = roofline("--output", tmp_path / "model.json")
    report = json.loads((tmp_path / "model.json").read_text())
    assert code == 0 and out.startswith("model, nothing measured")
    assert report["device"] == "model of an H200" and report["assumed"]["efficiency"]["forward"] < 1
    rows = {(row["context"], row["mode"]): row for row in report["rows"]}
    assert len(rows) == 7 * 2 and rows[2048, "forward"]["batch"] == 32 and rows[131072, "forward"]["batch"] == 1
    for row in rows.values():
        assert row["device"] == "model" and "model" in row["method"] and "milliseconds" not in row
        taken, flash = row["model_milliseconds"], row["flash_milliseconds"]
        assert 0 < taken["roof"] < taken["likely"]
        for name in ("350/300", "430/400", "550/450"):
            assert row["model_speedup"]["likely"][name] == pytest.approx(flash[name] / taken["likely"])
    flash = [rows[65536, mode]["flash_milliseconds"]["350/300"] for mode in ("forward", "forward_backward")]
    forward = 12 * 2 * 64 * 65536**2 / 350e12
    assert flash == pytest.approx([1e3 * forward, 1e3 * (forward + 12 * 5 * 64 * 65536**2 / 300e12)])


def test_bad_input_is_one_line(roofline, tmp_path):
    for arguments in (["--sketch", 0, "--output", tmp_path / "m.json"], ["--output", "/proc/none/m.json"]):
        code, _, err = roofline(*arguments)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
