import json

import pytest

PARTS = {"settings", "dimensions", "costs", "sketch_error", "ranks"}
HEADER = {"schema_version", "date", "git_commit", "device", "versions", "command"}


@pytest.fixture
def quick(monkeypatch):
    """Few draws and small matrices."""
    monkeypatch.setattr("lcpt.analysis.sketch_error.DRAWS", 2)
    monkeypatch.setattr("lcpt.analysis.ranks.ROWS", 40)


def test_the_report_holds_the_figures_of_every_part(call_tool, quick, tmp_path):
    output = tmp_path / "new/features.json"
    code, out, _ = call_tool("feature_report", "--head-dim", 64, "--degree", 4, "--sketch-size", 24, "--output", output)
    report = json.loads(output.read_text())
    assert code == 0 and report.keys() == HEADER | PARTS and report["schema_version"] == 1
    assert report["settings"] == {"head_dim": 64, "degree": 4, "sketch_size": 24, "block_size": 256}
    assert [row["dimension"] for row in report["dimensions"] if row["degree"] == 4] == [766_480, 814_385, 300, 384]
    costs = {row["kind"]: row for row in report["costs"]}
    assert [at["context"] for at in costs["softmax"]["at"]] == [8192, 16384, 32768]
    assert costs["softmax"]["at"][0]["forward"] == 2 * 64 * 8192
    assert {row["size"] for row in report["sketch_error"]} == {8, 16, 24, 32, 64, 128}
    assert {(row["sketch"], row["cosine"]) for row in report["sketch_error"]} == {
        (kind, cosine) for kind in ("gaussian", "srht") for cosine in (0.0, 0.3, 0.6, 1.0)
    }
    ranks = {row["function"]: row["rank"] for row in report["ranks"]["functions"]}
    assert ranks["x"] == 8 and ranks["x^2"] == 36 and ranks["exp"] == 40
    for part in ("766,480", "199,284,800", f"{costs['polysketch']['crossover']['forward']:,}", "exp ", "srht"):
        assert part in out


def test_the_same_figures_each_time(call_tool, quick, tmp_path):
    reports = []
    for name in ("a.json", "b.json"):
        call_tool("feature_report", "--head-dim", 8, "--sketch-size", 4, "--output", tmp_path / name)
        report = json.loads((tmp_path / name).read_text())
        reports.append({part: report[part] for part in PARTS})
    assert reports[0] == reports[1]


def test_every_head_of_a_checkpoint_has_a_row(call_tool, quick, run_folder, valid_folder, tmp_path):
    output = tmp_path / "features.json"
    code, out, _ = call_tool(
        "feature_report", "--head-dim", 8, "--checkpoint", run_folder, "--data", valid_folder, "--output", output
    )
    report = json.loads(output.read_text())["checkpoint"]
    assert code == 0 and report["step"] == 7 and report["tokens"] <= 1024
    assert [(row["layer"], row["head"], row["kind"]) for row in report["heads"]] == [
        (0, 0, "polysketch"),
        (0, 1, "polysketch"),
        (1, 0, "polysketch"),
        (1, 1, "polysketch"),
    ]
    for row in report["heads"]:
        assert {rank["function"]: rank["rank"] for rank in row["ranks"]}["x"] <= 16
        assert row["sketch_error"]["relative_error"] > 0
    assert "step-00000007" in out and "polysketch" in out


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--head-dim", 1], "head dimension 1"),
        (["--degree", 1], "degree 1"),
        (["--checkpoint", "absent"], "--data"),
        (["--data", "absent"], "--checkpoint"),
        (["--checkpoint", "absent", "--data", "text"], "absent is no run folder"),
    ],
)
def test_bad_input_is_one_line(call_tool, arguments, part):
    code, out, err = call_tool("feature_report", *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and part in err and err.count("\n") == 1


def test_missing_data_is_one_line(call_tool, quick, run_folder):
    code, out, err = call_tool("feature_report", "--head-dim", 8, "--checkpoint", run_folder, "--data", "absent.txt")
    assert (code, out) == (2, "") and "absent.txt" in err and err.count("\n") == 1
