"""The command that measures what an exchange costs besides the transfer."""

import json


def test_rows_of_every_family(call_program, tmp_path):
    output = tmp_path / "exchange.json"
    code, said, _ = call_program(
        "benchmarks/exchange.py", "--tokens", 512, "--heads", 1, "--head-dim", 8, "--repeats", 1, "--output", output
    )
    rows = json.loads(output.read_text())["rows"]
    assert [row["layer"] for row in rows] == ["polysketch", "kernel", "flurka"]
    assert all(row["ratio"] > 0 for row in rows) and said.count("\n") == 3
    assert code in (0, 1)


def test_bad_input(call_program, tmp_path):
    code, _, said = call_program("benchmarks/exchange.py", "--tokens", 300, "--output", tmp_path / "x.json")
    assert code == 2 and "multiple of 256" in said
    code, _, said = call_program("benchmarks/exchange.py", "--output", tmp_path)
    assert code == 2 and str(tmp_path) in said
