import json

import pytest


@pytest.fixture
def config(tiny_yaml, tmp_path):
    (tmp_path / "tiny.yaml").write_text("run: {dir: unused}\n" + tiny_yaml.read_text())
    return tmp_path / "tiny.yaml"


def test_rows_hold_what_the_contract_names(call_tool, config, tmp_path):
    output = tmp_path / "steps.json"
    code, _, said = call_tool("benchmark_training", "--configs", config, "--kinds", "softmax,polysketch",
                              "--contexts", "32,64", "--repeats", 1, "--output", output)
    assert code == 0, said
    report = json.loads(output.read_text())
    assert {"schema_version", "date", "git_commit", "device", "versions", "command", "rows"} <= report.keys()
    assert [(row["context"], row["method"]) for row in report["rows"]] == [
        (32, "tiny softmax"), (32, "tiny polysketch"), (64, "tiny softmax"), (64, "tiny polysketch")]
    softmax, polysketch = report["rows"][:2]
    assert softmax["milliseconds"]["p10"] <= softmax["milliseconds"]["p50"] <= softmax["milliseconds"]["p90"]
    assert polysketch["speedup"] == {
        "tiny softmax": softmax["milliseconds"]["p50"] / polysketch["milliseconds"]["p50"]}
    assert softmax["peak_memory_bytes"] > 2**20 and softmax["mode"] == "training_step"


def test_bad_input_is_one_line(call_tool, config, tmp_path):
    for arguments, remark in ((["--contexts", "many"], "--contexts many"), (["--kinds", "none"], "'none'")):
        given = ["--configs", config, "--contexts", "32", "--output", tmp_path / "steps.json", *arguments]
        code, _, said = call_tool("benchmark_training", *given)
        assert code == 2 and remark in said and len(said.splitlines()) == 1
