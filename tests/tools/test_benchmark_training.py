import json

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel

from lcpt.benchmarking import training_step as steps


@pytest.fixture
def config(tiny_yaml, tmp_path):
    (tmp_path / "tiny.yaml").write_text("run: {dir: unused}\n" + tiny_yaml.read_text())
    return tmp_path / "tiny.yaml"


def test_rows_hold_what_the_contract_names(call_tool, config, tmp_path):
    output = tmp_path / "steps.json"
    code, _, said = call_tool(
        "benchmark_training",
        "--configs",
        config,
        "--kinds",
        "softmax,polysketch",
        "--contexts",
        "32,64",
        "--repeats",
        1,
        "--output",
        output,
    )
    assert code == 0, said
    report = json.loads(output.read_text())
    assert {"schema_version", "date", "git_commit", "device", "versions", "command", "rows"} <= report.keys()
    assert [(row["context"], row["method"]) for row in report["rows"]] == [
        (32, "tiny softmax"),
        (32, "tiny polysketch"),
        (64, "tiny softmax"),
        (64, "tiny polysketch"),
    ]
    softmax, polysketch = report["rows"][:2]
    assert softmax["milliseconds"]["p10"] <= softmax["milliseconds"]["p50"] <= softmax["milliseconds"]["p90"]
    assert polysketch["speedup"] == {"tiny softmax": softmax["milliseconds"]["p50"] / polysketch["milliseconds"]["p50"]}
    assert softmax["peak_memory_bytes"] > 2**20 and softmax["mode"] == "training_step"
    assert softmax["backend"] == polysketch["backend"] == "torch" and report["left_out"] == []
    assert softmax["tokens_per_second"] == pytest.approx(1e3 * softmax["batch"] * 32 / softmax["milliseconds"]["p50"])
    assert (tmp_path / "steps.md").read_text().count("\n") == 2 + 4


def test_own_kinds_kernels_of_softmax_and_a_constant_number_of_tokens(call_tool, config, tmp_path, monkeypatch):
    output, asked = tmp_path / "steps.json", []

    def note(backends):
        asked.append(backends)
        return sdpa_kernel(backends)

    monkeypatch.setattr("lcpt.commands.benchmark_training.sdpa_kernel", note)
    code, _, said = call_tool(
        "benchmark_training",
        "--configs",
        config,
        "--kinds",
        "own,polysketch",
        "--sdpa",
        "flash",
        "--contexts",
        "32,64",
        "--tokens",
        128,
        "--repeats",
        1,
        "--output",
        output,
    )
    assert code == 0, said
    rows = json.loads(output.read_text())["rows"]
    assert [(row["method"], row["batch"], row["settings"].get("sdpa")) for row in rows] == [
        ("tiny polysketch+softmax (flash)", 4, "flash"),
        ("tiny polysketch", 4, None),
        ("tiny polysketch+softmax (flash)", 2, "flash"),
        ("tiny polysketch", 2, None),
    ]
    assert asked == [[SDPBackend.FLASH_ATTENTION]] * 4  # a warm-up and a step at each context


def test_what_does_not_fit_is_left_out(call_tool, config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lcpt.commands.benchmark_training.first_passes",
        lambda steps, device: {"tiny softmax": "OutOfMemoryError: too large"},
    )
    output = tmp_path / "steps.json"
    code, _, said = call_tool(
        "benchmark_training",
        "--configs",
        config,
        "--kinds",
        "softmax,polysketch",
        "--contexts",
        "32",
        "--repeats",
        1,
        "--output",
        output,
    )
    report = json.loads(output.read_text())
    assert code == 1 and said == "left out: tiny softmax at 32: OutOfMemoryError: too large\n"
    assert [row["method"] for row in report["rows"]] == ["tiny polysketch"]
    assert report["left_out"] == [{"method": "tiny softmax", "context": 32, "reason": "OutOfMemoryError: too large"}]


def test_rows_are_written_as_they_come(call_tool, config, tmp_path, monkeypatch):
    made, real = [], steps.training_step

    def training_step(model, sequences, context, *others):
        if made:
            raise KeyboardInterrupt
        made.append(context)
        return real(model, sequences, context, *others)

    monkeypatch.setattr("lcpt.commands.benchmark_training.training_step", training_step)
    code, _, said = call_tool(
        "benchmark_training",
        "--configs",
        config,
        "--contexts",
        "64,32",
        "--repeats",
        1,
        "--output",
        tmp_path / "steps.json",
    )
    assert (code, said) == (130, "error: interrupted\n")
    (row,) = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert row["context"] == 64


def test_bad_input_is_one_line(call_tool, config, tmp_path):
    for arguments, remark in (
        (["--contexts", "many"], "--contexts many"),
        (["--kinds", "none"], "'none'"),
        (["--sdpa", "flush"], "--sdpa flush"),
    ):
        given = ["--configs", config, "--contexts", "32", "--output", tmp_path / "steps.json", *arguments]
        code, _, said = call_tool("benchmark_training", *given)
        assert code == 2 and remark in said and len(said.splitlines()) == 1
